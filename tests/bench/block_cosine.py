"""Cosine of a layer's input and output for every token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron.ops.block_cosine import block_cosine
from tests.bench.runner import Case, compile_alone

SHAPES = {"cpu": (4096, 1, 4096), "cuda": (8192, 4, 4096)}


def eager(before: Tensor, after: Tensor) -> Tensor:
    """In fp32, as score hooks are usually written."""
    return torch.cosine_similarity(before.float(), after.float(), dim=-1)


def cases(device: str) -> Iterator[Case]:
    """Both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        before, after = torch.randn(2, *SHAPES[device], device=device).to(dtype)
        yield _case(before, after)


def _case(before: Tensor, after: Tensor) -> Case:
    compiled = compile_alone(eager)
    return Case(
        op="block_cosine",
        shape=str(list(before.shape)),
        dtype=str(before.dtype).removeprefix("torch."),
        variants={
            "eager": lambda: eager(before, after),
            "torch.compile": lambda: compiled(before, after),
            "one read": lambda: block_cosine(before, after),
        },
        floor_bytes=dict.fromkeys(("eager", "torch.compile", "one read"), 2 * before.nbytes),
    )
