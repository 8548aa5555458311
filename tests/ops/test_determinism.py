"""Every op gives the same bits again, and on a CPU whatever the number of threads."""

import functools

import pytest
import torch

from minitron.ops.activation_stats import activation_stats
from minitron.ops.block_cosine import block_cosine
from minitron.ops.cross_entropy import cross_entropy
from minitron.ops.linear_kl import TeacherHidden, linear_kl
from minitron.ops.logit_kl import logit_losses
from minitron.ops.logit_loss import logit_loss
from minitron.ops.objectives import KL, KnownTokens, Logits
from minitron.ops.sample_tokens import sample_tokens
from minitron.ops.sparse_kl import SparseKL
from minitron.ops.top_tokens import top_tokens
from tests.ops.definitions import OBJECTIVES

S, B, VOCAB = 24, 2, 9001
OPTIONS = {"valid_columns": VOCAB - 1, "temperature": 1.7}


def _with_gradients(losses, *inputs):
    return [losses.detach(), *torch.autograd.grad(losses.sum(), inputs)]


def _two_sweeps(student, teacher, labels):
    x = student.requires_grad_()
    found = logit_losses(x, teacher, labels=labels, reverse=True, z_loss=True, **OPTIONS)
    return _with_gradients(torch.stack(found), x)


def _fused(student, teacher, labels):
    rows = Logits(student.flatten(0, 1), teacher.flatten(0, 1), labels=labels.flatten(), **OPTIONS)
    return [*KL().fused(rows, torch.ones(2, S * B, device=student.device)), rows.student]


def _objective(name, student, teacher, labels):
    x = student.requires_grad_()
    return _with_gradients(logit_loss(x, teacher, OBJECTIVES[name], **OPTIONS), x)


def _sparse(student, teacher, labels):
    x, known = student.requires_grad_(), KnownTokens(*top_tokens(teacher, 20, **OPTIONS))
    return [*known, *_with_gradients(logit_loss(x, known, SparseKL(tail=True), **OPTIONS), x)]


def _cross_entropy(student, teacher, labels):
    x = student.requires_grad_()
    return _with_gradients(cross_entropy(x, labels, valid_columns=VOCAB - 1), x)


def _linear_kl(student, teacher, labels):
    hidden = student[..., : S * B].clone().requires_grad_()
    head = student.flatten(0, 1).t().contiguous().requires_grad_()
    states = TeacherHidden(teacher[..., : S * B], head.detach().flip(0))
    weights = torch.ones(S, B, device=student.device)
    found = linear_kl(hidden, head, states, token_weights=weights, chunk_tokens=20, **OPTIONS)
    return _with_gradients(found.loss, hidden, head)


BY_ROWS = {  # a row of logits, or a channel, is one thread's
    "logit_kl, two sweeps": _two_sweeps,
    "logit_kl, fused": _fused,
    **{name: functools.partial(_objective, name) for name in OBJECTIVES},
    "sparse_kl": _sparse,
    "cross_entropy": _cross_entropy,
    "sample_tokens": lambda student, teacher, labels: sample_tokens(
        teacher, torch.full_like(labels, 0.3, dtype=torch.float64), 9, **OPTIONS
    ),
    "activation_stats": lambda student, *_: activation_stats(student),
    "activation_stats of heads": lambda student, *_: activation_stats(student[..., 1:], group=100),
    "block_cosine": lambda student, teacher, labels: [block_cosine(student, teacher)],
}
OPS = {**BY_ROWS, "linear_kl": _linear_kl}


def _run(name, seed, dtype, device):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, S, B, VOCAB, generator=generator)
    labels = torch.randint(VOCAB - 1, (S, B), generator=generator)
    return OPS[name](student.to(device, dtype), teacher.to(device, dtype), labels.to(device))


def _assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(OPS))
def test_the_same_bits_every_time(name, dtype, device, seed):
    first, second = (_run(name, seed, dtype, device) for _ in range(2))
    _assert_equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(BY_ROWS))
def test_the_same_bits_on_any_number_of_threads(name, dtype, seed):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run(name, seed, dtype, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        _assert_equal(results[0], other)
