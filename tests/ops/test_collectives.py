"""How many collectives a loss takes, and what goes on meanwhile: a profile tells, on two ranks."""

import pytest
import torch
import torch.distributed as dist

from minitron.ops.cross_entropy import cross_entropy
from minitron.ops.linear_kl import TeacherHidden, linear_kl
from minitron.ops.logit_loss import logit_loss
from tests.harness import run_distributed
from tests.ops.definitions import OBJECTIVES

S, B, H, WIDTH = 6, 2, 8, 20


def _letter(op):
    if op.startswith("c10d::"):
        return "C"
    return {"aten::mm": "m", "aten::addmm_": "a", "_c10d_functional::wait_tensor": "W"}.get(op, "")


def _profiled(run):
    """Matrix products, Collectives and Waiting, a letter each, in the order of their start."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    return "".join(_letter(event.name) for event in events)


def _whole_logits_on_rank():
    def losses(name):
        student = torch.randn(S, B, WIDTH, requires_grad=True)
        teacher, labels = torch.randn(S, B, WIDTH), torch.zeros(S, B, dtype=torch.int64)
        options = {"valid_columns": WIDTH, "tp_group": dist.group.WORLD}
        if name == "cross_entropy":
            return cross_entropy(student, labels, **options)
        return logit_loss(student, teacher, OBJECTIVES[name], **options)

    names = ("cross_entropy", *OBJECTIVES)
    return {name: _profiled(lambda name=name: losses(name).sum().backward()) for name in names}


def _chunks_on_rank(differentiate):
    hidden = torch.randn(S, B, H, requires_grad=differentiate)
    head, teacher = (
        torch.randn(WIDTH, H),
        TeacherHidden(torch.randn(S, B, H), torch.randn(WIDTH, H)),
    )
    weights, group = torch.ones(S, B), dist.group.WORLD
    options = {"valid_columns": WIDTH, "chunk_tokens": S * B // 4, "tp_group": group}
    return _profiled(lambda: linear_kl(hidden, head, teacher, token_weights=weights, **options))


def test_collectives_of_whole_logits():
    for found in run_distributed(_whole_logits_on_rank, 2):
        one = ("cross_entropy", "forward_kl", "reverse_kl", "mse", "cosine")
        assert {found.pop(name) for name in one} == {"CW"}
        assert set(found.values()) == {"CWCW"}


@pytest.mark.parametrize("differentiate", [False, True])
def test_a_chunk_goes_through_the_heads_while_the_one_before_is_exchanged(differentiate):
    """Two products a chunk, then its one collective; that is awaited after the next one's began."""
    gradients = "ma" if differentiate else ""
    steps = ["mmC", *["mmCW" + gradients] * 3, "W" + gradients]
    assert run_distributed(_chunks_on_rank, 2, differentiate) == ["".join(steps)] * 2
