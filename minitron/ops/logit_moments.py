"""Distances between logits themselves: mean squared error and cosine.

A constant added to all of a token's logits changes no distribution, and students, pruned or not,
need not share their teacher's. So both losses compare logits less their mean over the vocabulary,
s′ and t′, which makes them functions of the two distributions, as all other objectives are:

    MSE     L = Σ (s′ − t′)²/(n τ²)          cosine     L = 1 − Σ s′t′/(‖s′‖ ‖t′‖)

over the n columns that stand for a token and where neither logit is −inf: there is no distance to
impossible. This MSE is what 2 τ² KL tends to for large τ (arXiv:1503.02531 §2.1), divided by τ²;
this cosine is the logits' correlation and does not know τ.

One sweep yields n, both means, and Σ s′², Σ t′² and Σ (s′ − t′)², all about the rank's own means;
one collective merges them. The difference has a sum of its own because it cannot be had from the
others where student and teacher are close. The gradient is a linear combination of s′ and t′.
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
from minitron.ops.vocab_parallel import (
    accumulation_dtype,
    start_gathering,
    token_chunks,
)

_NUM_MOMENTS = 6


@dataclass(frozen=True)
class LogitDistance(Objective):
    """One of the two."""

    kind: Literal["mse", "cosine"]

    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """See `Objective`."""
        moments = logit_moments(
            logits.student, logits.teacher_logits, logits.mask, logits.valid_columns
        )
        if logits.forward_kl or logits.labels is not None:
            losses, normalizers, gathered = yield from kl_losses(logits, extra=moments)
        else:
            wait = start_gathering(moments, logits.tp_group)
            yield
            gathered = wait()
            losses, normalizers = gathered.new_zeros(4, moments.size(0)), gathered.new_empty(0)
        merged = merge_moments(gathered)
        distance, _, _ = self._distance(merged, logits.temperature)
        if logits.mask is not None:
            distance = torch.where(logits.mask, distance, 0)
        return Losses(distance, losses[0], losses[2]), (normalizers, merged)

    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """See `Objective`."""
        normalizers, merged = saved
        _, by_student, by_teacher = self._distance(merged, logits.temperature)
        logit_moments_gradient(
            logits.student,
            logits.teacher_logits,
            logits.labels,
            logits.mask,
            normalizers,
            torch.stack(
                [merged[:, 1], merged[:, 2], by_student * weights[0], by_teacher * weights[0]], 1
            ),
            weights[1],
            logits.valid_columns,
            logits.offset,
            destination,
        )

    def _distance(self, merged: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss [tokens], and what its gradient multiplies s′ and t′ by."""
        n, _, _, student, teacher, difference = merged.unbind(1)
        if self.kind == "mse":
            slope = 2 / (n.clamp(min=1) * temperature**2)
            return slope * difference / 2, slope, -slope
        s, t = student.sqrt(), teacher.sqrt()
        constant = (student == 0) | (teacher == 0)  # logits without a direction: nothing to learn
        s, t = s.masked_fill(constant, 1), t.masked_fill(constant, 1)
        loss = (difference - (s - t).square()) / (2 * s * t)  # 1 − cos, not lost where it is small
        loss = torch.where(constant, 1, loss)
        slope = torch.where(constant, 0, 1 / (s * t))
        return loss, torch.where(constant, 0, (1 - loss) / s.square()), -slope


def merge_moments(gathered: Tensor) -> Tensor:
    """The moments [tokens, 6] of all ranks' columns from each rank's, [t, tokens, 6]."""
    n, student_mean, teacher_mean, student, teacher, difference = gathered.unbind(2)
    count = n.sum(0)
    share = n / count.clamp(min=1)
    means = torch.stack([student_mean, teacher_mean])  # [2, t, tokens]
    reference = means[:, :1]  # offsets cost no digits
    mean = (share * (means - reference)).sum(1, keepdim=True) + reference
    by_student, by_teacher = means - mean
    return torch.stack(
        [
            count,
            *mean[:, 0],
            (student + n * by_student.square()).sum(0),
            (teacher + n * by_teacher.square()).sum(0),
            (difference + n * (by_student - by_teacher).square()).sum(0),
        ],
        dim=1,
    )


def _moments(student: Tensor, teacher: Tensor, mask: Tensor | None, valid_columns: int) -> Tensor:
    """One rank's n, mean s, mean t, Σ s′², Σ t′², Σ (s′ − t′)², [tokens, 6]."""
    dtype = accumulation_dtype(student.dtype)
    out = student.new_zeros(student.size(0), _NUM_MOMENTS, dtype=dtype)
    for chunk in token_chunks(*student.shape):
        s = student[chunk, :valid_columns].to(dtype, copy=True)
        t = teacher[chunk, :valid_columns].to(dtype, copy=True)
        counts = _finite(s, t)
        n = counts.sum(1)
        means = []
        for x in (s, t):  # twice, so that large offsets cost no digits
            x.masked_fill_(~counts, 0)
            mean = x.new_zeros(x.size(0))
            for _ in range(2):
                shift = x.sum(1) / n.clamp(min=1)
                x.sub_(shift[:, None]).masked_fill_(~counts, 0)
                mean += shift
            means.append(mean)
        sums = [s.square().sum(1), t.square().sum(1), (s - t).square().sum(1)]
        out[chunk] = torch.stack([n.to(dtype), *means, *sums], 1)
    if mask is not None:
        out[~mask] = 0
    return out


def _gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    normalizers: Tensor,
    coefficients: Tensor,
    by_cross_entropy: Tensor,
    valid_columns: int,
    offset: int,
    destination: Tensor,
) -> None:
    """Write the gradient; `coefficients` [tokens, 4] are both means and what s′ and t′ count."""
    student_mean, teacher_mean, by_student, by_teacher = coefficients[:, :, None].unbind(1)
    for chunk in token_chunks(*student.shape):
        s = student[chunk, :valid_columns].to(coefficients.dtype)
        t = teacher[chunk, :valid_columns].to(coefficients.dtype)
        grad = by_student[chunk] * (s - student_mean[chunk])
        grad += by_teacher[chunk] * (t - teacher_mean[chunk])
        grad.masked_fill_(~_finite(s, t), 0)
        if labels is not None:
            add_cross_entropy_gradient(
                grad, s, labels[chunk], offset, normalizers[chunk], by_cross_entropy[chunk]
            )
        if mask is not None:
            grad[~mask[chunk]] = 0
        destination[chunk, :valid_columns] = grad.to(destination.dtype)
        destination[chunk, valid_columns:] = 0


def _finite(s: Tensor, t: Tensor) -> Tensor:
    """Where both logits count; a NaN does, to be seen."""
    return (s != -torch.inf) & (t != -torch.inf)


_LOGITS = "Tensor student, Tensor teacher"

logit_moments = define(
    f"logit_moments({_LOGITS}, Tensor? mask, int valid_columns) -> Tensor",
    reference=_moments,
    fake=lambda student, *_: student.new_empty(
        student.size(0), _NUM_MOMENTS, dtype=accumulation_dtype(student.dtype)
    ),
)
logit_moments_gradient = define(
    f"logit_moments_gradient({_LOGITS}, Tensor? labels, Tensor? mask, Tensor normalizers,"
    " Tensor coefficients, Tensor by_cross_entropy, int valid_columns, int offset,"
    " Tensor(a!) destination) -> ()",
    reference=_gradient,
    fake=lambda *_: None,
)
