"""Any objective between logits that exist as a whole, as a differentiable op."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.library import compose
from minitron.ops.objectives import KnownTokens, Logits, Objective, Teacher
from minitron.ops.steps import completed
from minitron.ops.vocab_parallel import group_name, named_group


def logit_loss(
    student: Tensor,
    teacher: Teacher,
    objective: Objective,
    *,
    valid_columns: int,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    loss_mask: Tensor | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """An objective per token, from whole logits; its gradient is recomputed in the backward pass.

    Args:
        student: [s, b, v/t] raw logits.
        teacher: [s, b, v/t] raw logits, or known tokens [s, b, k]; no gradient.
        objective: what to compute.
        valid_columns: leading columns that stand for a token; the rest are padding, excluded from
            every sum and given a gradient of exactly zero.
        temperature: τ, divides both logits.
        temperature_power: the loss is multiplied by this power of τ.
        loss_mask: [s, b]; where it is zero, logits are not read, loss and gradient are zero.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        [s, b], the same on every rank, in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the teacher's shape does not go with the student's, or the objective does not
            go with the kind of teacher.
    """
    if isinstance(teacher, KnownTokens):
        fits = all(x.shape[:-1] == student.shape[:-1] for x in teacher)
        fits &= teacher.ids.shape == teacher.log_probabilities.shape
    else:
        fits = teacher.shape == student.shape
    if not fits:
        shown = teacher if isinstance(teacher, KnownTokens) else [teacher]
        sizes = " and ".join(str(list(x.shape)) for x in shown)
        raise ValueError(
            f"student logits {list(student.shape)} and a teacher of {sizes} do not go together"
        )
    ids = None
    if isinstance(teacher, KnownTokens):
        ids, teacher = teacher.ids.flatten(0, -2), teacher.log_probabilities
    loss, _ = _logit_loss(
        student.flatten(0, -2),
        teacher.detach().flatten(0, -2),
        ids,
        None if loss_mask is None else loss_mask.flatten() != 0,
        objective.name,
        valid_columns,
        temperature,
        group_name(tp_group),
    )
    factor = temperature**temperature_power
    return (loss * factor if factor != 1 else loss).view(student.shape[:-1])


def _rows(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    valid_columns: int,
    temperature: float,
    group: str | None,
) -> Logits:
    return Logits(
        student,
        teacher if ids is None else KnownTokens(ids, teacher),
        valid_columns,
        temperature,
        forward_kl=False,
        mask=mask,
        tp_group=named_group(group),
    )


def _forward(
    student: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    objective: str,
    *options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Losses [tokens], and what the gradient needs of them."""
    rows = _rows(student, teacher, ids, mask, *options)
    losses, saved = completed(Objective.named(objective).losses(rows))
    return losses.objective.clone(), [x.clone() for x in saved]  # an op's results share no memory


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    ctx.objective, ctx.options = inputs[4], inputs[5:]
    ctx.save_for_backward(*inputs[:4], *output[1])
    ctx.mark_non_differentiable(*output[1])


def _backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    student, teacher, ids, mask, *saved = ctx.saved_tensors
    rows = _rows(student, teacher, ids, mask, *ctx.options)
    weights = torch.stack([upstream, torch.zeros_like(upstream)])
    grad = torch.empty_like(student, memory_format=torch.contiguous_format)
    Objective.named(ctx.objective).gradient(rows, saved, weights, grad)
    return grad, *[None] * 7


_logit_loss = compose(
    "logit_loss(Tensor student, Tensor teacher, Tensor? ids, Tensor? mask, str objective,"
    " int valid_columns, float temperature, str? group) -> (Tensor, Tensor[])",
    forward=_forward,
    fake=_forward,
    setup_context=_save,
    backward=_backward,
)
