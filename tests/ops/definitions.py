"""The objectives as their papers define them, token by token, for fp64 and autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.divergences import Divergence
from minitron.ops.logit_moments import LogitDistance
from minitron.ops.objectives import KL, Objective
from minitron.ops.top_tokens import TopKL

BETA, ALPHA, K, P = 0.3, 0.1, 20, 0.9
OBJECTIVES: dict[str, Objective] = {
    "forward_kl": KL(),
    "reverse_kl": KL(reverse=True),
    "jsd": Divergence("jsd", BETA),
    "skew_kl": Divergence("skew_kl", ALPHA),
    "skew_reverse_kl": Divergence("skew_reverse_kl", ALPHA),
    "tvd": Divergence("tvd"),
    "mse": LogitDistance("mse"),
    "cosine": LogitDistance("cosine"),
    "top_k": TopKL(K),
    "top_p": TopKL(K, P),
}


def objective(name: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The loss [...] between whole logits [..., v], differentiable by the student's."""
    rows = zip(student.flatten(0, -2), teacher.flatten(0, -2), strict=True)
    losses = [_of_token(name, s / temperature, t / temperature) for s, t in rows]
    return torch.stack(losses).view(student.shape[:-1])


def _of_token(name: str, s: Tensor, t: Tensor) -> Tensor:
    if name in ("mse", "cosine"):
        finite = (s > -torch.inf) & (t > -torch.inf)
        s, t = s[finite], t[finite]
        if name == "mse":
            return (s - t).var(unbiased=False)
        return 1 - F.cosine_similarity(s - s.mean(), t - t.mean(), dim=0, eps=0)
    p, q = _softmax(s), _softmax(t)
    match name:
        case "forward_kl":
            return _kl(q, p)
        case "reverse_kl":
            return _kl(p, q)
        case "jsd":
            mixture = BETA * q + (1 - BETA) * p
            return BETA * _kl(q, mixture) + (1 - BETA) * _kl(p, mixture)
        case "skew_kl":
            return _kl(q, ALPHA * q + (1 - ALPHA) * p)
        case "skew_reverse_kl":
            return _kl(p, (1 - ALPHA) * q + ALPHA * p)
        case "tvd":
            return (p - q).abs().sum() / 2
        case "top_k" | "top_p":
            order = t.argsort(descending=True, stable=True)[:K]
            if name == "top_p":
                order = order[: int((q[order].cumsum(0) < P).sum()) + 1]
            return _kl(_bins(q, order), _bins(p, order))
    raise ValueError(name)


def _softmax(x: Tensor) -> Tensor:
    finite = x > -torch.inf
    return torch.where(finite, (x.masked_fill(~finite, 0) - x.logsumexp(0)).exp(), 0)


def _bins(p: Tensor, columns: Tensor) -> Tensor:
    others = torch.ones_like(p, dtype=torch.bool)
    others[columns] = False
    return torch.cat([p[columns], p[others].sum()[None]])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    return (p[some] * (p[some].log() - q[some].log())).sum()
