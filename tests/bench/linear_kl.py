"""Hidden states of both models to KL and gradients of the student's hidden states and head.

`eager` is what training scripts do with Hugging Face models: both linears, `log_softmax` twice,
`kl_div`. "bare GEMMs" are the four matrix products that nobody can avoid.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.linear_kl import linear_kl
from tests.bench.runner import Case


def eager(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """KL per token from whole logits."""
    log_p = F.log_softmax(F.linear(student, head).float(), -1)
    log_q = F.log_softmax(F.linear(teacher, teacher_head).float(), -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def cases() -> Iterator[Case]:
    """One size that a small machine can time."""
    yield _case(tokens=512, hidden=1024, vocabulary=32000)


def _inputs(tokens: int, hidden: int, vocabulary: int) -> list[Tensor]:
    sizes = ((tokens, 1, hidden), (vocabulary, hidden)) * 2
    tensors = [torch.randn(size).mul_(hidden**-0.25) for size in sizes]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    return tensors


def _step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(loss(*inputs).sum(), inputs[:2])


def _fused(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    return linear_kl(
        student,
        head,
        teacher,
        teacher_head,
        token_weights=torch.ones(student.shape[:2]),
        valid_columns=head.size(0),
        chunk_tokens=256,
    ).forward_kl


def _case(tokens: int, hidden: int, vocabulary: int) -> Case:
    inputs = _inputs(tokens, hidden, vocabulary)
    student, head, teacher, teacher_head = (x.detach() for x in inputs)
    logits = torch.empty(tokens, 1, vocabulary)
    compiled = torch.compile(eager)

    def gemms() -> None:
        torch.matmul(teacher, teacher_head.t(), out=logits)
        torch.matmul(student, head.t(), out=logits)
        _ = logits[:, 0] @ head
        _ = logits[:, 0].t() @ student[:, 0]

    return Case(
        op="linear_kl",
        shape=f"[{tokens}, {hidden}] x [{vocabulary}, {hidden}]",
        dtype="float32",
        variants={
            "eager": lambda: _step(eager, inputs),
            "torch.compile": lambda: _step(compiled, inputs),
            "bare GEMMs": gemms,
            "linear_kl": lambda: _step(_fused, inputs),
        },
    )


def peak(variant: str, *, tokens: int, hidden: int, vocabulary: int) -> float:
    """Megabytes that one step adds to this process's peak; a process can tell only once."""
    inputs = _inputs(tokens, hidden, vocabulary)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _step({"eager": eager, "linear_kl": _fused}[variant], inputs)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
