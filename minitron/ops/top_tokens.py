"""The most probable tokens of vocabulary-parallel logits over all ranks, and the KL over them.

A rank can only guess which of its columns are among the k largest of the whole vocabulary, but no
more than its own k largest are. So every rank puts those forward, with its part of the normaliser,
in one all-gather, and each makes the same choice. Equal logits, which bf16 has many of, go by the
lower id: the choice does not depend on how many ranks made it.

`TopKL` is the forward KL over a teacher's most probable tokens and one bin for all others, which
`minitron.ops.sparse_kl` computes. Unlike a softmax over the chosen alone, the bin makes the student
give them the teacher's share and not all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.library import define
from minitron.ops.objectives import (
    KnownTokens,
    Logits,
    Losses,
    Objective,
    Saved,
    kl_losses,
)
from minitron.ops.sparse_kl import SparseKL
from minitron.ops.steps import Steps
from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    accumulation_dtype,
    first_column,
    first_largest,
    gather_statistics,
    start_gathering,
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
    options = (valid_columns, first_column(logits, tp_group), temperature)
    put_forward = candidates(logits.detach().flatten(0, -2), None, k, *options)
    gathered = gather_statistics(put_forward, tp_group)
    ids, log_probabilities = choose(gathered, k, p, temperature, ordered=True)
    return ids.view(*logits.shape[:-1], -1), log_probabilities.view(*logits.shape[:-1], -1)


@dataclass(frozen=True)
class TopKL(Objective):
    """Forward KL over the teacher's k most probable tokens and a tail bin, as an objective."""

    k: int
    p: float | None = None
    """Take no more tokens than together have this probability."""

    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """See `Objective`."""
        put_forward = candidates(
            logits.teacher_logits,
            logits.mask,
            self.k,
            logits.valid_columns,
            logits.offset,
            logits.temperature,
        )
        if logits.forward_kl:
            unlabelled = dataclasses.replace(logits, labels=None)  # SparseKL has their loss
            whole, _, gathered = yield from kl_losses(unlabelled, extra=put_forward)
        else:
            wait = start_gathering(put_forward, logits.tp_group)
            yield
            gathered = wait()
        known = KnownTokens(*choose(gathered, self.k, self.p, logits.temperature))
        losses, saved = yield from SparseKL(tail=True).losses(
            dataclasses.replace(logits, teacher=known)
        )
        return losses._replace(forward_kl=whole[0]) if logits.forward_kl else losses, saved

    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """See `Objective`."""
        SparseKL(tail=True).gradient(logits, saved, weights, destination)


def top1_agreement(logits: Logits) -> Steps[Tensor]:
    """Where [tokens] student and teacher find the same token most probable: 1, else 0."""
    whole = [logits.student]
    if isinstance(logits.teacher, Tensor):
        whole.append(logits.teacher)
    options = (logits.mask, 1, logits.valid_columns, logits.offset, 1.0)
    found = [candidates(rows, *options)[:, 2:] for rows in whole]  # logit and id
    wait = start_gathering(torch.cat(found, 1), logits.tp_group)
    yield
    first = [first_largest(x) for x in wait().split(2, dim=2)]
    if not isinstance(logits.teacher, Tensor):
        most = logits.teacher.log_probabilities.argmax(1, keepdim=True)
        first.append(logits.teacher.ids.gather(1, most)[:, 0])
    agrees = (first[0] == first[1]).to(accumulation_dtype(logits.student.dtype))
    return agrees if logits.mask is None else torch.where(logits.mask, agrees, 0)


def rows_of_positions(chunk: slice, tokens: Tensor, stride: int) -> Tensor | slice:
    """Which of a chunk's rows are at every `stride`th position of [s, b] tokens.

    They are counted on the CPU, which need not wait for the device.
    """
    if stride == 1:
        return slice(None)
    positions = torch.arange(*chunk.indices(tokens.numel())) // tokens.size(1)
    rows = (positions % stride == 0).nonzero()[:, 0]
    return rows.to(tokens.device, non_blocking=True)


def _candidates(
    rows: Tensor, mask: Tensor | None, k: int, valid_columns: int, offset: int, temperature: float
) -> Tensor:
    """What one rank puts forward, [tokens, 2 + 2k]: maximum, Σ e^(y−max), logits, ids.

    Ids ascend; they are exact in fp32 below 2²⁴.
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
    if mask is not None:
        out[~mask] = out.new_tensor([NO_COLUMNS, 0] + [-torch.inf] * k + [-1] * k)
    return out


def choose(
    gathered: Tensor, k: int, p: float | None, temperature: float, *, ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities [tokens, k'] from all ranks' candidates [t, tokens, 2 + 2k].

    They go by probability if that is asked for or `p` needs it, else by id.
    """
    maxima, totals = gathered[..., 0], gathered[..., 1]
    put_forward = gathered[..., 2:].unflatten(2, (2, -1))  # [t, tokens, 2, k]
    values, ids = put_forward.permute(2, 1, 0, 3).flatten(2)  # [tokens, t k], ids ascending
    maximum = maxima.amax(0)
    log_sum = (totals * ((maxima - maximum) / temperature).exp()).sum(0).log()

    if k < values.size(1):
        columns = _largest(values, k)
        values, ids = values.gather(1, columns), ids.gather(1, columns)
    if ordered or p is not None:
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
    log_probabilities = (values - maximum[:, None]) / temperature - log_sum[:, None]
    needless = values == -torch.inf
    if p is not None:
        probabilities = log_probabilities.exp()
        needless |= probabilities.cumsum(1) - probabilities >= p
    ids = ids.long().masked_fill(needless, -1)
    return ids, log_probabilities.masked_fill(needless, -torch.inf)


def _largest(x: Tensor, k: int) -> Tensor:
    """Columns [rows, k] of each row's k largest, ascending; of equal ones the first."""
    if k == x.size(1):
        return torch.arange(k, device=x.device).expand(x.size(0), -1)
    x = x.nan_to_num(torch.inf, torch.inf, -torch.inf)  # not to be chosen around
    least = x.topk(k, dim=1).values[:, -1:]
    larger, equal = x > least, x == least
    keep = larger | (equal & (equal.cumsum(1) <= k - larger.sum(1, keepdim=True)))
    wanted = torch.arange(1, k + 1, device=x.device).expand(x.size(0), -1).contiguous()
    return torch.searchsorted(keep.cumsum(1), wanted)  # nonzero() would wait for the device


candidates = define(
    "top_candidates(Tensor rows, Tensor? mask, int k, int valid_columns, int offset,"
    " float temperature) -> Tensor",
    reference=_candidates,
    fake=lambda rows, mask, k, *_: rows.new_empty(
        rows.size(0), 2 + 2 * min(k, rows.size(1)), dtype=accumulation_dtype(rows.dtype)
    ),
)
