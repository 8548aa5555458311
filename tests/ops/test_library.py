"""What is said, and what still works, where the extension was not built."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from minitron.ops import library
from minitron.ops.activation_stats import activation_stats


@pytest.fixture
def build():
    """The repository's setup.py, as a module."""
    path = Path(__file__).parents[2] / "setup.py"
    spec = importlib.util.spec_from_file_location("minitron_setup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_line_of_notice(monkeypatch, caplog):
    monkeypatch.setattr(library, "extension_built", False)
    monkeypatch.setattr(library, "_noticed", False)
    caplog.set_level("INFO")
    for _ in range(3):
        activation_stats(torch.ones(2, 1, 3))
    assert [record.message for record in caplog.records] == [
        "minitron._C is not built: ops run in PyTorch (`make setup` builds it)"
    ]


def test_the_build_can_be_switched_off(build, monkeypatch):
    monkeypatch.setenv("MINITRON_BUILD_EXT", "0")
    assert build.missing() == "MINITRON_BUILD_EXT=0"


def test_a_missing_compiler_is_no_error(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.missing() == "no C++ compiler 'no-such-compiler'; set CXX"


def test_a_missing_torch_is_no_error(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--no-build-isolation" in build.missing()
