"""Hidden states of both models to KL and gradients of the student's hidden states and head.

`eager` is what training scripts do with Hugging Face models: both linears, `log_softmax` twice,
`kl_div`. "bare GEMMs" are the four matrix products that nobody can avoid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.linear_kl import CHUNK_TOKENS_ON_CPU, TeacherHidden, linear_kl
from tests.bench.runner import Case, compile_alone
from tests.harness import close_pool, run_distributed


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
    ranks: int = 1
    """That share the vocabulary, on one machine."""


PROBLEMS = {
    "cpu": [
        Problem(512, 1024, 32000, dtype, chunk_tokens=256)
        for dtype in (torch.float32, torch.bfloat16)
    ],
    "cuda": [Problem(8192, 4096, 128256, torch.bfloat16, chunk_tokens=2048)],
}
TARGETS = {"cpu": {"bare GEMMs": 1 / 1.25}, "cuda": {"bare GEMMs": 1 / 1.25, "eager": 1.51}}


def cases(device: str) -> Iterator[Case]:
    """What a device can time."""
    for problem in PROBLEMS[device]:
        yield _case(problem, device)


def _inputs(problem: Problem, device: str) -> list[Tensor]:
    sizes = ((problem.tokens, 1, problem.hidden), (problem.vocabulary, problem.hidden)) * 2
    tensors = [torch.randn(size, device=device).mul_(problem.hidden**-0.25) for size in sizes]
    tensors = [tensor.to(problem.dtype) for tensor in tensors]
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    return tensors


def _step(loss: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    torch.autograd.grad(loss(*inputs).sum(), inputs[:2])


def _fused(chunk_tokens: int, group: dist.ProcessGroup | None = None) -> Callable[..., Tensor]:
    def loss(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return linear_kl(
            student,
            head,
            TeacherHidden(teacher, teacher_head),
            token_weights=torch.ones(student.shape[:2], device=student.device),
            valid_columns=head.size(0),
            chunk_tokens=chunk_tokens,
            tp_group=group,
        ).loss

    return loss


def _case(problem: Problem, device: str) -> Case:
    inputs = _inputs(problem, device)
    student, head, teacher, teacher_head = (x.detach() for x in inputs)
    logits = student.new_empty(problem.tokens, 1, problem.vocabulary)
    compiled, fused = compile_alone(eager), _fused(problem.chunk_tokens)

    def gemms() -> None:
        torch.matmul(teacher, teacher_head.t(), out=logits)
        torch.matmul(student, head.t(), out=logits)
        _ = logits[:, 0] @ head
        _ = logits[:, 0].t() @ student[:, 0]

    hidden, vocabulary = problem.hidden, problem.vocabulary
    gradients = student.nbytes + head.nbytes
    moved = gradients + sum(x.nbytes for x in inputs)
    return Case(
        op="linear_kl",
        shape=f"[{problem.tokens}, {hidden}] x [{vocabulary}, {hidden}],"
        f" chunks of {problem.chunk_tokens}",
        dtype=str(problem.dtype).removeprefix("torch."),
        variants={
            "eager": lambda: _step(eager, inputs),
            "torch.compile": lambda: _step(compiled, inputs),
            "bare GEMMs": gemms,
            "linear_kl": lambda: _step(fused, inputs),
        },
        floor_bytes=dict.fromkeys(("eager", "torch.compile", "bare GEMMs", "linear_kl"), moved),
        targets={"linear_kl": TARGETS[device]},
    )


# Peak memory of linear_kl, and of what it replaces where that fits.
PEAKS = {
    "cpu": [
        ("eager", Problem(1024, 64, 128256, torch.float32, 256)),
        ("linear_kl", Problem(1024, 64, 128256, torch.float32, 256)),
        ("linear_kl", Problem(1024, 64, 128256, torch.float32, 256, ranks=2)),
        ("linear_kl", Problem(8192, 64, 128256, torch.float32, 256)),
        ("linear_kl", Problem(8192, 64, 128256, torch.float32, CHUNK_TOKENS_ON_CPU)),
        ("linear_kl", Problem(8192, 64, 128256, torch.float32, 1024)),
    ],
    "cuda": [(variant, PROBLEMS["cuda"][0]) for variant in ("eager", "linear_kl")],
}


@dataclass(frozen=True)
class Peak:
    """What one step adds to a process's peak, in megabytes, and what it may be."""

    variant: str
    ranks: int
    tokens: int
    hidden: int
    vocabulary: int
    dtype: str
    chunk_tokens: int
    mb: float
    gradients_mb: float
    """Of it, what cannot be had for less: gradients of the hidden states and, in fp32, the head."""
    bound_mb: float
    """For all the rest: 64 bytes a token and both models' logits of a chunk, or of the two that
    are under way at a time where ranks share the vocabulary."""


def peak(number: int, device: str) -> Peak:
    """Of one step of the problem; of several ranks that of the highest."""
    variant, problem = PEAKS[device][number]
    if problem.ranks == 1:
        return _peak(variant, problem, device)
    try:
        peaks = run_distributed(_peak, problem.ranks, variant, problem, device)
    finally:
        close_pool()
    return max(peaks, key=lambda found: found.mb)


def _peak(variant: str, problem: Problem, device: str) -> Peak:
    """Take the step, after a small one for which libraries set memory aside."""
    group = dist.group.WORLD if problem.ranks > 1 else None
    chunk, vocabulary = problem.chunk_tokens, problem.vocabulary // problem.ranks
    loss = {"eager": eager, "linear_kl": _fused(chunk, group)}[variant]
    problem = dataclasses.replace(problem, vocabulary=vocabulary)  # this rank's
    small = dataclasses.replace(problem, tokens=problem.ranks * chunk, vocabulary=vocabulary // 16)
    _step(loss, _inputs(small, device))
    inputs = _inputs(problem, device)
    before = _forget_peak(device)
    _step(loss, inputs)
    added = _peak_bytes(device) - before
    element, hidden = problem.dtype.itemsize, problem.hidden
    gradients = problem.tokens * hidden * element + vocabulary * hidden * 4
    chunks = 2 if problem.ranks > 1 else 1
    return Peak(
        variant,
        problem.ranks,
        problem.tokens,
        hidden,
        vocabulary * problem.ranks,
        str(problem.dtype).removeprefix("torch."),
        chunk,
        added / 1e6,
        gradients / 1e6,
        (64 * problem.tokens + 2 * chunks * chunk * vocabulary * element) / 1e6,
    )


def _forget_peak(device: str) -> int:
    """Begin a new peak; the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes(device)


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])
