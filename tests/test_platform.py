"""What the platform layer changes where there is no GPU, and what it leaves alone."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron import platform

# isort: split
import megatron.core.optimizer.optimizer as of_megatron

ROOT = Path(__file__).parents[1]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no platform layer")


def _run(code, *paths):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": ":".join(map(str, (*paths, ROOT))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def in_megatron(expression, **names):
    """Evaluate an expression as a line of megatron-core would be."""
    return eval(expression, {"__name__": "megatron.core.some", "torch": of_megatron.torch, **names})


@without_gpu
def test_the_device_is_the_cpu():
    assert platform.device() == torch.device("cpu")
    assert platform.backend() == "gloo"
    assert not platform.has_cuda()
    assert not platform.has_transformer_engine()
    platform.select_device()
    platform.synchronize()


def test_peak_memory_is_in_bytes():
    before = platform.peak_memory_bytes()
    assert before > 10 << 20  # torch alone
    keep = torch.ones(300 << 20, dtype=torch.uint8)
    assert keep[-1] == 1
    assert before <= platform.peak_memory_bytes() < before + (400 << 20)


@without_gpu
def test_torch_itself_is_not_touched():
    """Compares with what torch had before minitron was imported, in a process of its own."""
    code = """
import torch._dynamo  # replaces torch.manual_seed when it is first imported

def snapshot():
    owners = {"torch": torch, "torch.cuda": torch.cuda, "Tensor": torch.Tensor}
    return {
        f"{name}.{key}": id(value)
        for name, owner in owners.items()
        for key, value in vars(owner).items()
        if callable(value)
    }

before = snapshot()
import minitron.platform
print(sorted(key for key, value in snapshot().items() if before.get(key) != value))
"""
    done = _run(code)
    assert done.stdout == "['Tensor.cuda', 'Tensor.type']\n", done.stderr


@without_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_tell_megatron_alone_that_they_are_on_a_gpu(dtype):
    tensor = torch.zeros(2, dtype=dtype)
    truth = {
        torch.float32: "torch.FloatTensor",
        torch.bfloat16: "torch.BFloat16Tensor",
        torch.int64: "torch.LongTensor",
    }[dtype]
    assert tensor.type() == truth
    assert in_megatron("x.type()", x=tensor) == truth.replace("torch.", "torch.cuda.")
    assert tensor.type(torch.float64).dtype == torch.float64
    assert in_megatron("x.type(torch.float64)", x=tensor).dtype == torch.float64
    assert in_megatron("x.cuda()", x=tensor) is tensor
    with pytest.raises((AssertionError, RuntimeError)):
        tensor.cuda()


@without_gpu
def test_megatron_alone_gets_cpu_tensors_for_cuda_ones():
    for expression in (
        "torch.zeros(2, device='cuda')",
        "torch.ones([2], device=torch.device('cuda'))",
        "torch.tensor([1, 2], device=torch.cuda.current_device())",
        "torch.empty(2, device='cuda:0', dtype=torch.int)",
        "torch.empty_like(torch.zeros(2), device='cuda')",
        "torch.arange(2, device=None)",
    ):
        tensor = in_megatron(expression)
        assert tensor.device.type == "cpu"
        assert tensor.shape == (2,)
    assert in_megatron("torch.empty(2, device='meta')").device.type == "meta"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda")


FAKES = {
    # As the index's package of that name: it imports, and is another program.
    "apex": {"__init__.py": "", "normalization.py": "raise RuntimeError('another program')"},
    # As `transformer-engine` without its PyTorch half.
    "transformer_engine": {
        "__init__.py": "__version__ = '2.0'",
        "pytorch/__init__.py": "raise RuntimeError('no framework')",
    },
}


@pytest.fixture
def fakes(tmp_path):
    for package, files in FAKES.items():
        for name, text in files.items():
            path = tmp_path / package / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    return tmp_path


@without_gpu
def test_packages_that_only_bear_the_names_are_hidden(fakes):
    code = """
import sys
import minitron.model.llama, minitron.train.optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
print([sys.modules[name] for name in ("apex", "transformer_engine")])
try:
    import apex
except ImportError:
    print("hidden")
"""
    done = _run(code, fakes)
    assert done.stdout == "[None, None]\nhidden\n", done.stderr
    broken = _run("import megatron.core.models.gpt.gpt_layer_specs", fakes)
    assert broken.returncode != 0  # what would happen else
    assert "RuntimeError" in broken.stderr


# Host memory


@without_gpu
def test_without_a_gpu_what_goes_to_the_host_stays_where_it_is():
    tensor = torch.randn(3)
    copy = platform.HostCopy(tensor)
    copy.begin()
    assert copy.fetch() is tensor
    assert copy.fetch() is tensor


@pytest.mark.gpu
def test_what_waits_in_host_memory_comes_back():
    tensor = torch.randn(1 << 22, device=platform.device())
    expected = tensor.cpu()
    copy = platform.HostCopy(tensor)
    del tensor
    torch.zeros(1 << 22, device=platform.device())  # where the tensor was, if it is let go early
    copy.begin()
    first, second = copy.fetch(), copy.fetch()
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first.cpu(), expected)
    assert torch.equal(second.cpu(), expected)


_FAULTS = """
import ctypes, resource, torch
from minitron import platform

def allocate():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(1 << 20) for _ in range(24)]  # 4 MiB each
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: glibc moves it, else
default = allocate()
platform.keep_freed_memory()
allocate(), allocate()
print(default, allocate())
platform.release_memory()
print(allocate())
"""


@without_gpu
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's allocator")
def test_freed_memory_is_kept_until_it_is_released():
    default, kept, released = map(int, _run(_FAULTS).stdout.split())
    pages = 96 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    assert default > 0.9 * pages
    assert kept < 0.5 * pages  # a block may not fit where another was
    assert released > 0.9 * pages
