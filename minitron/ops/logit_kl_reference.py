"""The ops of `minitron.ops.logit_kl` in PyTorch: the same arithmetic, and the only one for fp64.

The columns of `statistics` are the m, n, a, b, c, d, e, l of `minitron.ops.logit_kl`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minitron.ops.vocab_parallel import NO_COLUMNS, accumulation_dtype, label_columns, token_chunks


def statistics(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    valid_columns: int,
    label_offset: int,
    temperature: float,
    reverse: bool,
    unit_sum: bool,
) -> Tensor:
    """One rank's statistics [tokens, 8] of its columns."""
    dtype = accumulation_dtype(student.dtype)
    out = student.new_zeros(student.size(0), 8, dtype=dtype)
    m, n, a, b, c, d, e, l = out.unbind(1)  # noqa: E741
    m.fill_(NO_COLUMNS)
    n.fill_(NO_COLUMNS)
    if not valid_columns:
        return out
    for chunk in token_chunks(*student.shape):
        s = student[chunk, :valid_columns].to(dtype)
        t = teacher[chunk, :valid_columns].to(dtype)
        m[chunk], n[chunk] = s.amax(1).clamp(min=NO_COLUMNS), t.amax(1).clamp(min=NO_COLUMNS)
        x, y = (s - m[chunk, None]) / temperature, (t - n[chunk, None]) / temperature
        p, q = x.exp(), y.exp()
        a[chunk], b[chunk] = p.sum(1), q.sum(1)
        c[chunk] = torch.where(q > 0, q * (y - x), 0).sum(1)
        if reverse:
            d[chunk] = torch.where(p > 0, p * (x - y), 0).sum(1)
        e[chunk] = (x * temperature).exp().sum(1) if unit_sum and temperature != 1 else a[chunk]
        if labels is not None:
            column, here = label_columns(labels[chunk], label_offset, valid_columns)
            l[chunk] = torch.where(here, s.gather(1, column[:, None])[:, 0], 0)
    if mask is not None:
        out[~mask] = out.new_tensor([NO_COLUMNS] * 2 + [0] * 6)
    return out


def merge(gathered: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """Losses [4, tokens] and merged statistics [tokens, 8] from all ranks' [t, tokens, 8]."""
    m, n, a, b, c, d, e, l = gathered.unbind(2)  # noqa: E741
    student_max, teacher_max = m.amax(0), n.amax(0)
    m, n = (m - student_max) / temperature, (n - teacher_max) / temperature
    u, w = m.exp(), n.exp()
    student_sum, teacher_sum = (a * u).sum(0), (b * w).sum(0)
    forward = torch.where(w > 0, w * (c + b * (n - m)), 0).sum(0)
    backward = torch.where(u > 0, u * (d + a * (m - n)), 0).sum(0)
    unit_sum, label_logit = (e * (m * temperature).exp()).sum(0), l.sum(0)

    ratio, log_sum = (student_sum / teacher_sum).log(), unit_sum.log()
    losses = torch.stack(
        [
            forward / teacher_sum + ratio,
            backward / student_sum - ratio,
            (student_max - label_logit) + log_sum,
            (student_max + log_sum).square(),
        ]
    )
    if mask is not None:
        losses = torch.where(mask, losses, 0)
    merged = [student_max, teacher_max, student_sum, teacher_sum, forward, backward]
    return losses, torch.stack([*merged, unit_sum, label_logit], dim=1)


def gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    merged: Tensor,
    weights: Tensor,
    valid_columns: int,
    label_offset: int,
    temperature: float,
    reverse: bool,
    unit_sum: bool,
    destination: Tensor,
) -> None:
    """Write the gradient by the student's logits; `destination` may be either of the logits."""
    m, n, a, b, _, d, e, _ = (column[:, None] for column in merged.unbind(1))
    by_forward, by_reverse, by_cross_entropy, by_z = weights[:, :, None]
    for chunk in token_chunks(*student.shape):
        x = (student[chunk, :valid_columns].to(merged.dtype) - m[chunk]) / temperature
        y = (teacher[chunk, :valid_columns].to(merged.dtype) - n[chunk]) / temperature
        p, q = x.exp() / a[chunk], y.exp() / b[chunk]
        grad = by_forward[chunk] / temperature * (p - q)
        if reverse:
            excess = by_reverse[chunk] / temperature * (x - y - d[chunk] / a[chunk])
            # an infinite divergence that nobody weighs must not matter
            grad += torch.where((p > 0) & (by_reverse[chunk] != 0), p * excess, 0)
        if unit_sum:
            slope = by_cross_entropy[chunk] + 2 * (m[chunk] + e[chunk].log()) * by_z[chunk]
            grad += slope * (x * temperature).exp() / e[chunk]
        if labels is not None and valid_columns:
            column, here = label_columns(labels[chunk], label_offset, valid_columns)
            grad.scatter_add_(1, column[:, None], -by_cross_entropy[chunk] * here[:, None])
        if mask is not None:
            grad[~mask[chunk]] = 0
        destination[chunk, :valid_columns] = grad.to(destination.dtype)
        destination[chunk, valid_columns:] = 0


def fused(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    weights: Tensor,
    valid_columns: int,
    temperature: float,
    reverse: bool,
    unit_sum: bool,
    destination: Tensor,
) -> Tensor:
    """Statistics and gradient of a vocabulary that is whole on this rank."""
    options = (valid_columns, 0, temperature, reverse, unit_sum)
    merged = statistics(student, teacher, labels, mask, *options)
    gradient(student, teacher, labels, mask, merged, weights, *options, destination)
    return merged
