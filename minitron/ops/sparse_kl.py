"""Forward KL to a teacher of whom a few tokens of each distribution are known.

A teacher is given as ids and log-probabilities [tokens, k]: the top k of its distribution, or a
sample of it. With w the probabilities, S the ids that are not −1, p the student's probabilities at
τ, and x = s/τ,

    L = Σ_S w (ln w − ln p)                       without a tail
      + q₀ (ln q₀ − ln p₀)                        with a tail bin

where q₀ = 1 − Σ_S w is what the teacher gives to all other tokens together and p₀ what the student
gives them: a KL over |S| + 1 bins, which is at most the whole KL and equals it at k = v. Without
the tail the top k of a teacher are a biased target; a sample whose weights are counts over their
number (arXiv:2503.16870) is an unbiased one. Either way

    ∂L/∂x = (Σ_S w + q₀) p − w on S,    (Σ_S w + q₀) p − q₀ p/p₀ elsewhere

Only the student's logits are swept. A rank keeps, relative to an m near its maximum, the sums of
its columns on S and off S and the cross term Σ w (ln w − x): one all-gather merges them. p₀ is
summed up, never taken as 1 − Σ_S p, which would leave it no digits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.library import define
from minitron.ops.logit_loss import logit_loss
from minitron.ops.objectives import KnownTokens, Logits, Losses, Objective, Saved
from minitron.ops.steps import Steps
from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    accumulation_dtype,
    start_gathering,
    token_chunks,
)

NO_ID = -1
"""Pads a token's list of ids."""

_NUM_STATISTICS = 7
_ROUNDING = 32  # units by which probabilities that sum up to one may seem not to


