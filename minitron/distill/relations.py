"""Attention relations: what heads of any width have in common with one another.

The relation of a head's queries is softmax(Q Qᵀ / √d): for every token a distribution over the
tokens up to itself. Keys and values have theirs. A student is to have the teacher's, whatever the
dimension of its heads; their number must be the teacher's.

Source: arXiv:2012.15828 §3.1 (MiniLMv2), with a causal mask, as a decoder's tokens see no later
ones; its relation heads are the attention heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Rows of the [s, s] relations that exist at a time, in forward and, recomputed, in backward.
_ROWS = 256


def relation_loss(student: Tensor, teacher: Tensor, heads: int, groups: int) -> Tensor:
    """KL(teacher || student) between the relations of queries, of keys and of values.

    Args:
        student: [s, b, (heads + 2·groups)·d], query, key and value one after another.
        teacher: the same with another d; no gradient.
        heads: query heads.
        groups: key/value heads.

    Returns:
        [s, b] in fp32 (fp64 for fp64 states): the sum of the three, each the mean over its heads.
    """
    split = [heads, groups, groups]
    total = torch.zeros((), device=student.device)
    for ours, theirs in zip(
        student.unflatten(-1, (sum(split), -1)).split(split, 2),
        teacher.unflatten(-1, (sum(split), -1)).split(split, 2),
        strict=True,
    ):
        rows = [
            checkpoint(
                _relation_rows,
                ours[:stop],
                theirs[:stop],
                start,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            for start in range(0, ours.size(0), _ROWS)
            for stop in [min(start + _ROWS, ours.size(0))]
        ]
        total = total + torch.cat(rows)
    return total


def _relation_rows(student: Tensor, teacher: Tensor, start: int) -> Tensor:
    """Tokens `start` to the last of [s, b, heads, d]: the KL of their relations, [rows, b]."""
    ours, theirs = (_log_relation(x, start) for x in (student, teacher))
    kl = F.kl_div(ours, theirs, reduction="none", log_target=True)  # [b, heads, rows, s]
    return kl.sum(-1).mean(1).t()


def _log_relation(x: Tensor, start: int) -> Tensor:
    """Log relation [b, heads, rows, s] of [s, b, heads, d]; 0 where a token sees nothing."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).permute(1, 2, 0, 3)  # [b, heads, s, d]
    scores = x[:, :, start:] @ x.transpose(2, 3) / math.sqrt(x.size(-1))
    future = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(start + 1)
    return scores.masked_fill(future, -math.inf).log_softmax(-1).masked_fill(future, 0.0)
