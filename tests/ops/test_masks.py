"""Of a masked token no logit matters, whatever stands there: every op that takes a mask."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron.ops.logit_kl import logit_kl
from minitron.ops.logit_loss import logit_loss
from minitron.ops.objectives import KL, KnownTokens, Logits
from minitron.ops.sparse_kl import SparseKL
from minitron.ops.steps import completed
from minitron.ops.top_tokens import top1_agreement
from tests.ops.definitions import OBJECTIVES

TOKENS, COLUMNS, KNOWN = 9, 70, 5


class Seen(TorchDispatchMode):
    """Notes the names of the package's ops that were called with a mask."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "minitron" and any(x.name == "mask" for x in op._schema.arguments):
            self.names.add(op.name())
        return op(*args, **(kwargs or {}))


def _draws(dtype, device):
    student, teacher = (torch.randn(TOKENS, COLUMNS, device=device).to(dtype) for _ in range(2))
    ids = torch.stack([torch.randperm(COLUMNS - 4)[:KNOWN] for _ in range(TOKENS)]).to(device)
    known = KnownTokens(ids, torch.full((TOKENS, KNOWN), -2.0, device=device))
    mask = torch.rand(TOKENS, device=device) < 0.5
    mask[0], mask[1] = False, True
    labels = torch.arange(TOKENS, device=device)
    return Logits(student, teacher, COLUMNS - 4, 1.3, labels, mask=mask), known


def _everything(rows, known):
    """Losses and gradients of all objectives, and more that reads logits."""
    sparse = dataclasses.replace(rows, teacher=known)
    weights = torch.ones(2, TOKENS, device=rows.student.device, dtype=torch.float32)
    weights = weights.to(torch.promote_types(weights.dtype, rows.student.dtype))
    cases = [(objective, rows) for objective in OBJECTIVES.values()]
    for objective, logits in [*cases, (SparseKL(tail=True), sparse)]:
        losses, saved = completed(objective.losses(logits))
        gradient = torch.empty_like(logits.student)
        objective.gradient(logits, saved, weights, gradient)
        yield from (*losses, gradient)
    fused = dataclasses.replace(rows, student=rows.student.clone())
    yield from (*KL().fused(fused, weights), fused.student)
    yield from (completed(top1_agreement(x)) for x in (rows, sparse))
    whole = {"valid_columns": rows.valid_columns, "loss_mask": rows.mask[None]}
    for loss in (
        logit_kl(rows.student[None], rows.teacher[None], **whole),
        logit_loss(rows.student[None], rows.teacher[None], KL(), **whole),
    ):
        yield loss[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_logits_do_not_matter(dtype, device):
    rows, known = _draws(dtype, device)
    with Seen() as seen:
        plain = list(_everything(rows, known))
        for logits in (rows.student, rows.teacher):
            logits[~rows.mask] = torch.nan
        found = list(_everything(rows, known))
    for one, other in zip(plain, found, strict=True):
        assert torch.equal(one, other)
        assert one[~rows.mask].count_nonzero() == 0
    if dtype != torch.float64:  # for which no op is called
        ops = [getattr(torch.ops.minitron, name).default for name in torch.ops.minitron]
        with_mask = {op.name() for op in ops if any(x.name == "mask" for x in op._schema.arguments)}
        assert len(with_mask) >= 12
        assert seen.names == with_mask