def sparse_kl(
    student: Tensor,
    ids: Tensor,
    log_probabilities: Tensor,
    *,
    tail: bool,
    valid_columns: int,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    loss_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Forward KL per token from a teacher's known tokens.

    A known token to which the student gives no probability (−inf) and the teacher some makes the
    loss +inf, and so does an impossible tail.

    Args:
        student: [s, b, v/t] raw logits.
        ids: [s, b, k] the teacher's known tokens, ids in the whole vocabulary, each at most once,
            the same on every rank; −1 pads.
        log_probabilities: [s, b, k] the teacher's, at τ, natural; −inf counts nothing. What stands
            beside an id of −1 is not looked at.
        tail: whether the rest of the probability is compared too, as one bin. Probabilities that
            sum up to one within rounding, or to more, leave no tail. Without it they are weights,
            of any sum.
        valid_columns: leading columns of `student` that stand for a token; see `logit_losses`.
        temperature: τ, divides the student's logits.
        temperature_power: the loss is multiplied by this power of τ.
        loss_mask: [s, b]; where it is zero, loss and gradient are zero.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        [s, b] loss in nats, the same on every rank, in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not go together.

    Source: arXiv:2503.16870.
    """
    return logit_loss(
        student,
        KnownTokens(ids, log_probabilities),
        SparseKL(tail),
        valid_columns=valid_columns,
        temperature=temperature,
        temperature_power=temperature_power,
        loss_mask=loss_mask,
        tp_group=tp_group,
    )


@dataclass(frozen=True)
class SparseKL(Objective):
    """The loss of `sparse_kl` as an objective."""

    tail: bool

    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """See `Objective`; what stands for the whole forward KL is the loss itself."""
        ids = logits.known_tokens.ids.long()
        weights = logits.known_tokens.log_probabilities.to(accumulation_dtype(logits.student.dtype))
        weights = torch.where(ids >= 0, weights.exp(), 0)
        options = (logits.valid_columns, logits.offset, logits.temperature)
        statistics = sparse_kl_statistics(
            logits.student, ids, weights, logits.labels, logits.mask, *options
        )
        wait = start_gathering(statistics, logits.tp_group)
        yield
        (kl, cross_entropy), merged = self._merge(wait(), weights, logits)
        return Losses(kl, kl, cross_entropy), (ids, weights, merged)

    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """See `Objective`."""
        ids, probabilities, merged = saved
        options = (logits.valid_columns, logits.offset, logits.temperature)
        rows = (logits.student, ids, probabilities, logits.labels, logits.mask)
        sparse_kl_gradient(*rows, merged, weights, *options, destination)

    def _merge(self, gathered: Tensor, weights: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        """Losses [2, tokens] (KL, cross-entropy) and the merged of all ranks' [t, tokens, 7].

        The merged statistics [tokens, 6] are the maximum, the sums over all columns and over those
        in the tail, the sum at τ = 1, the teacher's probability in all and that in the tail.
        """
        m, off, on, cross, known, unit, label = gathered.unbind(2)
        maximum = m.amax(0)
        shift = (m - maximum) / logits.temperature
        scale = shift.exp()
        off_sum = (off * scale).sum(0)
        total = off_sum + (on * scale).sum(0)
        unit_sum = (unit * (m - maximum).exp()).sum(0)
        mass = weights.sum(1)
        rest = 1 - mass if self.tail else torch.zeros_like(mass)
        rest = torch.where(rest > _ROUNDING * torch.finfo(rest.dtype).eps, rest, 0)

        log_total = total.log()
        kl = (cross - known * shift).sum(0) + mass * log_total
        kl = kl + torch.where(rest > 0, rest * (rest.log() - off_sum.log() + log_total), 0)
        losses = torch.stack([kl, maximum - label.sum(0) + unit_sum.log()])
        if logits.mask is not None:
            losses = torch.where(logits.mask, losses, 0)
        return losses, torch.stack([maximum, total, off_sum, unit_sum, mass + rest, rest], dim=1)


def _statistics(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    valid_columns: int,
    offset: int,
    temperature: float,
) -> Tensor:
    """One rank's m, sums off and on S, Σ w (ln w − x), Σ w, Σ e^(s−m), and s[label]."""
    dtype = accumulation_dtype(student.dtype)
    out = student.new_zeros(student.size(0), _NUM_STATISTICS, dtype=dtype)
    m, off, on, cross, known, unit, label = out.unbind(1)
    for chunk in token_chunks(*student.shape):
        x = _with_spare_column(student[chunk], valid_columns, dtype)
        columns = _columns(ids[chunk], offset, valid_columns)
        w = torch.where(columns < valid_columns, weights[chunk], 0)
        if labels is not None:
            at = _columns(labels[chunk, None], offset, valid_columns)
            label[chunk] = torch.where(at < valid_columns, x.gather(1, at), 0)[:, 0]
        m[chunk] = x.amax(1).clamp(min=NO_COLUMNS)
        x.sub_(m[chunk, None])
        if labels is not None:
            unit[chunk] = x.exp().sum(1)
        x.div_(temperature)
        known_x = x.gather(1, columns)
        x.scatter_(1, columns, -torch.inf)
        off[chunk] = x.exp_().sum(1)
        on[chunk] = known_x.exp().sum(1)
        cross[chunk] = torch.where(w > 0, w * (w.log() - known_x), 0).sum(1)
        known[chunk] = w.sum(1)
    if mask is not None:
        out[~mask] = out.new_tensor([NO_COLUMNS] + [0] * (_NUM_STATISTICS - 1))
    return out


def _gradient(
    student: Tensor,
    ids: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    merged: Tensor,
    upstream: Tensor,
    valid_columns: int,
    offset: int,
    temperature: float,
    destination: Tensor,
) -> None:
    """Write the gradient of Σ upstream · losses [2, tokens]; `destination` may be `student`."""
    maximum, total, off_sum, unit_sum, mass, rest = (c[:, None] for c in merged.unbind(1))
    by_kl, by_cross_entropy = upstream[:, :, None]
    for chunk in token_chunks(*student.shape):
        x = _with_spare_column(student[chunk], valid_columns, merged.dtype).sub_(maximum[chunk])
        columns = _columns(ids[chunk], offset, valid_columns)
        grad = (x / temperature).exp_()
        known = grad.gather(1, columns) * (mass / total)[chunk] - weights[chunk]
        tail = torch.where(off_sum > 0, rest / off_sum, 0)
        grad.mul_((mass / total - tail)[chunk]).scatter_(1, columns, known)
        grad.mul_(by_kl[chunk] / temperature)
        if labels is not None:
            grad.add_(x.exp_().mul_(by_cross_entropy[chunk] / unit_sum[chunk]))
            at = _columns(labels[chunk, None], offset, valid_columns)
            grad.scatter_add_(1, at, -by_cross_entropy[chunk])
        if mask is not None:
            grad[~mask[chunk]] = 0
        destination[chunk, :valid_columns] = grad[:, :valid_columns].to(destination.dtype)
        destination[chunk, valid_columns:] = 0


def _with_spare_column(student: Tensor, valid_columns: int, dtype: torch.dtype) -> Tensor:
    """A copy with one impossible column more, where ids of other ranks may be written."""
    x = student.new_full((student.size(0), valid_columns + 1), -torch.inf, dtype=dtype)
    x[:, :valid_columns] = student[:, :valid_columns]
    return x


def _columns(ids: Tensor, offset: int, valid_columns: int) -> Tensor:
    """Each id's column on this rank; the spare one where it has none."""
    columns = ids - offset
    here = (ids >= 0) & (columns >= 0) & (columns < valid_columns)
    return torch.where(here, columns, valid_columns)


_ROWS = "Tensor student, Tensor ids, Tensor weights, Tensor? labels, Tensor? mask"
_OPTIONS = "int valid_columns, int offset, float temperature"

sparse_kl_statistics = define(
    f"sparse_kl_statistics({_ROWS}, {_OPTIONS}) -> Tensor",
    reference=_statistics,
    fake=lambda student, *_: student.new_empty(
        student.size(0), _NUM_STATISTICS, dtype=accumulation_dtype(student.dtype)
    ),
)
sparse_kl_gradient = define(
    f"sparse_kl_gradient({_ROWS}, Tensor merged, Tensor upstream, {_OPTIONS},"
    " Tensor(a!) destination) -> ()",
    reference=_gradient,
    fake=lambda *_: None,
)
