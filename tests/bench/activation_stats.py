"""Σ|x|, Σx², Σx and max|x| over the sequence, for every sample and channel.

`eager` takes them one after the other, as score hooks are usually written; "one statistic" is the
mean of |x| alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from minitron.ops.activation_stats import activation_stats
from tests.bench.runner import COPY, Case, compile_alone

SHAPES = {"cpu": (4096, 1, 4096), "cuda": (8192, 4, 4096)}
TARGETS = {
    "cpu": {"eager": 9.0, "torch.compile": 3.0, "one statistic": 3.0},
    "cuda": {"eager": 8.0, "torch.compile": 1.5, COPY: 0.75},
}


def eager(x: Tensor) -> tuple[Tensor, ...]:
    """Four statistics in fp32."""
    magnitude = x.float().abs()
    return magnitude.sum(0), x.float().square().sum(0), x.float().sum(0), magnitude.amax(0)


def cases(device: str) -> Iterator[Case]:
    """Both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _case(torch.randn(SHAPES[device], device=device).to(dtype))


def _case(x: Tensor) -> Case:
    compiled = compile_alone(eager)
    return Case(
        op="activation_stats",
        shape=str(list(x.shape)),
        dtype=str(x.dtype).removeprefix("torch."),
        variants={
            "eager": lambda: eager(x),
            "torch.compile": lambda: compiled(x),
            "one statistic": lambda: x.float().abs().mean(0),
            "one read": lambda: activation_stats(x),
        },
        floor_bytes=dict.fromkeys(
            ("eager", "torch.compile", "one statistic", "one read"), x.nbytes
        ),
        targets={"one read": TARGETS[x.device.type]},
    )
