"""Draws from the distribution that vocabulary-parallel logits stand for, the same on any topology.

The draws are systematic: with one uniform number u a token, the i-th of N is where the cumulative
distribution passes (i + u)/N. A successor of probability p is then drawn ⌊Np⌋ or ⌈Np⌉ times and Np
times in the mean, so that counts/N is an unbiased estimate of the distribution, as it is with N
independent draws (arXiv:2503.16870), but without their scatter.

Ranks share the cumulative distribution as they share the vocabulary. One all-gather tells each
where its part begins; every draw falls to one rank, which looks the successor up among its columns,
and one all-reduce makes all ids known. Sums are kept in fp64: fp32 would misplace draws by what a
hundred thousand roundings add up to.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    gather_statistics,
    start_summing,
    token_chunks,
)


def sample_tokens(
    logits: Tensor,
    uniform: Tensor,
    draws: int,
    *,
    valid_columns: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw successors of each token in proportion to their probability.

    Args:
        logits: [s, b, v/t] raw logits; no gradient.
        uniform: [s, b] fp64 in [0, 1), the same on every rank.
        draws: N, how many a token.
        valid_columns: leading columns that stand for a token.
        temperature: τ, divides the logits.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        Ids in the whole vocabulary [s, b, N], ascending, as often as they were drawn, and the
        distribution's entropy [s, b] in nats; the same on every rank.

    Source: arXiv:2503.16870; Madow, "On the theory of systematic sampling", 1949.
    """
    rank = tp_group.rank() if tp_group is not None else 0
    rows = logits.detach().flatten(0, -2)
    statistics = _statistics(rows, valid_columns, temperature)
    maxima, sums, crosses = gather_statistics(statistics, tp_group).unbind(2)  # [t, tokens]
    shift = maxima - maxima.amax(0)
    scale = shift.exp()
    ends = (sums * scale).cumsum(0)
    total = ends[-1]
    entropy = total.log() - ((crosses + sums * shift) * scale).sum(0) / total

    steps = torch.arange(draws, dtype=total.dtype, device=total.device)
    targets = (steps + uniform.flatten()[:, None]) / draws * total[:, None]  # [tokens, N]
    targets = torch.minimum(targets, _below(total)[:, None])
    mine = (ends[:, :, None] <= targets).sum(0) == rank
    start = ends[rank - 1] if rank else torch.zeros_like(total)
    # A rank whose scale is zero holds nothing that could be drawn.
    within = (targets - start[:, None]) / scale[rank, :, None].clamp(min=1e-300)
    ids = torch.zeros_like(targets, dtype=torch.int64)
    for chunk in token_chunks(*rows.shape) if valid_columns else ():
        y = rows[chunk, :valid_columns].double() / temperature
        cumulative = y.sub_(maxima[rank, chunk, None]).exp_().cumsum(1)
        inside = within[chunk].clamp(min=0).minimum(_below(cumulative[:, -1:]))
        ids[chunk] = torch.searchsorted(cumulative, inside, right=True) + rank * rows.size(1)
    ids = start_summing(ids.mul_(mine), tp_group)()
    return ids.view(*logits.shape[:-1], draws), entropy.view(logits.shape[:-1])


def _statistics(rows: Tensor, valid_columns: int, temperature: float) -> Tensor:
    """One rank's max y, Σ e^(y−max) and Σ e^(y−max) (y−max) of y = logits/τ, [tokens, 3] fp64."""
    out = rows.new_zeros(rows.size(0), 3, dtype=torch.float64)
    maximum, total, cross = out.unbind(1)
    maximum.fill_(NO_COLUMNS)
    for chunk in token_chunks(*rows.shape) if valid_columns else ():
        y = rows[chunk, :valid_columns].double() / temperature
        maximum[chunk] = y.amax(1).clamp(min=NO_COLUMNS)
        y.sub_(maximum[chunk, None])
        weights = y.exp()
        total[chunk] = weights.sum(1)
        cross[chunk] = weights.mul_(y.clamp_(min=NO_COLUMNS)).sum(1)  # 0 where y = −inf
    return out


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))
