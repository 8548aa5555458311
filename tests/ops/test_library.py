"""What is said, and what still works, where the extension was not built, or for another torch."""

import re
import sys

import pytest
import torch

from minitron.ops import library
from tests.csrc.building import extension_in, python_in, setup_script


@pytest.fixture
def build():
    return setup_script()


op_without_kernels = library.define(
    "op_without_kernels(Tensor x) -> Tensor", reference=lambda x: 2 * x, fake=torch.empty_like
)


@pytest.fixture
def said(monkeypatch, caplog):
    """What a package says that has said nothing yet."""
    monkeypatch.setattr(library, "_noticed", False)
    caplog.set_level("WARNING")
    return lambda: [record.message for record in caplog.records]


def test_one_line_of_notice(monkeypatch, said):
    monkeypatch.setattr(library, "kernel_devices", ())
    monkeypatch.setattr(library, "_lack", "is not built")
    compiled = torch.compile(op_without_kernels, fullgraph=True, backend="aot_eager")
    for run in (compiled, op_without_kernels, compiled):
        assert run(torch.ones(3)).sum() == 6
    assert said() == ["minitron._C is not built: ops run in PyTorch (`make setup` builds it)"]


IN_A_PLAIN_SCRIPT = """
import sys
{missing}
import torch
from minitron.ops.block_cosine import block_cosine

x = torch.ones(2, 3, 4)
for _ in range(2):
    print(block_cosine(x, x).unique().tolist(), flush=True)
"""


@pytest.mark.parametrize("built", [False, True], ids=["not built", "for another torch"])
def test_a_plain_script_goes_on_and_says_so(built, tmp_path):
    extension, missing = extension_in(tmp_path), ""
    if built:
        extension.write_bytes(b"symbols of another torch")
        notice = rf"minitron._C does not load \(.*{extension.name}.*\): ops"
    else:
        missing = "sys.modules['minitron._C'] = None"  # nor that of an editable install
        notice = "minitron._C is not built: ops"
    output = python_in(tmp_path, "-c", IN_A_PLAIN_SCRIPT.format(missing=missing))
    said, *results = output.splitlines()
    assert re.fullmatch(rf"{notice} run in PyTorch \(`make setup` builds it\)", said)
    assert results == ["[1.0]", "[1.0]"]


def test_a_gpu_without_kernels_is_told_of(monkeypatch, said):
    monkeypatch.setattr(library, "kernel_devices", ("cpu",))
    op_without_kernels(torch.ones(3))  # not every op has a kernel on every device
    assert not said()
    library._notice("cuda")
    library._notice("cuda")
    assert said() == [
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
