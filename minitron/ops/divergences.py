"""Divergences that mix both distributions: Jensen-Shannon, skewed KL, total variation.

With p the student's probabilities and q the teacher's, at τ, such a loss is a sum L = Σ f(p, q)
whose terms need the normalised p and q of a column together, inside a logarithm or an absolute
value. A sum over columns that could be corrected by the normalisers afterwards, as those of
`minitron.ops.logit_kl` can, does not exist: one sweep is not enough. The first sweep yields the
normalisers (and forward KL and cross-entropy along with them), the second

    L = Σ f    and    G = Σ p ∂f/∂p

which ranks add up in a second collective; the gradient is then local, by a column's logit

    ∂L/∂s = (p ∂f/∂p − p G)/τ

    JSD(β)             f = β q ln(q/m) + (1−β) p ln(p/m),   m = β q + (1−β) p
    skew KL(α)         f = q ln(q/m),                       m = α q + (1−α) p
    skew reverse KL(α) f = p ln(p/m),                       m = (1−α) q + α p
    TVD                f = |p − q|/2

Sources: JSD(β) is that of arXiv:2306.13649: over β it tends to the forward KL as β → 0, over 1−β to
the reverse KL as β → 1, and β = ½ is the usual one. The skewed ones are those of arXiv:2402.03898
and are the forward and the reverse KL at α = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minitron.ops.library import define
from minitron.ops.objectives import (
    Logits,
    Losses,
    Objective,
    Saved,
    add_cross_entropy_gradient,
    kl_losses,
)
from minitron.ops.steps import Steps
from minitron.ops.vocab_parallel import start_summing, token_chunks

Kind = Literal["jsd", "skew_kl", "skew_reverse_kl", "tvd"]


@dataclass(frozen=True)
class Divergence(Objective):
    """One of the above, in nats (TVD: in probability)."""

    kind: Kind
    parameter: float = 0.0
    """β of JSD or α of the skewed ones, between 0 and 1; TVD has none."""

    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """See `Objective`."""
        losses, merged = yield from kl_losses(logits)
        sums = divergence_sums(
            logits.student,
            logits.teacher_logits,
            logits.mask,
            merged,
            self.kind,
            self.parameter,
            logits.valid_columns,
            logits.temperature,
        )
        wait = start_summing(sums, logits.tp_group)
        yield
        divergence, mean_slope = wait().unbind(0)
        return Losses(divergence, losses[0], losses[2]), (merged, mean_slope)

    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """See `Objective`."""
        divergence_gradient(
            logits.student,
            logits.teacher_logits,
            logits.labels,
            logits.mask,
            *saved,
            weights,
            self.kind,
            self.parameter,
            logits.valid_columns,
            logits.offset,
            logits.temperature,
            destination,
        )


def _sums(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    merged: Tensor,
    kind: Kind,
    parameter: float,
    valid_columns: int,
    temperature: float,
) -> Tensor:
    """One rank's Σ f and Σ p ∂f/∂p, [2, tokens]; `merged` has `minitron.ops.logit_kl`'s columns."""
    out = merged.new_zeros(2, merged.size(0))
    for chunk in token_chunks(*student.shape):
        p = _probabilities(student[chunk, :valid_columns], merged[chunk], 0, temperature)
        q = _probabilities(teacher[chunk, :valid_columns], merged[chunk], 1, temperature)
        terms, slopes = _pointwise(p, q, kind, parameter)
        out[0, chunk], out[1, chunk] = terms.sum(1), slopes.sum(1)
    out.masked_fill_(merged[:, 2:4].sum(1).isnan(), torch.nan)  # a logit is, which f may not show
    if mask is not None:
        out[:, ~mask] = 0
    return out


def _gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    merged: Tensor,
    mean_slope: Tensor,
    weights: Tensor,
    kind: Kind,
    parameter: float,
    valid_columns: int,
    offset: int,
    temperature: float,
    destination: Tensor,
) -> None:
    """Write the gradient of divergence and cross-entropy; `destination` may be the logits."""
    for chunk in token_chunks(*student.shape):
        s = student[chunk, :valid_columns].to(merged.dtype)
        p = _probabilities(s, merged[chunk], 0, temperature)
        q = _probabilities(teacher[chunk, :valid_columns], merged[chunk], 1, temperature)
        _, grad = _pointwise(p, q, kind, parameter)
        grad = (grad - p * mean_slope[chunk, None]) * (weights[0, chunk, None] / temperature)
        if labels is not None:
            add_cross_entropy_gradient(
                grad, s, labels[chunk], offset, merged[chunk], weights[1, chunk]
            )
        if mask is not None:
            grad[~mask[chunk]] = 0
        destination[chunk, :valid_columns] = grad.to(destination.dtype)
        destination[chunk, valid_columns:] = 0


def _probabilities(logits: Tensor, merged: Tensor, side: int, temperature: float) -> Tensor:
    """Of the student (side 0) or the teacher (1)."""
    maximum, total = merged[:, side, None], merged[:, 2 + side, None]
    return ((logits.to(merged.dtype) - maximum) / temperature).exp_().div_(total)


def _pointwise(p: Tensor, q: Tensor, kind: Kind, parameter: float) -> tuple[Tensor, Tensor]:
    """f and p ∂f/∂p; nothing where a probability is zero that f multiplies."""
    if kind == "tvd":
        return (p - q).abs() / 2, p * (p - q).sign() / 2
    share = 1 - parameter if kind == "skew_reverse_kl" else parameter
    mixture = share * q + (1 - share) * p
    negligible = 1e8 * torch.finfo(p.dtype).tiny  # a part of it in a mixture is no denormal

    def information(x: Tensor) -> Tensor:
        return torch.where(x > negligible, x * (x / mixture).log(), 0)

    if kind == "jsd":
        by_student = (1 - share) * information(p)
        return share * information(q) + by_student, by_student
    both = torch.where(mixture > negligible, p * (q / mixture), 0)
    if kind == "skew_kl":
        return information(q), (share - 1) * both
    return information(p), information(p) + share * both


_LOGITS = "Tensor student, Tensor teacher"

divergence_sums = define(
    f"divergence_sums({_LOGITS}, Tensor? mask, Tensor merged, str kind, float parameter,"
    " int valid_columns, float temperature) -> Tensor",
    reference=_sums,
    fake=lambda student, teacher, mask, merged, *_: merged.new_empty(2, merged.size(0)),
)
divergence_gradient = define(
    f"divergence_gradient({_LOGITS}, Tensor? labels, Tensor? mask, Tensor merged,"
    " Tensor mean_slope, Tensor weights, str kind, float parameter, int valid_columns,"
    " int offset, float temperature, Tensor(a!) destination) -> ()",
    reference=_gradient,
    fake=lambda *_: None,
)
