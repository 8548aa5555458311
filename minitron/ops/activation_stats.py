"""Statistics of an activation over its sequence, for every sample and channel, from one read.

The four sums are what all nine aggregations of arXiv:2407.14679 §2.2 (mean, L2 and variance over
the sequence, then over the batch) are made of: the mean of |x|, the L2 norm and the variance over a
sample's sequence follow from them, and whatever is done over samples is done on [b, c].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from minitron.ops.library import define


class ActivationStats(NamedTuple):
    """Over the sequence of every sample; [b, c/group] in fp64."""

    abs_sum: Tensor
    """Σ|x|."""
    square_sum: Tensor
    """Σx²."""
    sum: Tensor
    """Σx."""
    abs_max: Tensor
    """max|x|; 0 for an empty sequence. Kernels pass over NaN, which the sums show."""


def activation_stats(x: Tensor, *, group: int = 1) -> ActivationStats:
    """Sum up an activation over its sequence.

    Args:
        x: [s, b, c].
        group: channels whose L2 norm stands for them, such as a head's; 1 for single channels.

    Raises:
        ValueError: `group` does not divide the channels.
    """
    if x.size(-1) % group:
        raise ValueError(f"group={group} does not divide {x.size(-1)} channels")
    return ActivationStats(*_activation_stats(x.contiguous(), group).unbind(0))


def _reference(x: Tensor, group: int) -> Tensor:
    """The sums [4, b, c/group] of [s, b, c]."""
    if group > 1:
        norms = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, group))
        x = torch.linalg.vector_norm(norms, dim=-1)
    x = x.double()
    magnitude = x.abs()
    largest = magnitude.amax(0) if x.size(0) else x.new_zeros(x.shape[1:])
    return torch.stack([magnitude.sum(0), x.square().sum(0), x.sum(0), largest])


_activation_stats = define(
    "activation_stats(Tensor x, int group) -> Tensor",
    reference=_reference,
    fake=lambda x, group: x.new_empty(4, x.size(1), x.size(2) // group, dtype=torch.float64),
    differentiable=True,
)
