"""launch/report.py as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.report.run_dirs import training_run

ROOT = Path(__file__).parents[2]


def report(*arguments, cwd):
    command = [sys.executable, str(ROOT / "launch" / "report.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_run_directories_are_plain_arguments(tmp_path):
    training_run(tmp_path / "a", [4.0, 2.5])
    training_run(tmp_path / "b", [5.0, 2.25])
    result = report("a", "--out", "page.html", "b", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["model", "-----", "a", "b"]
    assert lines[-1] == "wrote page.html and page.md"
    assert (tmp_path / "page.html").exists()
    assert (tmp_path / "page.md").exists()


def test_mistakes_are_one_line(tmp_path):
    for arguments, message in [
        ([], "error: no run directory is given"),
        (["nowhere"], "nowhere is not a directory"),
        (["a", "--outt", "x.html"], "unknown key outt; did you mean out?"),
    ]:
        result = report(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
