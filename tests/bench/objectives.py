"""Divergences and distances of materialised logits, forward and backward, at τ = 1.

`eager` is how they are usually written: fp32 copies, `softmax` and `log_softmax`, autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.divergences import Divergence
from minitron.ops.logit_loss import logit_loss
from minitron.ops.logit_moments import LogitDistance
from minitron.ops.objectives import Objective
from tests.bench.runner import Case

TOKENS, VOCABULARY = 1024, 32000
OBJECTIVES: dict[str, Objective] = {
    "jsd": Divergence("jsd", 0.5),
    "skew_kl": Divergence("skew_kl", 0.1),
    "tvd": Divergence("tvd"),
    "mse": LogitDistance("mse"),
    "cosine": LogitDistance("cosine"),
}
_READS = {"jsd": 3, "skew_kl": 3, "tvd": 3, "mse": 2, "cosine": 2}  # of both logits


def eager(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """The loss per token from whole tensors."""
    s, t = student.float(), teacher.float()
    if name in ("mse", "cosine"):
        s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
        if name == "mse":
            return (s - t).square().mean(-1)
        return 1 - torch.cosine_similarity(s, t, dim=-1)
    p, q = s.softmax(-1), t.softmax(-1)
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    log_p, log_q = F.log_softmax(s, -1), F.log_softmax(t, -1)
    if name == "skew_kl":
        return (q * (log_q - (0.1 * q + 0.9 * p).log())).sum(-1)
    log_m = (0.5 * q + 0.5 * p).log()
    return (0.5 * q * (log_q - log_m) + 0.5 * p * (log_p - log_m)).sum(-1)


def cases(device: str) -> Iterator[Case]:
    """Every loss in both dtypes."""
    for name in OBJECTIVES:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(name, dtype, device)


def _case(name: str, dtype: torch.dtype, device: str) -> Case:
    draw = functools.partial(torch.randn, TOKENS, 1, VOCABULARY, device=device)
    student, teacher = draw().mul_(3).to(dtype).requires_grad_(), draw().mul_(3).to(dtype)
    upstream = torch.rand(TOKENS, 1, device=device)
    torch.compiler.reset()  # else the ninth variant of `eager` would no longer be compiled
    compiled = torch.compile(eager)

    def ours() -> object:
        loss = logit_loss(student, teacher, OBJECTIVES[name], valid_columns=VOCABULARY)
        return torch.autograd.grad(loss, student, upstream)

    element = TOKENS * VOCABULARY * dtype.itemsize
    return Case(
        op=f"logit_loss {name}",
        shape=f"[{TOKENS}, {VOCABULARY}]",
        dtype=str(dtype).removeprefix("torch."),
        variants={
            "eager": lambda: torch.autograd.grad(eager(student, teacher, name), student, upstream),
            "torch.compile": lambda: torch.autograd.grad(
                compiled(student, teacher, name), student, upstream
            ),
            "sweeps": ours,
        },
        floor_bytes={"sweeps": (2 * _READS[name] + 1) * element},
    )
