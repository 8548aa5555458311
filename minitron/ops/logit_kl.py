"""Forward KL divergence between vocabulary-parallel logits of a teacher and a student.

With x = student/τ and y = teacher/τ, a rank reads its columns once and keeps five numbers a token:

    m = max x,  n = max y,  a = Σ e^(x−m),  b = Σ e^(y−n),  c = Σ e^(y−n) [(y−n) − (x−m)]

Over all ranks, with M = max m_r, N = max n_r and w_r = e^(n_r−N),

    A = Σ a_r e^(m_r−M),  B = Σ b_r w_r,  C = Σ w_r [c_r + b_r ((n_r−N) − (m_r−M))]
    KL = C/B − ln B + ln A            (the maxima cancel)
    ∂KL/∂student = (1/τ) (e^(x−M)/A − e^(y−N)/B)

The cross term is centred on both maxima: uncentred, a teacher whose logits share a large offset
loses the KL in rounding.
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


def logit_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    valid_columns: int,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Forward KL(teacher || student) per token.

    Not multiplied by any power of the temperature. A token to which the student gives no
    probability (−inf) and the teacher some makes the loss +inf; where the teacher gives none, it
    counts nothing.

    Args:
        student: [s, b, v/t] raw logits.
        teacher: [s, b, v/t] raw logits, no gradient.
        valid_columns: leading columns that stand for a token; the rest are padding, excluded from
            every sum and given a gradient of exactly zero.
        temperature: τ, divides both logits.
        tp_group: the ranks that share the vocabulary; None for one rank.

    Returns:
        [s, b] loss in nats, the same on every rank, in fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the two shards differ in shape.

    Source: arXiv:1503.02531; arXiv:2407.14679.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {list(student.shape)} and teacher logits {list(teacher.shape)} differ"
        )
    return _LogitKL.apply(student, teacher.detach(), valid_columns, temperature, tp_group)


class _LogitKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        valid_columns: int,
        temperature: float,
        tp_group: dist.ProcessGroup | None,
    ) -> Tensor:
        student_rows, teacher_rows = student.flatten(0, -2), teacher.flatten(0, -2)
        dtype = accumulation_dtype(student.dtype)
        statistics = student.new_zeros(student_rows.size(0), 5, dtype=dtype)
        m, n, a, b, c = statistics.unbind(1)
        m.fill_(NO_COLUMNS)
        n.fill_(NO_COLUMNS)
        if valid_columns:
            for chunk in token_chunks(*student_rows.shape):
                x = student_rows[chunk, :valid_columns].to(dtype) / temperature
                y = teacher_rows[chunk, :valid_columns].to(dtype) / temperature
                m[chunk], n[chunk] = x.amax(1), y.amax(1)
                x.sub_(m[chunk, None])
                y.sub_(n[chunk, None])
                q = y.exp()
                a[chunk], b[chunk] = x.exp().sum(1), q.sum(1)
                c[chunk] = torch.where(q > 0, q * (y - x), 0).sum(1)

        gathered = gather_statistics(statistics, tp_group)  # [t, tokens, 5]
        m, n, a, b, c = gathered.unbind(2)
        student_max, teacher_max = m.amax(0), n.amax(0)
        m, n = m - student_max, n - teacher_max
        w = n.exp()
        student_sum, teacher_sum = (a * m.exp()).sum(0), (b * w).sum(0)
        cross = torch.where(w > 0, w * (c + b * (n - m)), 0).sum(0)
        kl = cross / teacher_sum - teacher_sum.log() + student_sum.log()

        ctx.save_for_backward(
            student, teacher, student_max + student_sum.log(), teacher_max + teacher_sum.log()
        )
        ctx.valid_columns, ctx.temperature = valid_columns, temperature
        return kl.view(student.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, student_log_sum, teacher_log_sum = ctx.saved_tensors
        valid, temperature = ctx.valid_columns, ctx.temperature
        student_rows, teacher_rows = student.flatten(0, -2), teacher.flatten(0, -2)
        dtype = student_log_sum.dtype
        scale = grad_outputs[0].flatten()[:, None] / temperature  # [tokens, 1]
        grad = torch.zeros_like(student_rows, memory_format=torch.contiguous_format)
        if valid:
            for chunk in token_chunks(*student_rows.shape):
                x = student_rows[chunk, :valid].to(dtype) / temperature
                y = teacher_rows[chunk, :valid].to(dtype) / temperature
                p = x.sub_(student_log_sum[chunk, None]).exp_()
                q = y.sub_(teacher_log_sum[chunk, None]).exp_()
                grad[chunk, :valid] = p.sub_(q).mul_(scale[chunk]).to(grad.dtype)
        return grad.view(student.shape), None, None, None, None
