"""What is said, and what still works, where the extension was not built."""

import sys

import pytest
import torch

from minitron.ops import library
from minitron.ops.activation_stats import activation_stats
from tests.csrc.building import setup_script


@pytest.fixture
def build():
    return setup_script()


def test_one_line_of_notice(monkeypatch, caplog):
    monkeypatch.setattr(library, "kernel_devices", ())
    monkeypatch.setattr(library, "_noticed", False)
    caplog.set_level("INFO")
    for _ in range(3):
        activation_stats(torch.ones(2, 1, 3))
    assert [record.message for record in caplog.records] == [
        "minitron._C is not built: ops run in PyTorch (`make setup` builds it)"
    ]


def test_a_gpu_without_kernels_is_told_of(monkeypatch, caplog):
    monkeypatch.setattr(library, "kernel_devices", ("cpu",))
    monkeypatch.setattr(library, "_noticed", False)
    caplog.set_level("INFO")
    activation_stats(torch.ones(2, 1, 3))
    activation_stats(torch.ones(2, 1, 3, device="meta"))
    assert [record.message for record in caplog.records] == [
        "minitron._C was built without CUDA: on a GPU, ops run in PyTorch (set CUDA_HOME)"
    ]


@pytest.mark.gpu
def test_kernels_for_the_gpu_are_built():
    assert "cuda" in library.kernel_devices


def test_the_build_can_be_switched_off(build, monkeypatch):
    monkeypatch.setenv("MINITRON_BUILD_EXT", "0")
    assert build.missing() == "MINITRON_BUILD_EXT=0"


def test_a_missing_compiler_is_no_error(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.missing() == "no C++ compiler 'no-such-compiler'; set CXX"


def test_a_missing_torch_is_no_error(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "--no-build-isolation" in build.missing()
