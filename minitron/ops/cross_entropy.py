"""Cross-entropy of vocabulary-parallel logits; padding columns take no probability.

With s the logits of one token and m a reference close to their maximum, a rank reads its columns
once and keeps three numbers, which merge like those of `minitron.ops.logit_kl`:

    m,  a = Σ e^(s−m),  l = s[label]          cross-entropy = (M − L) + ln A

The gradient e^(s−M)/A − onehot(label) is recomputed from them. megatron-core's own counts the
padding of the vocabulary as tokens, so that its loss depends on the tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.library import compose, define
from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    accumulation_dtype,
    first_column,
    gather_statistics,
    group_name,
    label_columns,
    named_group,
    token_chunks,
)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    valid_columns: int,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy per token.

    Args:
        logits: [s, b, v/t] this rank's columns.
        labels: [s, b] token ids in the whole vocabulary.
        valid_columns: leading columns of `logits` that stand for a token; the rest are padding,
            excluded from every sum and given a gradient of exactly zero.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        [s, b] loss in nats, the same on every rank, in fp32 (fp64 for fp64 logits).
    """
    losses, _ = _cross_entropy(
        logits.flatten(0, -2), labels.flatten(), valid_columns, group_name(tp_group)
    )
    return losses.view(labels.shape)


def _reference_statistics(
    logits: Tensor, labels: Tensor, valid_columns: int, label_offset: int
) -> Tensor:
    """The m, a and l [tokens, 3] of one rank's columns."""
    out = _new_statistics(logits)
    maximum, total, label_logit = out.unbind(1)
    maximum.fill_(NO_COLUMNS)
    if not valid_columns:
        out[:, 1:] = 0
        return out
    for chunk in token_chunks(*logits.shape):
        x = logits[chunk, :valid_columns].to(out.dtype)  # may be the logits themselves
        maximum[chunk] = x.amax(1).clamp(min=NO_COLUMNS)
        total[chunk] = (x - maximum[chunk, None]).exp_().sum(1)
        column, here = label_columns(labels[chunk], label_offset, valid_columns)
        label_logit[chunk] = torch.where(here, x.gather(1, column[:, None])[:, 0], 0)
    return out


def _reference_gradient(
    logits: Tensor,
    labels: Tensor,
    merged: Tensor,
    weights: Tensor,
    valid_columns: int,
    label_offset: int,
) -> Tensor:
    """The gradient of the losses [tokens] times `weights` [tokens] by the logits."""
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    if not valid_columns:
        return out
    maximum, total, _ = merged[:, :, None].unbind(1)  # [tokens, 1]
    for chunk in token_chunks(*logits.shape):
        x = logits[chunk, :valid_columns].to(merged.dtype)
        p = (x - maximum[chunk]).exp_().div_(total[chunk])
        column, here = label_columns(labels[chunk], label_offset, valid_columns)
        p.scatter_add_(1, column[:, None], -here[:, None].to(p.dtype))
        out[chunk, :valid_columns] = p.mul_(weights[chunk, None]).to(out.dtype)
    return out


_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor labels, int valid_columns, int label_offset)"
    " -> Tensor",
    reference=_reference_statistics,
    fake=lambda logits, *_: _new_statistics(logits),
)
_gradient = define(
    "cross_entropy_gradient(Tensor logits, Tensor labels, Tensor merged, Tensor weights,"
    " int valid_columns, int label_offset) -> Tensor",
    reference=_reference_gradient,
    fake=lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
)


def _forward(
    logits: Tensor, labels: Tensor, valid_columns: int, group: str | None
) -> tuple[Tensor, Tensor]:
    """Losses [tokens] and merged statistics [tokens, 3]."""
    tp_group = named_group(group)
    statistics = _statistics(logits, labels, valid_columns, first_column(logits, tp_group))
    maxima, totals, label_logits = gather_statistics(statistics, tp_group).unbind(2)  # [t, tokens]
    maximum, label_logit = maxima.amax(0), label_logits.sum(0)
    total = (totals * (maxima - maximum).exp()).sum(0)
    return (maximum - label_logit) + total.log(), torch.stack([maximum, total, label_logit], 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, valid_columns, group = inputs
    ctx.options = (valid_columns, first_column(logits, named_group(group)))
    ctx.save_for_backward(logits, labels, output[1])


def _backward(ctx: Any, weights: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return _gradient(*ctx.saved_tensors, weights.contiguous(), *ctx.options), None, None, None


_cross_entropy = compose(
    "cross_entropy(Tensor logits, Tensor labels, int valid_columns, str? group)"
    " -> (Tensor, Tensor)",
    forward=_forward,
    fake=lambda logits, *_: (
        logits.new_empty(logits.size(0), dtype=accumulation_dtype(logits.dtype)),
        _new_statistics(logits),
    ),
    setup_context=_save,
    backward=_backward,
)


def _new_statistics(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.size(0), 3, dtype=accumulation_dtype(logits.dtype))
