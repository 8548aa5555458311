"""Cross-entropy of vocabulary-parallel logits; padding columns take no probability.

With x the logits of one token and M their maximum, the loss is M + ln Σ e^(x−M) − x[label] and its
gradient softmax(x) − onehot(label). megatron-core's own counts the padding of the vocabulary as
tokens, so that its loss depends on the tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.vocab_parallel import (
    NO_COLUMNS,
    accumulation_dtype,
    gather_statistics,
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
    return _CrossEntropy.apply(logits, labels, valid_columns, tp_group)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        valid_columns: int,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        rows = logits.flatten(0, -2)  # [tokens, v/t]
        rank = tp_group.rank() if tp_group is not None else 0
        targets = labels.flatten() - rank * rows.size(1)  # column in this rank's shard, if any
        here = (targets >= 0) & (targets < valid_columns)
        columns = torch.where(here, targets, 0)

        statistics = rows.new_zeros(rows.size(0), 3, dtype=accumulation_dtype(logits.dtype))
        maximum, total, label_logit = statistics.unbind(1)
        maximum.fill_(NO_COLUMNS)
        if valid_columns:
            for chunk in token_chunks(*rows.shape):
                x = rows[chunk, :valid_columns].to(statistics.dtype)  # may be the logits themselves
                maximum[chunk] = x.amax(1)
                label_logit[chunk] = x.gather(1, columns[chunk, None])[:, 0] * here[chunk]
                total[chunk] = (x - maximum[chunk, None]).exp_().sum(1)

        gathered = gather_statistics(statistics, tp_group)  # [t, tokens, 3]
        maxima, totals, label_logits = gathered.unbind(2)
        global_max = maxima.amax(0)
        log_normalizer = global_max + (totals * (maxima - global_max).exp()).sum(0).log()
        ctx.save_for_backward(logits, columns, here, log_normalizer)
        ctx.valid_columns = valid_columns
        return (log_normalizer - label_logits.sum(0)).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        logits, columns, here, log_normalizer = ctx.saved_tensors
        valid = ctx.valid_columns
        rows = logits.flatten(0, -2)
        scale = grad_outputs[0].flatten()[:, None]  # [tokens, 1]
        grad = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        if valid:
            for chunk in token_chunks(*rows.shape):
                x = rows[chunk, :valid].to(log_normalizer.dtype)
                p = (x - log_normalizer[chunk, None]).exp_()
                p.scatter_add_(1, columns[chunk, None], -here[chunk, None].to(p.dtype))
                grad[chunk, :valid] = p.mul_(scale[chunk]).to(grad.dtype)
        return grad.view(logits.shape), None, None, None
