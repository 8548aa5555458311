"""Rows of logits as long as vocabularies are: those that CUDA gives to many blocks, and far apart.

On a GPU of compute capability 9.0 or more the lengths below take the fused path through clusters of
1, 2, 4 and 8 blocks, and past those. Short rows are the same test of other paths, without a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from minitron.ops.logit_kl import (
    logit_kl_fused,
    logit_kl_gradient,
    logit_kl_merge,
    logit_kl_statistics,
)

TOKENS, PADDING, TEMPERATURE = 6, 13, 1.3
SHORT, LONG = 2477, (20_000, 40_000, 128_256 + 5, 300_000)
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8}
ROWS = pytest.mark.parametrize(
    ("device", "columns"),
    [("cpu", SHORT), *[pytest.param("cuda", n, marks=pytest.mark.gpu) for n in LONG]],
)
DTYPES = pytest.mark.parametrize("dtype", ROUNDING, ids=str)


def _rows(columns, dtype, device, start, stride):
    """Rows of a larger memory, in which nothing else is a number."""
    memory = torch.full((TOKENS, stride), torch.nan, device=device, dtype=dtype)
    rows = memory[:, start : start + columns + PADDING]
    rows.copy_(3 * torch.randn(TOKENS, columns + PADDING, device=device))
    return rows


def _others(columns, device):
    """Labels, mask and the weights of the four losses."""
    labels = torch.randint(columns, (TOKENS,), device=device)
    labels[:3] = torch.tensor([0, columns // 2, columns - 1])
    mask = torch.arange(TOKENS, device=device) != 4
    return labels, mask, torch.rand(4, TOKENS, device=device)


def _fused(student, teacher, labels, mask, weights, columns):
    """Losses and the gradient, which takes the place of the student's logits."""
    options = (columns, TEMPERATURE, True, True)
    statistics = logit_kl_fused(student, teacher, labels, mask, weights, *options, student)
    return logit_kl_merge(statistics[None], mask, TEMPERATURE)[0], student


def _two_sweeps(student, teacher, labels, mask, weights, columns):
    rows, options = (student, teacher, labels, mask), (columns, 0, TEMPERATURE, True, True)
    statistics = logit_kl_statistics(*rows, *options)
    losses, merged = logit_kl_merge(statistics[None], mask, TEMPERATURE)
    logit_kl_gradient(*rows, merged, weights, *options, student)
    return losses, student


def _expected(student, teacher, labels, mask, weights, columns):
    """In fp64; also the probabilities, on whose scale the gradient of a column may be off."""
    s, t = (x[:, :columns].double().masked_fill(~mask[:, None], 0) for x in (student, teacher))
    s.requires_grad_()
    log_p, log_q = F.log_softmax(s / TEMPERATURE, -1), F.log_softmax(t / TEMPERATURE, -1)
    losses = torch.stack(
        [
            (log_q.exp() * (log_q - log_p)).sum(-1),
            (log_p.exp() * (log_p - log_q)).sum(-1),
            F.cross_entropy(s, labels, reduction="none"),
            s.logsumexp(-1).square(),
        ]
    )
    losses = torch.where(mask, losses, 0)
    (grad,) = torch.autograd.grad(losses, s, weights.double())
    return losses.detach(), grad, (log_p.exp() + log_q.exp() + s.softmax(-1)).detach()


def _check(path, student, teacher, *others):
    columns, mask = others[-1], others[1]
    losses, grad, probabilities = _expected(student, teacher, *others)
    student[~mask] = teacher[~mask] = torch.nan  # masked tokens are not read
    found, found_grad = path(student, teacher, *others)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    assert found_grad[:, columns:].count_nonzero() == 0
    # However improbable a token, its own part of the gradient has to be right.
    off = (found_grad[:, :columns].double() - grad).abs()
    assert (off <= ROUNDING[student.dtype] * grad.abs() + 1e-3 * probabilities).all(), off.max()
    return found, found_grad


@ROWS
@DTYPES
@pytest.mark.parametrize("start", [0, 3], ids=["aligned", "misaligned"])
def test_many_blocks_to_a_row(columns, dtype, start, device, seed):
    stride = (columns + PADDING + 23) // 8 * 8 + start
    student, teacher = (_rows(columns, dtype, device, start, stride) for _ in range(2))
    others = (*_others(columns, device), columns)
    memory = student._base.clone()
    fused = _check(_fused, student.clone(), teacher, *others)
    in_place = _check(_fused, student, teacher, *others)
    assert torch.equal(in_place[1], fused[1])
    written = memory[:, start : start + columns + PADDING]
    written.copy_(student)
    torch.testing.assert_close(student._base, memory, rtol=0, atol=0, equal_nan=True)


@ROWS
@DTYPES
def test_many_blocks_give_what_two_sweeps_give(columns, dtype, device, seed):
    stride = columns + PADDING
    student, teacher = (_rows(columns, dtype, device, 0, stride) for _ in range(2))
    others = (*_others(columns, device), columns)
    losses, grad = _check(_two_sweeps, student.clone(), teacher.clone(), *others)
    fused_losses, fused_grad = _check(_fused, student, teacher, *others)
    torch.testing.assert_close(fused_losses, losses, rtol=1e-5, atol=1e-5)
    one_digit = 2.0**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(fused_grad, grad, rtol=one_digit, atol=5e-6)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("path", [_fused, _two_sweeps])
def test_rows_more_than_two_billion_elements_apart(path, device, seed):
    columns, apart = 20_000, 2**29
    width = columns + PADDING
    memory = torch.empty((TOKENS - 1) * apart + 2 * width, device=device, dtype=torch.bfloat16)
    student, teacher = (
        memory.as_strided((TOKENS, width), (apart, 1), start) for start in (0, width)
    )
    for rows in (student, teacher):
        rows.copy_(3 * torch.randn(TOKENS, width, device=device))
    assert (TOKENS - 1) * student.stride(0) > 2**31
    _check(path, student, teacher, *_others(columns, device), columns)
