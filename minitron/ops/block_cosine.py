"""Cosine similarity of what enters and what leaves a layer, from one read of both.

Block influence is one minus its mean over tokens: arXiv:2408.11796 §2.2, arXiv:2403.03853.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.ops.library import define

_SMALLEST_NORM = 1e-8  # of torch.nn.functional.cosine_similarity


def block_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine similarity per token.

    Args:
        before: [s, b, h].
        after: [s, b, h].

    Returns:
        [s, b] in fp32 (fp64 for fp64 activations), on the device, without waiting for it.

    Raises:
        ValueError: the two differ in shape or dtype.
    """
    if before.shape != after.shape or before.dtype != after.dtype:
        raise ValueError(
            f"{list(before.shape)} of {before.dtype} before the layer and {list(after.shape)} of "
            f"{after.dtype} after it cannot be compared"
        )
    return _block_cosine(before.contiguous(), after.contiguous())


def _reference(before: Tensor, after: Tensor) -> Tensor:
    dtype = torch.promote_types(before.dtype, torch.float32)
    return torch.cosine_similarity(before.to(dtype), after.to(dtype), dim=-1, eps=_SMALLEST_NORM)


_block_cosine = define(
    "block_cosine(Tensor before, Tensor after) -> Tensor",
    reference=_reference,
    fake=lambda before, _: before.new_empty(
        before.shape[:2], dtype=torch.promote_types(before.dtype, torch.float32)
    ),
    differentiable=True,
)
