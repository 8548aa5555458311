"""Forward KL of materialised logits, forward and backward, at τ = 2.

`eager` is the formulation of the peers with tensor-parallel distillation: fp32 copies, shifted by
their maxima, log-probabilities, `kl_div` in log space, autograd. "In place" writes the
gradient over the student's logits, so that no memory has to be mapped for it. "Fused" is what
`linear_kl` takes where the vocabulary is whole: losses and gradient, below autograd, into memory
that is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.logit_kl import logit_kl, logit_kl_fused, logit_kl_merge
from tests.bench.runner import COPY, Case, compile_alone

TEMPERATURE = 2.0
SHAPES = {
    "cpu": ((2048, 32000), (512, 128256)),
    "cuda": ((8192, 16032), (8192, 128256)),  # the first is a shard of the second at TP=8
}
GPU_TARGET = {"eager": 8.0, "torch.compile": 1.5, COPY: 0.75}
GPU_TARGETS = {"two sweeps": GPU_TARGET, "fused": GPU_TARGET}
TARGETS = {
    ("cpu", torch.float32): {
        "two sweeps": {"eager": 4.5, "torch.compile": 2.2},
        "fused": {"eager": 7.0, "torch.compile": 3.0},
    },
    ("cpu", torch.bfloat16): {
        "two sweeps": {"eager": 7.5, "torch.compile": 3.5},
        "fused": {"eager": 9.5, "torch.compile": 5.0},
    },
    ("cuda", torch.float32): GPU_TARGETS,
    ("cuda", torch.bfloat16): GPU_TARGETS,
}


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """KL per token as the peers compute it."""

    def log_probabilities(logits: Tensor) -> Tensor:
        x = logits.float() / TEMPERATURE
        x = x - x.amax(-1, keepdim=True).detach()
        return x - x.exp().sum(-1, keepdim=True).log()

    with torch.no_grad():
        target = log_probabilities(teacher)
    return F.kl_div(log_probabilities(student), target, reduction="none", log_target=True).sum(-1)


def cases(device: str) -> Iterator[Case]:
    """Both vocabularies in both dtypes."""
    for tokens, vocabulary in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(tokens, vocabulary, dtype, device)


def _case(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    def draw() -> Tensor:
        return torch.randn(tokens, 1, vocabulary, device=device).mul_(3).to(dtype)

    student, teacher = draw().requires_grad_(), draw()
    upstream = torch.rand(tokens, 1, device=device)
    weights = torch.zeros(4, tokens, device=device)
    weights[0] = upstream[:, 0]
    rows, teacher_rows = student.detach()[:, 0], teacher[:, 0]
    overwritten = student.detach().clone().requires_grad_()  # time does not depend on values
    gradient = torch.empty_like(rows)
    compiled = compile_alone(eager)
    options = {"valid_columns": vocabulary, "temperature": TEMPERATURE}

    def fused() -> None:
        tensors = (rows, teacher_rows, None, None, weights)
        statistics = logit_kl_fused(*tensors, vocabulary, TEMPERATURE, False, False, gradient)
        logit_kl_merge(statistics[None], None, TEMPERATURE)

    element = tokens * vocabulary * dtype.itemsize
    return Case(
        op="logit_kl",
        shape=f"[{tokens}, {vocabulary}]",
        dtype=str(dtype).removeprefix("torch."),
        variants={
            "eager": lambda: torch.autograd.grad(eager(student, teacher), student, upstream),
            "torch.compile": lambda: torch.autograd.grad(
                compiled(student, teacher), student, upstream
            ),
            "two sweeps": lambda: torch.autograd.grad(
                logit_kl(student, teacher, **options), student, upstream
            ),
            "two sweeps, in place": lambda: torch.autograd.grad(
                logit_kl(overwritten, teacher, gradient="student", **options), overwritten, upstream
            ),
            "fused": fused,
        },
        floor_bytes={  # both read in the forward and in the backward pass, a gradient written
            **dict.fromkeys(("eager", "torch.compile"), 5 * element),
            **dict.fromkeys(("two sweeps", "two sweeps, in place"), 5 * element),
            "fused": 3 * element,
        },
        targets=TARGETS[device, dtype],
    )
