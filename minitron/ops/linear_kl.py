"""Distillation from hidden states: heads, losses and their gradients, chunk by chunk.

A chunk of tokens goes through both heads; an objective of `minitron.ops.objectives` turns their
logits into losses and writes the gradient over the student's, which at once become gradients of the
hidden states and of the head. Logits of more than two chunks never exist: under tensor parallelism,
while the collective of one chunk is under way, the other goes on, through the heads or to its next
collective. In place of the teacher's hidden states and head may stand what is known of its outputs.

Gradients are thus taken in the forward pass, before anybody knows what they will be multiplied by.
For the hidden states that can follow, for the head it cannot: its gradient is a sum over tokens. So
the weight of each token is an argument, and what comes back in the backward pass has to be
proportional to it, as it is for a masked sum or mean. That is checked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.objectives import KL, KnownTokens, Logits, Losses, Objective, Steps
from minitron.ops.top_tokens import top1_agreement
from minitron.ops.vocab_parallel import accumulation_dtype

# Enough to keep GEMMs efficient and the head's weights seldom read, which a CPU is with less.
CHUNK_TOKENS = 2048
CHUNK_TOKENS_ON_CPU = 1024


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
    """1 where both find the same token most probable, else 0; None unless asked for."""


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
    agreement: bool = False,
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
        agreement: also tell where both find the same token most probable.
        sequence_parallel: whether the hidden states hold this rank's part of the sequence.
        chunk_tokens: tokens whose logits exist at a time; twice as many under tensor parallelism.
            None takes `CHUNK_TOKENS`, on a CPU `CHUNK_TOKENS_ON_CPU`.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Raises:
        RuntimeError: in the backward pass, if the incoming gradient is not proportional to
            `token_weights`.
    """
    assert labels is not None or lm_weight == 0, "lm_weight needs labels"
    if tp_group is not None and tp_group.size() == 1:
        tp_group = None
    if chunk_tokens is None:
        chunk_tokens = CHUNK_TOKENS_ON_CPU if student.device.type == "cpu" else CHUNK_TOKENS
    options = _Options(
        objective,
        token_weights,
        valid_columns,
        labels,
        lm_weight,
        temperature,
        temperature**temperature_power,
        agreement,
        sequence_parallel and tp_group is not None,
        chunk_tokens,
        tp_group,
        torch.is_grad_enabled() and (student.requires_grad or student_head.requires_grad),
    )
    states = type(teacher)(*(x.detach() for x in teacher))
    found = _LinearKL.apply(student, student_head, states, options)
    loss, forward_kl, cross_entropy, agrees = found
    return LinearLosses(
        loss,
        forward_kl,
        cross_entropy if labels is not None else None,
        agrees if agreement else None,
    )


