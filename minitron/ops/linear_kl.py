"""Distillation from hidden states: both heads, the losses and their gradients, chunk by chunk.

A chunk of tokens goes through both heads; `minitron.ops.logit_kl` turns its logits into losses and
writes the gradient over the student's logits, which at once become gradients of the hidden states
and of the head. Logits of more than two chunks never exist: under tensor parallelism a chunk's one
all-gather is under way while the next chunk goes through the heads.

Gradients are thus taken in the forward pass, before anybody knows what they will be multiplied by.
For the hidden states that can follow, for the head it cannot: its gradient is a sum over tokens. So
the weight of each token is an argument, and what comes back in the backward pass has to be
proportional to it, as it is for a masked sum or mean. That is checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.logit_kl import start_logit_losses
from minitron.ops.vocab_parallel import accumulation_dtype

CHUNK_TOKENS = 2048  # enough to keep GEMMs efficient and the head's weights seldom read


class LinearKL(NamedTuple):
    """Per-token losses [s, b] in nats, the same on every rank."""

    forward_kl: Tensor
    """KL(teacher || student) at τ; differentiable."""
    cross_entropy: Tensor | None
    """Of the student with the labels; for reading only. None without labels."""


def linear_kl(
    student: Tensor,
    student_head: Tensor,
    teacher: Tensor,
    teacher_head: Tensor,
    *,
    token_weights: Tensor,
    valid_columns: int,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    sequence_parallel: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
    tp_group: dist.ProcessGroup | None = None,
) -> LinearKL:
    """Forward KL between two models' next-token distributions, without whole logits.

    Args:
        student: [s, b, h] final hidden states, [s/t, b, h] under sequence parallelism.
        student_head: [v/t, h] rows of this rank's tokens.
        teacher: [s, b, h'] or [s/t, b, h']; no gradient.
        teacher_head: [v/t, h']; no gradient.
        token_weights: [s, b] what the caller will multiply the loss by, up to a common factor; a
            token of weight zero costs no sweep and has a loss of zero.
        valid_columns: leading columns of the logits that stand for a token; see `logit_losses`.
        labels: [s, b] token ids in the whole vocabulary; also return the cross-entropy.
        temperature: τ, divides the logits of both.
        sequence_parallel: whether the hidden states hold this rank's part of the sequence.
        chunk_tokens: tokens whose logits exist at a time; twice as many under tensor parallelism.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Raises:
        RuntimeError: in the backward pass, if the incoming gradient is not proportional to
            `token_weights`.
    """
    differentiate = torch.is_grad_enabled() and (
        student.requires_grad or student_head.requires_grad
    )
    kl, cross_entropy = _LinearKL.apply(
        student,
        student_head,
        teacher.detach(),
        teacher_head.detach(),
        token_weights,
        valid_columns,
        labels,
        temperature,
        sequence_parallel and tp_group is not None and tp_group.size() > 1,
        chunk_tokens,
        tp_group,
        differentiate,
    )
    return LinearKL(kl, cross_entropy if labels is not None else None)


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor,
        teacher_head: Tensor,
        token_weights: Tensor,
        valid_columns: int,
        labels: Tensor | None,
        temperature: float,
        sequence_parallel: bool,
        chunk_tokens: int,
        tp_group: dist.ProcessGroup | None,
        differentiate: bool,
    ) -> tuple[Tensor, Tensor]:
        if sequence_parallel:
            assert tp_group is not None
            student, teacher = _whole(student, tp_group), _whole(teacher, tp_group)
        shape = student.shape[:-1]
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)  # [tokens, h]
        dtype = accumulation_dtype(student.dtype)
        per_token = token_weights.flatten().to(dtype)
        mask = per_token != 0
        weights = per_token.new_zeros(4, per_token.numel())
        weights[0] = per_token
        labels = None if labels is None else labels.flatten()

        losses = weights.new_empty(weights.shape)
        head_grad = torch.zeros_like(student_head, dtype=dtype) if differentiate else None
        hidden_grad = torch.empty_like(student) if differentiate else None

        def start(chunk: slice) -> Any:
            return start_logit_losses(
                student[chunk] @ student_head.t(),
                teacher[chunk] @ teacher_head.t(),
                weights[:, chunk].contiguous() if differentiate else None,
                valid_columns=valid_columns,
                labels=None if labels is None else labels[chunk],
                mask=mask[chunk],
                temperature=temperature,
                tp_group=tp_group,
            )

        def finish(chunk: slice, started: Any) -> None:
            losses[:, chunk], logits_grad = started()
            if head_grad is not None and hidden_grad is not None:
                torch.mm(logits_grad, student_head, out=hidden_grad[chunk])
                _add_product(head_grad, logits_grad.t(), student[chunk])

        pending = None
        for first in range(0, student.size(0), chunk_tokens):
            chunk = slice(first, first + chunk_tokens)
            if tp_group is None or tp_group.size() == 1:  # nothing goes on meanwhile
                finish(chunk, start(chunk))
                continue
            started = start(chunk)
            if pending is not None:
                finish(*pending)
            pending = (chunk, started)
        if pending is not None:
            finish(*pending)

        ctx.save_for_backward(hidden_grad, head_grad, per_token)
        ctx.shape, ctx.sequence_parallel, ctx.tp_group = shape, sequence_parallel, tp_group
        ctx.head_dtype = student_head.dtype
        kl, _, cross_entropy, _ = losses.view(4, *shape).unbind(0)
        kl, cross_entropy = kl.clone(), cross_entropy.clone()
        ctx.mark_non_differentiable(cross_entropy)
        return kl, cross_entropy

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
        group = ctx.tp_group
        if group is not None and group.size() > 1:  # every rank has seen its columns' part alone
            if ctx.sequence_parallel:
                part = hidden_grad.new_empty(
                    hidden_grad.size(0) // group.size(), hidden_grad.size(1)
                )
                dist.reduce_scatter_tensor(part, hidden_grad, group=group)
                hidden_grad = part
            else:
                dist.all_reduce(hidden_grad, group=group)
        hidden_grad = hidden_grad.view(-1, ctx.shape[1], hidden_grad.size(1))
        return hidden_grad, (head_grad * factor).to(ctx.head_dtype), *[None] * 10


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
