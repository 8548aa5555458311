"""Distillation from hidden states: heads, losses and their gradients, chunk by chunk.

A chunk of tokens goes through both heads; an objective of `minitron.ops.objectives` turns their
logits into losses and writes the gradient over the student's, which at once become gradients of the
hidden states and of the head. Logits of more than two chunks never exist: under tensor parallelism,
while the collective of one chunk is under way, the other goes on, through the heads or to its next
collective. In place of the teacher's hidden states and head may stand what is known of its outputs.

Gradients are thus taken in the forward pass, before anybody knows what they will be multiplied by.
For the hidden states that can follow, for the head it cannot: its gradient is a sum over tokens. So
the weight of each token is an argument, and what comes back in the backward pass has to be
proportional to it, as it is for a masked sum or mean. That is checked. The sum is in fp32, a GPU's
GEMM adding to it; a CPU has none that does, and rounds each chunk's part before: in bf16, errors of
2.3e-3 of the norm, where the last rounding alone costs 1.7e-3.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.library import compose, only_once
from minitron.ops.objectives import KL, KnownTokens, Logits, Losses, Objective, Teacher
from minitron.ops.steps import Steps, take_turns
from minitron.ops.top_tokens import rows_of_positions, top1_agreement
from minitron.ops.vocab_parallel import (
    accumulation_dtype,
    group_name,
    named_group,
    scatter_sum,
    start_gathering,
    start_summing,
)

# Enough to keep GEMMs efficient and the head's weights seldom read, which a CPU is with less.
CHUNK_TOKENS = 2048
CHUNK_TOKENS_ON_CPU = 512

# Of a head's gradient, to be changed at a time: what stands between does not leave the cache.
_HEAD_ROWS = 4096


class TeacherHidden(NamedTuple):
    """A teacher whose logits can be had; no gradient."""

    hidden: Tensor
    """[s, b, h'] final hidden states, [s/t, b, h'] under sequence parallelism."""
    head: Tensor
    """[v/t, h'] rows of this rank's tokens."""


class LinearLosses(NamedTuple):
    """Per-token losses [s, b] in nats, the same on every rank; all but `loss` for reading only."""

    loss: Tensor
    """objective · τ^power + lm_weight · cross-entropy; differentiable."""
    forward_kl: Tensor
    """KL(teacher || student) at τ; of known tokens, the objective itself."""
    cross_entropy: Tensor | None
    """Of the student with the labels; None without labels."""
    top1_agreement: Tensor | None
    """1 where both find the same token most probable, else 0, also at positions that were not asked
    for; None unless any were."""


def linear_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: TeacherHidden | KnownTokens,
    *,
    objective: Objective = KL(),  # noqa: B008 - frozen
    token_weights: Tensor,
    valid_columns: int,
    labels: Tensor | None = None,
    lm_weight: float = 0.0,
    temperature: float = 1.0,
    temperature_power: float = 0.0,
    agreement: int = 0,
    sequence_parallel: bool = False,
    chunk_tokens: int | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> LinearLosses:
    """A loss between two models' next-token distributions, without whole logits.

    Args:
        student: [s, b, h] final hidden states, [s/t, b, h] under sequence parallelism.
        student_head: [v/t, h] rows of this rank's tokens.
        teacher: final hidden states and head, or known tokens [s, b, k], which go with `SparseKL`.
        objective: the loss; the forward KL unless given.
        token_weights: [s, b] what the caller will multiply the loss by, up to a common factor; a
            token of weight zero costs no sweep and has a loss of zero.
        valid_columns: leading columns of the logits that stand for a token; see `logit_loss`.
        labels: [s, b] token ids in the whole vocabulary; also return the cross-entropy.
        lm_weight: what the cross-entropy counts in the loss; needs labels.
        temperature: τ, divides the logits of both in the objective.
        temperature_power: the objective is multiplied by this power of τ.
        agreement: also tell where both find the same token most probable, at every so-manieth
            position of the sequence; 0 for not.
        sequence_parallel: whether the hidden states hold this rank's part of the sequence.
        chunk_tokens: tokens whose logits exist at a time; twice as many under tensor parallelism.
            None takes `CHUNK_TOKENS`, on a CPU `CHUNK_TOKENS_ON_CPU`.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Raises:
        RuntimeError: in the backward pass, if it is the second one, or on a CPU if the incoming
            gradient is not proportional to `token_weights`; on a GPU the gradients are NaN then.
    """
    assert labels is not None or lm_weight == 0, "lm_weight needs labels"
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    if chunk_tokens is None:
        chunk_tokens = CHUNK_TOKENS_ON_CPU if student.device.type == "cpu" else CHUNK_TOKENS
    teacher_head = ids = None
    if isinstance(teacher, KnownTokens):
        ids, shown = teacher
    else:
        shown, teacher_head = teacher.hidden, teacher.head.detach()
    loss, readings, _, _ = _linear_kl(
        student,
        student_head,
        shown.detach(),
        teacher_head,
        ids,
        token_weights,
        labels,
        objective.name,
        valid_columns,
        lm_weight,
        temperature,
        temperature_power,
        agreement,
        sequence_parallel and tp_group is not None,
        chunk_tokens,
        torch.is_grad_enabled() and (student.requires_grad or student_head.requires_grad),
        group_name(tp_group),
    )
    forward_kl, cross_entropy, agrees = readings.unbind(0)
    return LinearLosses(
        loss,
        forward_kl,
        cross_entropy if labels is not None else None,
        agrees if agreement else None,
    )


class _Arguments(NamedTuple):
    """Of the op."""

    student: Tensor
    student_head: Tensor
    teacher: Tensor
    """Hidden states, or log-probabilities of known tokens."""
    teacher_head: Tensor | None
    ids: Tensor | None
    token_weights: Tensor
    labels: Tensor | None
    objective: str
    valid_columns: int
    lm_weight: float
    temperature: float
    temperature_power: float
    agreement: int
    sequence_parallel: bool
    chunk_tokens: int
    differentiate: bool
    group: str | None


def _forward(*args: Any) -> tuple[Tensor, ...]:
    """Losses [s, b], what is for reading only [3, s, b], gradients by hidden states and head."""
    given = _Arguments(*args)
    group, objective = named_group(given.group), Objective.named(given.objective)
    student, teacher, student_head = given.student, given.teacher, given.student_head
    if given.sequence_parallel:
        student = _whole(student, group)
        teacher = teacher if given.teacher_head is None else _whole(teacher, group)
    student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)  # [tokens, h]
    labels = None if given.labels is None else given.labels.flatten()
    loss, readings, hidden_grad, head_grad = _results(*args)
    losses, (forward_kl, cross_entropy, agrees) = loss.flatten(), readings.flatten(1)
    token_weights = given.token_weights.flatten().to(loss.dtype)
    mask = token_weights != 0
    factor = given.temperature**given.temperature_power

    at_once = 1 if group is None else 2
    rows = min(given.chunk_tokens, student.size(0))
    free = [_logit_memory(given, rows) for _ in range(at_once)]

    def job(chunk: slice) -> Steps[None]:
        memory = free.pop()
        logits = Logits(
            _product(student[chunk], student_head, memory[0]),
            _teacher_rows(given, teacher, chunk, memory[1]),
            given.valid_columns,
            given.temperature,
            None if labels is None else labels[chunk],
            mask=mask[chunk],
            tp_group=group,
        )
        if given.agreement:
            rows = rows_of_positions(chunk, given.token_weights, given.agreement)
            agrees[chunk][rows] = yield from top1_agreement(logits.select(rows))
        weights = None
        if given.differentiate:
            by_token = token_weights[chunk]
            weights = torch.stack([factor * by_token, given.lm_weight * by_token])
        found = yield from _losses_and_gradient(objective, logits, weights, given.lm_weight)
        losses[chunk] = factor * found.objective
        if given.lm_weight:
            losses[chunk] += given.lm_weight * found.cross_entropy
        forward_kl[chunk], cross_entropy[chunk] = found.forward_kl, found.cross_entropy
        if given.differentiate:
            torch.mm(logits.student, student_head, out=hidden_grad[chunk])
            _add_product(head_grad, logits.student.t(), student[chunk])
        free.append(memory)

    starts = range(0, student.size(0), given.chunk_tokens)
    jobs = (job(slice(start, start + given.chunk_tokens)) for start in starts)
    take_turns(jobs, at_once=at_once)
    return loss, readings, hidden_grad, head_grad


def _results(*args: Any) -> tuple[Tensor, ...]:
    """What the op returns, before it is computed."""
    given = _Arguments(*args)
    shape, dtype = given.token_weights.shape, accumulation_dtype(given.student.dtype)
    tokens = given.token_weights.numel() if given.differentiate else 0
    rows = given.student_head.size(0) if given.differentiate else 0
    return (
        given.student.new_empty(shape, dtype=dtype),
        given.student.new_zeros(3, *shape, dtype=dtype),
        given.student.new_empty(tokens, given.student.size(-1)),
        given.student.new_zeros(rows, given.student.size(-1), dtype=dtype),
    )


def _logit_memory(given: _Arguments, rows: int) -> tuple[Tensor, Tensor]:
    """For both models' logits of one chunk after another: new memory is slow on a CPU."""
    student = given.student.new_empty(rows, given.student_head.size(0))
    if given.teacher_head is None:
        return student, student.new_empty(0)
    return student, given.teacher.new_empty(rows, given.teacher_head.size(0))


def _product(states: Tensor, head: Tensor, memory: Tensor) -> Tensor:
    """Logits [tokens, v/t] in the first rows of the memory."""
    return torch.mm(states, head.t(), out=memory[: states.size(0)])


def _teacher_rows(given: _Arguments, teacher: Tensor, chunk: slice, memory: Tensor) -> Teacher:
    """The teacher's side of a chunk's `Logits`."""
    if given.teacher_head is not None:
        return _product(teacher[chunk], given.teacher_head, memory)
    assert given.ids is not None
    return KnownTokens(given.ids.flatten(0, -2)[chunk], teacher[chunk])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = _Arguments(*inputs)
    ctx.shape, ctx.head_dtype = given.student.shape, given.student_head.dtype
    ctx.group, ctx.sequence_parallel = given.group, given.sequence_parallel
    ctx.save_for_backward(*output[2:], given.token_weights)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    only_once(ctx, "the gradients of linear_kl were scaled in place")
    hidden_grad, head_grad, weights = ctx.saved_tensors
    upstream, weights = upstream.flatten(), weights.flatten().to(upstream.dtype)
    upstream = upstream * (weights != 0)
    factor = (upstream * weights).sum() / weights.square().sum().clamp(min=1e-30)
    off = (upstream - factor * weights).abs().amax()
    disproportionate = off > 1e-3 * upstream.abs().amax()  # what is NaN passes, and shows
    if upstream.device.type == "cpu":
        why = "the gradient that reaches linear_kl is not proportional to its token_weights"
        torch._assert_async(~disproportionate, why)
    else:  # where a failed assertion leaves the GPU of no use
        factor = torch.where(disproportionate, torch.nan, factor)
    hidden_grad = _scaled(hidden_grad, factor, hidden_grad.dtype)
    group = named_group(ctx.group)  # every rank of it has seen its columns' part alone
    if ctx.sequence_parallel:
        hidden_grad = scatter_sum(hidden_grad, group)
    else:
        hidden_grad = start_summing(hidden_grad, group)()
    return (
        hidden_grad.view(ctx.shape),
        _scaled(head_grad, factor, ctx.head_dtype),
        *[None] * (len(_Arguments._fields) - 2),
    )


_linear_kl = compose(
    "linear_kl(Tensor student, Tensor student_head, Tensor teacher, Tensor? teacher_head,"
    " Tensor? ids, Tensor token_weights, Tensor? labels, str objective, int valid_columns,"
    " float lm_weight, float temperature, float temperature_power, int agreement,"
    " bool sequence_parallel, int chunk_tokens, bool differentiate, str? group)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    forward=_forward,
    fake=_results,
    setup_context=_save,
    backward=_backward,
)


def _losses_and_gradient(
    objective: Objective, logits: Logits, weights: Tensor | None, lm_weight: float
) -> Steps[Losses]:
    """The losses; with weights [2, tokens], the gradient replaces the student's logits."""
    if isinstance(objective, KL) and weights is not None and logits.tp_group is None:
        return objective.fused(logits, weights)
    losses, saved = yield from objective.losses(logits)
    if weights is not None:
        if not lm_weight:  # the cross-entropy is for reading
            logits = dataclasses.replace(logits, labels=None)
        objective.gradient(logits, saved, weights, logits.student)
    return losses


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient times a factor, rounded once: in place if it is of the wanted dtype.

    In place, since nobody else has it: going backward twice is refused. A graph that is being
    traced has the op's results as its own and must not find them changed.
    """
    in_place = grad.dtype == dtype and type(grad) is Tensor
    scaled = grad if in_place else torch.empty_like(grad, dtype=dtype)
    factor = factor.view(1)  # a scalar of a GPU would be rounded to the gradient's dtype first
    for target, source in zip(scaled.split(_HEAD_ROWS), grad.split(_HEAD_ROWS), strict=True):
        torch.mul(source, factor, out=target)
    return scaled


def _whole(part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' parts of a sequence, [s/t, b, h] → [s, b, h]."""
    return start_gathering(part, group)().flatten(0, 1)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.device.type != "cpu" and torch.__version__ >= "2.10":  # whose GEMM can
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        for rows, factor in zip(total.split(_HEAD_ROWS), left.split(_HEAD_ROWS), strict=True):
            rows += factor @ right
