"""The one place that knows CPU from CUDA.

megatron-core has no CPU path: it asks `torch.cuda` for the current device, allocates with
`device="cuda"` and recognises dtypes by the names of CUDA tensor types. Where no GPU is present,
importing this module gives megatron-core's modules, and nobody else, a view of `torch` in which
"cuda" means the CPU. `torch` itself stays as it is but for two tensor methods that answer
megatron-core's modules alone, and on a GPU none of this exists.

megatron-core believes in any package called `apex` and falls over a bare `transformer-engine`, so
impostors of both are hidden from it first. For all of this to work, `minitron.platform` must be
imported before `megatron.core`; the packages that use it do so in their `__init__`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

# The factories that megatron-core calls with a device.
_FACTORIES = ("arange", "empty", "empty_like", "eye", "full", "ones", "rand", "tensor", "zeros")


def has_cuda() -> bool:
    """True where a CUDA device can be used."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """This rank's device: the GPU of its local rank, or the CPU."""
    if has_cuda():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def select_device() -> None:
    """Make this rank's GPU the current one."""
    if has_cuda():
        torch.cuda.set_device(device())


def backend() -> str:
    """The communication backend that fits `device`."""
    return "nccl" if has_cuda() else "gloo"


def synchronize() -> None:
    """Wait until the device has done what was asked of it, before reading a clock."""
    if has_cuda():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Most memory that this process's tensors have taken on the device (resident set on a CPU)."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_memory() -> None:
    """Give back what deleted models held: their modules refer to each other in circles.

    Twice, because an optimizer that was loaded is in a circle too, and its views hold the model's
    parameters where Python's collector cannot follow: it finds the model only once that is gone.
    """
    gc.collect()
    gc.collect()
    if has_cuda():
        torch.cuda.empty_cache()
    else:
        _call_glibc("malloc_trim", 0)


def keep_freed_memory() -> None:
    """Keep what is freed for the next step, which asks for the same: on a GPU torch does.

    glibc gives the end of its heap back to the system as soon as a few activations there are free,
    and every page of it costs a fault when it comes again, a tenth of a small step. Blocks of
    32 MiB and more still come and go one by one, so that the peak stays what it is.
    """
    if not has_cuda():
        _call_glibc("mallopt", _M_TRIM_THRESHOLD, 2**31 - 1)
        _call_glibc("mallopt", _M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes


def _call_glibc(name: str, *arguments: int) -> None:
    """Call one of glibc's functions; other C libraries lack these."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)


class HostCopy:
    """A tensor's content in page-locked host memory, copied there and back beside other work.

    On a CPU, host and device are one, and the content stays where it is.

    Args:
        tensor: on the device; it may be let go at once.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._back: torch.Tensor | None = None
        self._host = tensor
        if has_cuda():
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            stream = _copy_stream()
            stream.wait_stream(torch.cuda.current_stream())  # until the tensor is computed
            with torch.cuda.stream(stream):
                self._host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)

    def begin(self) -> None:
        """Start on the way back, so that `fetch` need not wait."""
        if self._back is None and has_cuda():
            with torch.cuda.stream(_copy_stream()):
                self._back = self._host.to(device(), non_blocking=True)
                self._arrived = torch.cuda.current_stream().record_event()

    def fetch(self) -> torch.Tensor:
        """The content on the device; a new tensor each time, on a CPU the one that was given."""
        self.begin()
        tensor, self._back = self._back, None
        if tensor is None:
            return self._host
        current = torch.cuda.current_stream()
        current.wait_event(self._arrived)
        tensor.record_stream(current)
        return tensor


def fetched(content: torch.Tensor | HostCopy) -> torch.Tensor:
    """A tensor on the device, wherever it waited."""
    return content.fetch() if isinstance(content, HostCopy) else content


@functools.cache
def _copy_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@functools.cache
def has_transformer_engine() -> bool:
    """True where NVIDIA Transformer Engine's PyTorch half works on a GPU."""
    return has_cuda() and _imports("transformer_engine.pytorch")


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception as error:  # an incomplete install raises anything, not only ImportError
        logger.debug("%s is not usable: %s", name, error)
        return False
    return True


def _hide_impostors() -> None:
    """Keep megatron-core from packages that bear NVIDIA's names but cannot do their work."""
    for package, proof in (("apex", "amp_C"), ("transformer_engine", "transformer_engine.pytorch")):
        if package in sys.modules or importlib.util.find_spec(package) is None:
            continue
        if not has_cuda() or not _imports(proof):
            logger.info("%s is installed but not usable here; continuing without it", package)
            for name in [n for n in sys.modules if n.split(".")[0] == package]:
                del sys.modules[name]
            sys.modules[package] = None  # type: ignore[assignment]  # makes `import` raise


class _CpuAsCuda(types.ModuleType):
    """Stands for `torch.cuda` inside megatron-core where there is no GPU."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.__dict__.update(
            current_device=lambda: torch.device("cpu"),
            device_count=lambda: 1,
            is_available=lambda: False,
            synchronize=lambda *_, **__: None,
            empty_cache=lambda: None,
            manual_seed=torch.manual_seed,
            get_rng_state=lambda *_, **__: torch.get_rng_state(),
            set_rng_state=lambda state, *_, **__: torch.set_rng_state(state),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchWithoutCuda(types.ModuleType):
    """`torch` as megatron-core's modules see it where there is no GPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__.update(torch.__dict__)
        self.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
        self.__dict__["cuda"] = _CpuAsCuda()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return call


def _called_by_megatron() -> bool:
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _let_megatron_use_cpu() -> None:
    """Import what minitron uses of megatron-core and point its `torch` to the CPU."""
    tensor_type, tensor_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        if isinstance(result, str) and _called_by_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else tensor_cuda(self, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign,assignment]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TE and apex are absent is no news here
        for name in (
            "datasets.indexed_dataset",
            "dist_checkpointing",
            "dist_checkpointing.strategies.torch",
            "dist_checkpointing.strategies.fully_parallel",
            "distributed",
            "models.gpt.gpt_layer_specs",
            "models.gpt.gpt_model",
            "optimizer",
            "pipeline_parallel",
            "tensor_parallel",
        ):
            importlib.import_module(f"megatron.core.{name}")

    view = _TorchWithoutCuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]

    # These two reach into torch._C for the CUDA generators.
    rng = importlib.import_module("megatron.core.tensor_parallel.random")
    rng._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()  # type: ignore[attr-defined]
    rng._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)  # type: ignore[attr-defined]


_hide_impostors()
if not has_cuda():
    _let_megatron_use_cpu()
