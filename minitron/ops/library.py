"""Registers the package's tensor ops with torch; the extension, where built, runs them.

Each op's file states the op once: schema, PyTorch reference, shapes, gradient. The reference serves
every device and dtype for which the extension `minitron._C` has no kernel, and all of them where
that is missing or does not load, of which one warning tells. An op is given process groups by name,
as torch's functional collectives are, so that torch.compile takes it as it is.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("minitron", "DEF")


def _load() -> tuple[tuple[str, ...], str]:
    """The devices that the extension has kernels for; without it none, and what is wrong."""
    if importlib.util.find_spec("minitron._C") is None:
        return (), "is not built"
    try:
        return importlib.import_module("minitron._C").build_information()["devices"], ""
    except ImportError as error:  # as where it was built for another torch
        return (), f"does not load ({' '.join(str(error).split())})"


kernel_devices, _lack = _load()
extension_built = not _lack
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_noticed = False
_logger = logging.getLogger("minitron")  # that of minitron.metrics, without what that imports


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: bool = False,
) -> Callable[..., Any]:
    """Register an op that has, or may have, kernels.

    Args:
        schema: torch's, without the namespace.
        reference: what the op computes, in PyTorch.
        fake: what it returns, in shapes alone.
        differentiable: whether it has a gradient: that of the reference, computed anew. Other ops
            serve inside those of `compose`, below autograd.

    Returns:
        A function with the op's signature that takes the kernel where there is one for the dtype of
        its first argument, and the reference elsewhere.
    """

    def without_kernel(first: torch.Tensor, *args: Any) -> Any:
        _notice(first.device.type)
        return reference(first, *args)

    op = _register(schema, without_kernel, fake)
    if differentiable:
        _differentiate(op, reference)

    def call(first: torch.Tensor, *args: Any) -> Any:
        return (op if first.dtype in _KERNEL_DTYPES else reference)(first, *args)

    return call


def compose(
    schema: str,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """Register a differentiable op that is made of other ops, and possibly of collectives.

    Args:
        schema: torch's, without the namespace.
        forward: the op.
        fake: what it returns, in shapes alone; the op itself will do, at the price of a graph for
            every number of tokens where it loops over them.
        setup_context: as in `torch.library.register_autograd`.
        backward: as there.
    """
    op = _register(schema, forward, fake)
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_library)
    return op


def only_once(ctx: Any, reason: str) -> None:
    """Refuse a second backward pass, where the first one writes over what is saved.

    torch notices that by itself only as long as no hooks of saved tensors stand between, as those
    of checkpointing do.
    """
    if hasattr(ctx, "went_backward"):
        raise RuntimeError(f"backward through this loss a second time: {reason}; compute it again")
    ctx.went_backward = True


def _register(
    schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minitron::{name}", fake, lib=_library)
    return getattr(torch.ops.minitron, name).default


def _differentiate(op: torch._ops.OpOverload, reference: Callable[..., Any]) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = tuple(i for i in inputs if not isinstance(i, torch.Tensor))  # tensors first
        ctx.save_for_backward(*inputs[: len(inputs) - len(ctx.options)])

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            output = reference(*inputs, *ctx.options)
        return *torch.autograd.grad(output, inputs, grad), *[None] * len(ctx.options)

    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_library)


def _notice(device: str) -> None:
    global _noticed
    if _noticed or device in kernel_devices:
        return
    _noticed = True
    _logger.warning(
        "minitron._C was built without CUDA: on a GPU, ops run in PyTorch (set CUDA_HOME)"
        if kernel_devices
        else f"minitron._C {_lack}: ops run in PyTorch (`make setup` builds it)"
    )
