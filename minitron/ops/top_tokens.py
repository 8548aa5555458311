"""The most probable tokens of vocabulary-parallel logits, over all ranks.

A rank can only guess which of its columns are among the k largest of the whole vocabulary, but no
more than its own k largest are. So every rank puts those forward, with its part of the normaliser,
in one all-gather, and each makes the same choice. Equal logits, which bf16 has many of, go by the
lower id: the choice does not depend on how many ranks made it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    accumulation_dtype,
    gather_statistics,
    token_chunks,
)


def top_tokens(
    logits: Tensor,
    k: int,
    *,
    p: float | None = None,
    valid_columns: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose each token's most probable successors: what `sparse_kl` wants to know of a teacher.

    Args:
        logits: [s, b, v/t] raw logits; no gradient.
        k: how many at most; all if there are fewer.
        p: keep no more than the fewest that together have this probability.
        valid_columns: leading columns that stand for a token.
        temperature: τ, divides the logits.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        Ids in the whole vocabulary and log-probabilities at τ over the whole vocabulary, both
        [s, b, k'], most probable first, the same on every rank. An id of −1 (log-probability −inf)
        stands where a token has no more successors that are possible or needed.
    """
    rank = tp_group.rank() if tp_group is not None else 0
    options = (valid_columns, rank * logits.size(-1), temperature)
    gathered = gather_statistics(candidates(logits.flatten(0, -2), k, *options), tp_group)
    ids, log_probabilities = choose(gathered, k, p, temperature)
    return ids.view(*logits.shape[:-1], -1), log_probabilities.view(*logits.shape[:-1], -1)


def candidates(rows: Tensor, k: int, valid_columns: int, offset: int, temperature: float) -> Tensor:
    """What one rank puts forward, [tokens, 2 + 2k]: maximum, Σ e^(y−max), logits, ids.

    Ids are exact in fp32 below 2²⁴.
    """
    dtype = accumulation_dtype(rows.dtype)
    k = min(k, rows.size(1))
    out = rows.new_zeros(rows.size(0), 2 + 2 * k, dtype=dtype)
    maximum, total = out[:, 0], out[:, 1]
    values, ids = out[:, 2 : 2 + k], out[:, 2 + k :]
    maximum.fill_(NO_COLUMNS)
    values.fill_(-torch.inf)
    ids.fill_(-1)
    few = min(k, valid_columns)
    if few:
        for chunk in token_chunks(*rows.shape):
            y = rows[chunk, :valid_columns].to(dtype)
            columns = _largest(y, few)
            values[chunk, :few] = y.gather(1, columns)
            ids[chunk, :few] = (columns + offset).to(dtype)
            maximum[chunk] = y.amax(1).clamp(min=NO_COLUMNS)
            total[chunk] = ((y - maximum[chunk, None]) / temperature).exp_().sum(1)
    return out


def choose(gathered: Tensor, k: int, p: float | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [tokens, k'] from all ranks' candidates [t, tokens, 2 + 2k]."""
    maxima, totals = gathered[..., 0], gathered[..., 1]
    put_forward = gathered[..., 2:].unflatten(2, (2, -1))  # [t, tokens, 2, k]
    values, ids = put_forward.permute(2, 1, 0, 3).flatten(2)  # [tokens, t k], ids ascending
    maximum = maxima.amax(0)
    log_sum = (totals * ((maxima - maximum) / temperature).exp()).sum(0).log()

    columns = _largest(values, min(k, values.size(1)))
    values, ids = values.gather(1, columns), ids.gather(1, columns)
    values, order = values.sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order).long()
    log_probabilities = (values - maximum[:, None]) / temperature - log_sum[:, None]
    needless = values == -torch.inf
    if p is not None:
        probabilities = log_probabilities.exp()
        needless |= probabilities.cumsum(1) - probabilities >= p
    return ids.masked_fill(needless, -1), log_probabilities.masked_fill(needless, -torch.inf)


def _largest(x: Tensor, k: int) -> Tensor:
    """Columns [rows, k] of each row's k largest, ascending; of equal ones the first."""
    if k == x.size(1):
        return torch.arange(k, device=x.device).expand(x.size(0), -1)
    least = x.topk(k, dim=1).values[:, -1:]
    larger, equal = x > least, x == least
    keep = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
    return keep.nonzero()[:, 1].view(x.size(0), k)
