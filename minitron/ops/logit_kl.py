"""Losses between a student's and a teacher's vocabulary-parallel logits, from one sweep over both.

With s and t the logits, m and n references close to their maxima, x = (s−m)/τ and y = (t−n)/τ, a
rank reads its columns once and keeps eight numbers a token:

    m,  n,  a = Σ e^x,  b = Σ e^y,  c = Σ e^y (y−x),  d = Σ e^x (x−y),  e = Σ e^(s−m),  l = s[label]

Sets of columns merge by moving their sums to common references (csrc/include/kl_merge.h), so one
all-gather serves any number of ranks, and over the whole vocabulary

    forward KL(q ‖ p) = C/B − ln B + ln A        (the references cancel)
    reverse KL(p ‖ q) = D/A − ln A + ln B
    cross-entropy     = M + ln E − L             z-loss = (M + ln E)²

The gradient needs no collective. It is recomputed from the saved statistics, e.g. for forward KL
(1/τ)(e^x/A − e^y/B), because gradients written in the forward pass meet the incoming
gradient only after they were rounded. No collective enters autograd.

The cross terms are centred on both references: uncentred, a teacher whose logits share a large
offset loses the KL in rounding.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops import logit_kl_reference as reference
from minitron.ops.library import compose, define, only_once
from minitron.ops.vocab_parallel import (
    accumulation_dtype,
    first_column,
    gather_statistics,
    group_name,
    named_group,
)

Destination = Literal["new", "student", "teacher"]

_LOGITS = "Tensor student, Tensor teacher, Tensor? labels, Tensor? mask"
_OPTIONS = "float temperature, bool reverse, bool unit_sum"

logit_kl_statistics = define(
    f"logit_kl_statistics({_LOGITS}, int valid_columns, int label_offset, {_OPTIONS}) -> Tensor",
    reference=reference.statistics,
    fake=lambda student, *_: _new_statistics(student),
)
logit_kl_merge = define(
    "logit_kl_merge(Tensor gathered, Tensor? mask, float temperature) -> (Tensor, Tensor)",
    reference=reference.merge,
    fake=lambda gathered, *_: (
        gathered.new_empty(4, gathered.size(1)),
        gathered.new_empty(gathered.shape[1:]),
    ),
)
logit_kl_gradient = define(
    f"logit_kl_gradient({_LOGITS}, Tensor merged, Tensor weights, int valid_columns,"
    f" int label_offset, {_OPTIONS}, Tensor(a!) destination) -> ()",
    reference=reference.gradient,
    fake=lambda *_: None,
)
logit_kl_fused = define(
    f"logit_kl_fused({_LOGITS}, Tensor weights, int valid_columns, {_OPTIONS},"
    " Tensor(a!) destination) -> Tensor",
    reference=reference.fused,
    fake=lambda student, *_: _new_statistics(student),
)


class LogitLosses(NamedTuple):
    """Per-token losses [s, b] in nats, the same on every rank."""

    forward_kl: Tensor
    """KL(teacher || student) at τ."""
    reverse_kl: Tensor | None
    """KL(student || teacher) at τ; None unless asked for."""
    cross_entropy: Tensor | None
    """Of the student with the labels, at τ = 1; None without labels."""
    z_loss: Tensor | None
    """(ln Σ e^s)² of the student, at τ = 1; None unless asked for."""


def logit_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid_columns: int,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    loss_mask: Tensor | None = None,
    gradient: Destination = "new",
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Forward KL(teacher || student) per token; `logit_losses` has the arguments.

    Returns:
        [s, b] loss in nats, the same on every rank, in fp32 (fp64 for fp64 logits).
    """
    return logit_losses(
        student,
        teacher,
        valid_columns=valid_columns,
        temperature=temperature,
        temperature_power=temperature_power,
        loss_mask=loss_mask,
        gradient=gradient,
        tp_group=tp_group,
    ).forward_kl


