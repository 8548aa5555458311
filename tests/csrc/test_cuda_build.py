"""The extension with CUDA, as far as a machine without a GPU can tell; needs nvcc."""

import re

import pytest

from tests.csrc import building
from tests.gpu_check import cuda_home

CUDA_HOME = cuda_home()

pytestmark = [
    pytest.mark.skipif(not CUDA_HOME, reason="needs nvcc: CUDA_HOME, /usr/local/cuda or PATH"),
    pytest.mark.slow,
]

CHECK = """
import torch
from minitron.ops import activation_stats, block_cosine, linear_kl

has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = [op for op in torch._C._dispatch_get_all_op_names() if op.startswith("minitron::")]
on_cpu = [op for op in ops if has(op, "CPU")]
assert len(on_cpu) >= 15, on_cpu
assert all(has(op, "CUDA") for op in on_cpu), on_cpu
x = torch.randn(9, 2, 5)
found = activation_stats.activation_stats(x).sum
torch.testing.assert_close(found.float(), x.sum(0))
"""


@pytest.fixture(scope="module")
def build():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_HOME", CUDA_HOME)
        patch.delenv("MINITRON_CUDA_ARCHITECTURES", raising=False)
        script = building.setup_script()
        # CPU kernels only have to be there: the plainest build of them.
        script.INSTRUCTION_SETS = {"DEFAULT": []}
        script.CXX_FLAGS = [flag for flag in script.CXX_FLAGS if flag != "-DMINITRON_X86"]
        yield script


@pytest.fixture(scope="module")
def compiled(build, tmp_path_factory):
    """The object files and, by the names of those with kernels, what ptxas says."""
    objects = tmp_path_factory.mktemp("objects")
    commands = build.compilations(objects)
    for name, command in commands.items():
        command += ["-Xptxas", "-v"] if name.endswith(".cuda.o") else ["-O0"]
    messages = building.run_all(list(commands.values()))
    said = dict(zip(commands, messages, strict=True))
    return [objects / name for name in commands], {
        name: text for name, text in said.items() if name.endswith(".cuda.o")
    }


def test_kernels_compile_for_every_gpu_without_a_register_spill(compiled):
    _, said = compiled
    assert said
    for name, text in said.items():
        assert set(re.findall(r"for '(sm_\d+)'", text)) == {"sm_80", "sm_90", "sm_100"}, name
        spills = re.findall(r"Function properties for (\w+)\n.* (\d+) bytes spill stores", text)
        assert len(spills) >= 3
        assert [kernel for kernel, stored in spills if stored != "0"] == []


def test_loads_without_a_gpu_and_has_both_devices(build, compiled, tmp_path):
    objects, _ = compiled
    building.run_all([build.link(objects, building.extension_in(tmp_path))])
    building.python_in(tmp_path, "-c", CHECK)


def test_a_toolkit_without_nvcc_is_refused(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="has no bin/nvcc; set it to a CUDA toolkit, or unset it"):
        build.cuda_compilations()


def test_a_gpu_that_nvcc_does_not_know_is_refused(build, monkeypatch):
    monkeypatch.setenv("MINITRON_CUDA_ARCHITECTURES", "90,20")
    with pytest.raises(SystemExit, match="cannot compile for 20; set MINITRON_CUDA_ARCHITECTURES"):
        build.cuda_compilations()


def test_gpus_can_be_chosen(build, monkeypatch):
    monkeypatch.setenv("MINITRON_CUDA_ARCHITECTURES", "90")
    assert build.code_generation() == [
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
