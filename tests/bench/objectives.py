"""Divergences and distances of materialised logits, forward and backward, at τ = 1.

`eager` is how they are usually written: fp32 copies, `softmax` and `log_softmax`, autograd; over
chosen tokens `topk`, and what is left of the probability as one bin. `logit_kl` has a bench of its
own. What another heap and another vocabulary cost shows there too, so these run on a warm heap and
one vocabulary alone.
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
from minitron.ops.objectives import KL, Objective
from minitron.ops.top_tokens import TopKL
from tests.bench.runner import Case, compile_alone

TOKENS, VOCABULARY = 1024, 32000
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
K, P = 256, 0.95
OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": KL(reverse=True),
    "jsd": Divergence("jsd", 0.5),
    "skew_kl": Divergence("skew_kl", 0.1),
    "tvd": Divergence("tvd"),
    "mse": LogitDistance("mse"),
    "cosine": LogitDistance("cosine"),
    "top_k": TopKL(K),
    "top_p": TopKL(K, P),
}
# Logits that must be read: two for each sweep of both, and one where it is the student's alone.
_READS = {
    **dict.fromkeys(("reverse_kl", "mse", "cosine"), 4),
    **dict.fromkeys(("jsd", "skew_kl", "tvd"), 6),
    **dict.fromkeys(("top_k", "top_p"), 3),
}


def eager(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """The loss per token from whole tensors."""
    s, t = student.float(), teacher.float()
    if name in ("mse", "cosine"):
        s, t = s - s.mean(-1, keepdim=True), t - t.mean(-1, keepdim=True)
        if name == "mse":
            return (s - t).square().mean(-1)
        return 1 - torch.cosine_similarity(s, t, dim=-1)
    if name == "tvd":
        return (s.softmax(-1) - t.softmax(-1)).abs().sum(-1) / 2
    log_p, log_q = F.log_softmax(s, -1), F.log_softmax(t, -1)
    if name in ("top_k", "top_p"):
        return _over_chosen(log_p, log_q, name)
    p, q = log_p.exp(), log_q.exp()
    if name == "reverse_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "skew_kl":
        return (q * (log_q - (0.1 * q + 0.9 * p).log())).sum(-1)
    log_m = (0.5 * q + 0.5 * p).log()
    return (0.5 * q * (log_q - log_m) + 0.5 * p * (log_p - log_m)).sum(-1)


def _over_chosen(log_p: Tensor, log_q: Tensor, name: str) -> Tensor:
    chosen_q, ids = log_q.topk(K, dim=-1)
    q = chosen_q.exp()
    chosen_p = log_p.gather(-1, ids)
    p = chosen_p.exp()
    if name == "top_p":
        keep = q.cumsum(-1) - q < P
        q, p = q * keep, p * keep
    rest_q, rest_p = (1 - x.sum(-1).clamp(max=1 - 1e-6) for x in (q, p))
    return (q * (chosen_q - chosen_p)).sum(-1) + rest_q * (rest_q.log() - rest_p.log())


def cases(device: str) -> Iterator[Case]:
    """Every loss in the dtypes of a device."""
    for name in OBJECTIVES:
        for dtype in DTYPES[device]:
            yield _case(name, dtype, device)


def _case(name: str, dtype: torch.dtype, device: str) -> Case:
    draw = functools.partial(torch.randn, TOKENS, 1, VOCABULARY, device=device)
    student, teacher = draw().mul_(3).to(dtype).requires_grad_(), draw().mul_(3).to(dtype)
    upstream = torch.rand(TOKENS, 1, device=device)
    compiled = compile_alone(eager)

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
        floor_bytes={
            **dict.fromkeys(("eager", "torch.compile"), (min(4, _READS[name]) + 1) * element),
            "sweeps": (_READS[name] + 1) * element,
        },
    )