def logit_losses(
    student: Tensor,
    teacher: Tensor,
    *,
    valid_columns: int,
    labels: Tensor | None = None,
    reverse: bool = False,
    z_loss: bool = False,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    loss_mask: Tensor | None = None,
    gradient: Destination = "new",
    tp_group: dist.ProcessGroup | None = None,
) -> LogitLosses:
    """Several losses from one sweep and one collective; their weighted sum costs one gradient.

    A token to which the student gives no probability (−inf) and the teacher some makes the forward
    KL +inf; where the teacher gives none, it counts nothing. The reverse KL mirrors that.

    Args:
        student: [s, b, v/t] raw logits.
        teacher: [s, b, v/t] raw logits, no gradient.
        valid_columns: leading columns that stand for a token; the rest are padding, excluded from
            every sum and given a gradient of exactly zero.
        labels: [s, b] token ids in the whole vocabulary.
        reverse: also the reverse KL.
        z_loss: also the z-loss.
        temperature: τ, divides both logits in the divergences.
        temperature_power: the divergences are multiplied by this power of τ; 2 keeps their gradient
            independent of τ, as in arXiv:1503.02531.
        loss_mask: [s, b]; where it is zero, logits are not read, losses and gradients are zero.
        gradient: where the backward pass writes the gradient: into new memory, or over the logits
            of the student or of the teacher (of the same dtype), which nobody may use after that,
            a second backward pass included.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Raises:
        ValueError: the two shards differ in shape, or the teacher's memory cannot take a gradient
            of the student's dtype.

    Source: arXiv:1503.02531; arXiv:2407.14679.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ"
        )
    if gradient == "teacher" and student.dtype != teacher.dtype:
        raise ValueError(f"a {student.dtype} gradient does not fit {teacher.dtype} teacher logits")
    losses, _ = _logit_losses(
        student.flatten(0, -2),
        teacher.detach().flatten(0, -2),
        None if labels is None else labels.flatten(),
        None if loss_mask is None else loss_mask.flatten() != 0,
        valid_columns,
        temperature,
        reverse,
        labels is not None or z_loss,
        gradient,
        group_name(tp_group),
    )
    forward_kl, reverse_kl, cross_entropy, z = losses.view(4, *student.shape[:-1]).unbind(0)
    factor = temperature**temperature_power
    return LogitLosses(
        forward_kl * factor if factor != 1 else forward_kl,
        reverse_kl * factor if reverse else None,
        cross_entropy if labels is not None else None,
        z if z_loss else None,
    )


def _forward(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    valid_columns: int,
    temperature: float,
    reverse: bool,
    unit_sum: bool,
    destination: Destination,
    group: str | None,
) -> tuple[Tensor, Tensor]:
    """Losses [4, tokens] and merged statistics [tokens, 8]; `destination` is for the backward."""
    tp_group = named_group(group)
    columns = (valid_columns, first_column(student, tp_group))
    rows = (student, teacher, labels, mask)
    statistics = logit_kl_statistics(*rows, *columns, temperature, reverse, unit_sum)
    return logit_kl_merge(gather_statistics(statistics, tp_group), mask, temperature)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *rows, valid_columns, temperature, reverse, unit_sum, destination, group = inputs
    columns = (valid_columns, first_column(rows[0], named_group(group)))
    ctx.options = (*columns, temperature, reverse, unit_sum)
    ctx.destination = destination
    ctx.save_for_backward(*rows, output[1])


def _backward(ctx: Any, weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.destination != "new":
        only_once(ctx, f"the gradient of logit_kl was written over the {ctx.destination}'s logits")
    *rows, merged = ctx.saved_tensors
    student, teacher = rows[:2]
    destination = {"student": student, "teacher": teacher}.get(ctx.destination)
    if destination is None:
        destination = torch.empty_like(student, memory_format=torch.contiguous_format)
    logit_kl_gradient(*rows, merged, weights.contiguous(), *ctx.options, destination)
    return destination, *[None] * 9


_logit_losses = compose(
    f"logit_losses({_LOGITS}, int valid_columns, {_OPTIONS}, str destination, str? group)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=lambda student, *_: (
        student.new_empty(4, student.size(0), dtype=accumulation_dtype(student.dtype)),
        _new_statistics(student),
    ),
    setup_context=_save,
    backward=_backward,
)


def _new_statistics(student: Tensor) -> Tensor:
    return student.new_empty(student.size(0), 8, dtype=accumulation_dtype(student.dtype))
