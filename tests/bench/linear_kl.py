"""Hidden states of both models to KL and gradients of the student's hidden states and head.

`eager` is what training scripts do with Hugging Face models: both linears, `log_softmax` twice,
`kl_div`. "bare GEMMs" are the four matrix products that nobody can avoid.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.linear_kl import TeacherHidden, linear_kl
from tests.bench.runner import Case


def eager(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    """KL per token from whole logits."""
    log_p = F.log_softmax(F.linear(student, head).float(), -1)
    log_q = F.log_softmax(F.linear(teacher, teacher_head).float(), -1)
    return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Problem:
    """Sizes that a device can time, and the tokens of a chunk."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    chunk_tokens: int


PROBLEMS = {
    "cpu": Problem(512, 1024, 32000, torch.float32, 256),
    "cuda": Problem(8192, 4096, 128256, torch.bfloat16, 2048),
}


def cases(device: str) -> Iterator[Case]:
    """One size a device."""
    yield _case(PROBLEMS[device], device)


def _inputs(problem: Problem, device: str) -> list[Tensor]:
    sizes = ((problem.tokens, 1, problem.hidden), (problem.vocabulary, problem.hidden)) * 2
    tensors = [torch.randn(size, device=device).mul_(problem.hidden**-0.25) for size in sizes]
    tensors = [tensor.to(problem.dtype) for tensor in tensors]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    return tensors


def _step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(loss(*inputs).sum(), inputs[:2])


def _fused(chunk_tokens: int) -> Callable[..., Tensor]:
    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return linear_kl(
            student,
            head,
            TeacherHidden(teacher, teacher_head),
            token_weights=torch.ones(student.shape[:2], device=student.device),
            valid_columns=head.size(0),
            chunk_tokens=chunk_tokens,
        ).loss

    return loss


def _case(problem: Problem, device: str) -> Case:
    inputs = _inputs(problem, device)
    student, head, teacher, teacher_head = (x.detach() for x in inputs)
    logits = student.new_empty(problem.tokens, 1, problem.vocabulary)
    compiled, fused = torch.compile(eager), _fused(problem.chunk_tokens)

    def gemms() -> None:
        torch.matmul(teacher, teacher_head.t(), out=logits)
        torch.matmul(student, head.t(), out=logits)
        _ = logits[:, 0] @ head
        _ = logits[:, 0].t() @ student[:, 0]

    hidden, vocabulary = problem.hidden, problem.vocabulary
    return Case(
        op="linear_kl",
        shape=f"[{problem.tokens}, {hidden}] x [{vocabulary}, {hidden}]",
        dtype=str(problem.dtype).removeprefix("torch."),
        variants={
            "eager": lambda: _step(eager, inputs),
            "torch.compile": lambda: _step(compiled, inputs),
            "bare GEMMs": gemms,
            "linear_kl": lambda: _step(fused, inputs),
        },
    )


# Peak memory of linear_kl, and of what it replaces where that fits.
PEAKS = {
    "cpu": [
        ("eager", Problem(1024, 64, 128256, torch.float32, 256)),
        ("linear_kl", Problem(1024, 64, 128256, torch.float32, 256)),
        ("linear_kl", Problem(8192, 64, 128256, torch.float32, 256)),
    ],
    "cuda": [("eager", PROBLEMS["cuda"]), ("linear_kl", PROBLEMS["cuda"])],
}


def peak(variant: str, problem: Problem, device: str) -> float:
    """Megabytes that one step adds to this process's peak; a process can tell only once."""
    inputs = _inputs(problem, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()  # to what is allocated now
    before = _most_bytes(device)
    _step({"eager": eager, "linear_kl": _fused(problem.chunk_tokens)}[variant], inputs)
    return (_most_bytes(device) - before) / 1e6


def _most_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
