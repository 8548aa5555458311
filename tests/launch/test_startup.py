"""The command line is answered before anything is imported that takes seconds."""

import subprocess
import sys

import pytest

from tests.launch.launcher import LAUNCH, STAGES, environment

RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(sorted({"torch", "megatron", "numpy", "transformers"} & set(sys.modules)))
"""


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("flag", "status", "expected"),
    [("--help", 0, "--out"), ("--ouut=x", 2, "error: unknown key")],
    ids=["help", "mistake"],
)
def test_answers_without_torch(stage, flag, status, expected, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", RUN, LAUNCH / f"{stage}.py", flag],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
        timeout=60,
    )
    assert result.returncode == status
    assert expected in result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
