"""Cross-entropy of materialised logits, forward and backward.

`eager` is the usual `F.cross_entropy` of fp32 logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.ops.cross_entropy import cross_entropy
from tests.bench.logit_kl import SHAPES
from tests.bench.runner import Case, compile_alone


def eager(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per token."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")


def cases(device: str) -> Iterator[Case]:
    """Both vocabularies in both dtypes."""
    for tokens, vocabulary in SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(tokens, vocabulary, dtype, device)


def _case(tokens: int, vocabulary: int, dtype: torch.dtype, device: str) -> Case:
    logits = torch.randn(tokens, 1, vocabulary, device=device).mul_(3).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens, 1), device=device)
    upstream = torch.rand(tokens, device=device)
    compiled = compile_alone(eager)
    return Case(
        op="cross_entropy",
        shape=f"[{tokens}, {vocabulary}]",
        dtype=str(dtype).removeprefix("torch."),
        variants={
            "eager": lambda: torch.autograd.grad(eager(logits, labels), logits, upstream),
            "torch.compile": lambda: torch.autograd.grad(
                compiled(logits, labels), logits, upstream
            ),
            "two sweeps": lambda: torch.autograd.grad(
                cross_entropy(logits, labels, valid_columns=vocabulary), logits, upstream[:, None]
            ),
        },
        floor_bytes=dict.fromkeys(("eager", "torch.compile", "two sweeps"), 3 * logits.nbytes),
    )