@dataclass(frozen=True)
class _Options:
    """The arguments of `linear_kl` that are no hidden states."""

    objective: Objective
    token_weights: Tensor
    valid_columns: int
    labels: Tensor | None
    lm_weight: float
    temperature: float
    factor: float
    agreement: bool
    sequence_parallel: bool
    chunk_tokens: int
    tp_group: dist.ProcessGroup | None
    differentiate: bool


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: TeacherHidden | KnownTokens,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        if options.sequence_parallel:
            assert options.tp_group is not None
            student = _whole(student, options.tp_group)
            if isinstance(teacher, TeacherHidden):
                teacher = teacher._replace(hidden=_whole(teacher.hidden, options.tp_group))
        shape = student.shape[:-1]
        student = student.flatten(0, -2)  # [tokens, h]
        dtype = accumulation_dtype(student.dtype)
        token_weights = options.token_weights.flatten().to(dtype)
        mask = token_weights != 0
        labels = None if options.labels is None else options.labels.flatten()
        found = token_weights.new_empty(4, token_weights.numel())
        head_grad = torch.zeros_like(student_head, dtype=dtype) if options.differentiate else None
        hidden_grad = torch.empty_like(student) if options.differentiate else None

        def job(chunk: slice) -> Steps[None]:
            logits = Logits(
                student[chunk] @ student_head.t(),
                _teacher_rows(teacher, chunk),
                options.valid_columns,
                options.temperature,
                None if labels is None else labels[chunk],
                mask=mask[chunk],
                tp_group=options.tp_group,
            )
            if options.agreement:
                found[3, chunk] = yield from top1_agreement(logits)
            weights = None
            if options.differentiate:
                by_token = token_weights[chunk]
                weights = torch.stack([options.factor * by_token, options.lm_weight * by_token])
            losses = yield from _losses_and_gradient(options.objective, logits, weights)
            found[0, chunk] = options.factor * losses.objective
            if options.lm_weight:
                found[0, chunk] += options.lm_weight * losses.cross_entropy
            found[1, chunk], found[2, chunk] = losses.forward_kl, losses.cross_entropy
            if head_grad is not None and hidden_grad is not None:
                torch.mm(logits.student, student_head, out=hidden_grad[chunk])
                _add_product(head_grad, logits.student.t(), student[chunk])

        starts = range(0, student.size(0), options.chunk_tokens)
        jobs = (job(slice(start, start + options.chunk_tokens)) for start in starts)
        _take_turns(jobs, at_once=1 if options.tp_group is None else 2)

        ctx.save_for_backward(hidden_grad, head_grad, token_weights)
        ctx.shape, ctx.options, ctx.head_dtype = shape, options, student_head.dtype
        loss, *readings = (x.clone() for x in found.view(4, *shape).unbind(0))
        ctx.mark_non_differentiable(*readings)
        return loss, *readings

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, head_grad, weights = ctx.saved_tensors
        upstream = grad_outputs[0].flatten() * (weights != 0)
        factor = (upstream * weights).sum() / weights.square().sum().clamp(min=1e-30)
        deviation = (upstream - factor * weights).abs().amax()
        torch._assert_async(
            deviation <= 1e-3 * upstream.abs().amax(),
            "the gradient that reaches linear_kl is not proportional to its token_weights",
        )
        hidden_grad = (hidden_grad * factor).to(hidden_grad.dtype)
        group = ctx.options.tp_group
        if group is not None:  # every rank has seen its columns' part alone
            if ctx.options.sequence_parallel:
                part = hidden_grad.new_empty(
                    hidden_grad.size(0) // group.size(), hidden_grad.size(1)
                )
                dist.reduce_scatter_tensor(part, hidden_grad, group=group)
                hidden_grad = part
            else:
                dist.all_reduce(hidden_grad, group=group)
        hidden_grad = hidden_grad.view(-1, ctx.shape[1], hidden_grad.size(1))
        return hidden_grad, (head_grad * factor).to(ctx.head_dtype), None, None


def _teacher_rows(teacher: TeacherHidden | KnownTokens, chunk: slice) -> Tensor | KnownTokens:
    """The teacher's side of a chunk's `Logits`."""
    if isinstance(teacher, KnownTokens):
        return KnownTokens(*(x.flatten(0, -2)[chunk] for x in teacher))
    return teacher.hidden.flatten(0, -2)[chunk] @ teacher.head.t()


def _losses_and_gradient(
    objective: Objective, logits: Logits, weights: Tensor | None
) -> Steps[Losses]:
    """The losses; with weights [2, tokens], the gradient replaces the student's logits."""
    if isinstance(objective, KL) and weights is not None:
        return (yield from objective.fused(logits, weights))
    losses, saved = yield from objective.losses(logits)
    if weights is not None:
        objective.gradient(logits, saved, weights, logits.student)
    return losses


def _take_turns(jobs: Iterator[Steps[None]], *, at_once: int) -> None:
    """Complete all jobs in order, `at_once` of them begun; one that waits lets the other go on."""
    begun: deque[Steps[None]] = deque()

    def advance(job: Steps[None]) -> None:
        try:
            next(job)
        except StopIteration:
            return
        begun.append(job)

    for job in jobs:
        advance(job)
        while len(begun) >= at_once:
            advance(begun.popleft())
    while begun:
        advance(begun.popleft())


def _whole(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' parts of a sequence, [s/t, b, h] → [s, b, h]."""
    whole = part.new_empty(part.size(0) * group.size(), *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where the total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
