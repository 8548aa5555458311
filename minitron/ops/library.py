"""Registers the package's tensor ops with torch; the extension, where built, runs them.

Each op's file states the op once: schema, PyTorch reference, shapes. The reference serves every
device and dtype for which the extension `minitron._C` has no kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from minitron.metrics import log

_library = torch.library.Library("minitron", "DEF")
extension_built = importlib.util.find_spec("minitron._C") is not None
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)
_noticed = False


def define(
    schema: str, *, reference: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register an op.

    Args:
        schema: torch's, without the namespace.
        reference: what the op computes, in PyTorch.
        fake: what it returns, in shapes alone.

    Returns:
        A function with the op's signature that takes the kernel where there is one for the dtype of
        its first argument, and the reference elsewhere.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"minitron::{name}", fake, lib=_library)
    op = getattr(torch.ops.minitron, name)

    def call(first: torch.Tensor, *args: Any) -> Any:
        if first.dtype not in _KERNEL_DTYPES:
            return reference(first, *args)
        _notice()
        return op(first, *args)

    return call


def _notice() -> None:
    global _noticed
    if not (extension_built or _noticed):
        log("minitron._C is not built: ops run in PyTorch (`make setup` builds it)")
    _noticed = True


if extension_built:
    importlib.import_module("minitron._C")
