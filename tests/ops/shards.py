"""A vocabulary cut into ranks' shards, and what their results must be like together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

S, B = 5, 3
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize(
    "dtype", LOSS_TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)

Result = tuple[Tensor, Tensor, int]
"""A rank's losses, its gradient, and its columns that stand for a token."""


def shard(logits: Tensor, rank: int, size: int) -> tuple[Tensor, int]:
    """This rank's columns with garbage in the padding, and how many are valid."""
    vocabulary = logits.size(-1)
    width = -(-vocabulary // size) + 13
    padded = logits.new_full((*logits.shape[:-1], width * size), 50.0)
    padded[..., :vocabulary] = logits
    start = rank * width
    return padded[..., start : start + width].clone(), min(max(vocabulary - start, 0), width)


def check(ranks: list[Result], losses: Tensor, grad: Tensor, dtype: torch.dtype) -> None:
    """Compare with fp64: the whole loss on every rank, the gradient in pieces, zero in padding."""
    tolerance = LOSS_TOLERANCE[dtype]
    for found, _, _ in ranks:
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), losses, rtol=tolerance, atol=tolerance)
    joined = torch.cat([part[..., :valid] for _, part, valid in ranks], -1).double()
    tolerance = GRAD_TOLERANCE[dtype]
    scale = grad.abs().amax().clamp(max=1).item()
    torch.testing.assert_close(
        joined, grad, rtol=tolerance, atol=2 * min(tolerance, 1e-5) * max(scale, 1e-3)
    )
    for _, part, valid in ranks:
        assert part[..., valid:].count_nonzero() == 0


def scaled(ranks: list[Result]) -> list[Result]:
    """The same with the gradient of a collective that autograd has summed over its ranks."""
    return [(losses, grad * len(ranks), valid) for losses, grad, valid in ranks]
