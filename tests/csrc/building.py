"""Extensions built for a test, in packages of their own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def setup_script() -> ModuleType:
    """The repository's setup.py, as a module."""
    spec = importlib.util.spec_from_file_location("minitron_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_all(commands: list[list[str]], cwd: Path = ROOT) -> list[str]:
    """Run commands, two at a time; what each wrote to stderr."""

    def run(command: list[str]) -> str:
        result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        output = (result.stdout + result.stderr)[-4000:]
        assert result.returncode == 0, f"{' '.join(command)}\n{output}"
        return result.stderr

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, commands))


def extension_in(directory: Path) -> Path:
    """Copy minitron and its tests there, and say where its extension belongs."""
    for name in ("minitron", "tests"):
        ignore = shutil.ignore_patterns("_C*", "__pycache__")
        shutil.copytree(ROOT / name, directory / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", directory)
    return directory / "minitron" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def python_in(directory: Path, *arguments: str, **environment: str) -> str:
    """Run Python on the minitron there; its output."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(directory), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout
