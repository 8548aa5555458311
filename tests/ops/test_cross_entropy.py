"""The cross-entropy kernels against fp64 autograd; on ranks, test_losses.py."""

import math

import pytest
import torch
import torch.nn.functional as F

from minitron.ops import cross_entropy as module
from minitron.ops import library
from minitron.ops.cross_entropy import cross_entropy

S, B = 5, 3
DTYPES = pytest.mark.parametrize(
    ("dtype", "grad_tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 4e-6), (torch.bfloat16, 2.0**-8)],
    ids=["fp64", "fp32", "bf16"],
)


def _inputs(dtype, vocabulary, offset=0.0, device="cpu"):
    logits = (3 * torch.randn(S, B, vocabulary, device=device) + offset).to(dtype)
    labels = torch.randint(vocabulary, (S, B), device=device)
    return logits, labels, torch.rand(S, B, device=device)


def _expected(logits, labels, upstream):
    x = logits.double().clone().requires_grad_()
    losses = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (losses * upstream.double()).sum().backward()
    return losses.detach(), x.grad


def _check(logits, labels, upstream, grad_tolerance):
    vocabulary = logits.size(-1)
    padded = F.pad(logits, (0, 13), value=50.0).requires_grad_()
    losses = cross_entropy(padded, labels, valid_columns=vocabulary)
    (losses * upstream).sum().backward()
    expected, grad = _expected(logits, labels, upstream)
    tolerance = 1e-12 if logits.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        padded.grad[..., :vocabulary].double(), grad, rtol=grad_tolerance, atol=grad_tolerance / 4
    )
    assert padded.grad[..., vocabulary:].count_nonzero() == 0


@DTYPES
@pytest.mark.parametrize("vocabulary", [1, 15, 33, 4097, 8209])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_losses_and_gradient(dtype, grad_tolerance, vocabulary, offset, device):
    _check(*_inputs(dtype, vocabulary, offset, device), grad_tolerance)


@DTYPES
def test_rising_logits_leave_the_first_tiles_reference_behind(dtype, grad_tolerance, device):
    logits, labels, upstream = _inputs(dtype, 9000, device=device)
    logits = (logits.double() + torch.linspace(0, 400, 9000, device=device)).to(dtype)
    _check(logits, labels, upstream, grad_tolerance)


@DTYPES
def test_a_lone_logit_far_above_the_first_tile(dtype, grad_tolerance, device):
    logits, labels, upstream = _inputs(dtype, 9000, device=device)
    logits[..., 8500] = 150.0
    _check(logits, labels, upstream, grad_tolerance)


@DTYPES
def test_impossible_tokens(dtype, grad_tolerance, device):
    logits, labels, upstream = _inputs(dtype, 5000, device=device)
    logits[..., 4990:] = -math.inf
    logits[1, 1, :4600] = -math.inf  # a whole tile
    _check(logits, labels.clamp(4600, 4989), upstream, grad_tolerance)
    labels[2, 2] = 4995
    assert cross_entropy(logits, labels, valid_columns=5000)[2, 2] == math.inf


def test_strided_rows(device):
    logits, labels, _ = _inputs(torch.float32, 700, device=device)
    labels = labels.clamp(max=599)
    cut = logits[..., 3:610]
    whole = cross_entropy(cut.contiguous(), labels, valid_columns=600)
    assert torch.equal(cross_entropy(cut, labels, valid_columns=600), whole)


def _op_arguments(device="cpu"):
    logits, labels, upstream = _inputs(torch.float32, 70, device=device)
    rows, labels = logits.flatten(0, 1), labels.flatten()
    merged = torch.ops.minitron.cross_entropy_statistics(rows, labels, 66, 0)
    return {
        "cross_entropy_statistics": (rows, labels, 66, 0),
        "cross_entropy_gradient": (rows, labels, merged, upstream.flatten(), 66, 0),
        "cross_entropy": (rows.clone().requires_grad_(), labels, 66, None),
    }


@pytest.mark.parametrize("name", list(_op_arguments()))
def test_ops_keep_the_contract_of_torch(name, device):
    torch.library.opcheck(getattr(torch.ops.minitron, name), _op_arguments(device)[name])


@pytest.mark.parametrize("offset", [0, 50, -50])
@pytest.mark.skipif(not library.extension_built, reason="the extension is not built")
def test_kernels_equal_their_references(offset, device):
    arguments = _op_arguments(device)
    rows, labels, merged, upstream, *_ = arguments["cross_entropy_gradient"]
    ops = torch.ops.minitron
    m, a, l = ops.cross_entropy_statistics(rows, labels, 66, offset).unbind(1)  # noqa: E741
    n, b, k = module._reference_statistics(rows, labels, 66, offset).unbind(1)
    torch.testing.assert_close(m + a.log(), n + b.log())
    torch.testing.assert_close(l, k)
    torch.testing.assert_close(
        ops.cross_entropy_gradient(rows, labels, merged, upstream, 66, offset),
        module._reference_gradient(rows, labels, merged, upstream, 66, offset),
    )
