"""Ops whose tests run on the CPU alone: the same on a GPU."""

import pytest
import torch

from minitron.ops import divergences, logit_moments, sparse_kl

TOKENS, COLUMNS, VALID, KNOWN, TEMPERATURE = 15, 8209, 8200, 9, 1.7
KINDS = ("jsd", "skew_kl", "skew_reverse_kl", "tvd")


def _draws(dtype):
    student, teacher = (3 * torch.randn(2, TOKENS, COLUMNS)).to(dtype)
    student[1, 40:60] = teacher[:, 50:70] = -torch.inf
    labels = torch.randint(VALID, (TOKENS,))
    return student, teacher, labels, torch.rand(TOKENS) < 0.7


def _of_divergences(dtype, kind):
    student, teacher, labels, mask = _draws(dtype)
    rows = (student, teacher, labels, mask)
    statistics = torch.ops.minitron.logit_kl_statistics(*rows, VALID, 0, TEMPERATURE, True, True)
    _, merged = torch.ops.minitron.logit_kl_merge(statistics[None], mask, TEMPERATURE)
    sums = (student, teacher, mask, merged, kind, 0.3, VALID, TEMPERATURE)
    gradient = (*rows, merged, torch.randn(TOKENS), torch.rand(2, TOKENS), kind, 0.3)
    return {
        divergences.divergence_sums: sums,
        divergences.divergence_gradient: (*gradient, VALID, 0, TEMPERATURE, student.clone()),
    }


def _of_moments(dtype):
    student, teacher, labels, mask = _draws(dtype)
    normalizers, coefficients = torch.rand(TOKENS, 8) + 20, torch.randn(TOKENS, 4)
    gradient = (student, teacher, labels, mask, normalizers, coefficients, torch.rand(TOKENS))
    return {
        logit_moments.logit_moments: (student, teacher, mask, VALID),
        logit_moments.logit_moments_gradient: (*gradient, VALID, 0, student.clone()),
    }


def _of_sparse_kl(dtype):
    student, _, labels, mask = _draws(dtype)
    ids = torch.stack([torch.randperm(VALID)[:KNOWN] for _ in range(TOKENS)])
    ids[2, ::2] = -1
    weights = torch.rand(TOKENS, KNOWN) / KNOWN
    rows = (student, ids, weights, labels, mask)
    merged = torch.rand(TOKENS, 6) + 20
    options = (VALID, 0, TEMPERATURE)
    upstream = torch.rand(2, TOKENS)
    return {
        sparse_kl.sparse_kl_statistics: (*rows, *options),
        sparse_kl.sparse_kl_gradient: (*rows, merged, upstream, *options, student.clone()),
    }


def _moved(arguments, device):
    return [a.to(device, copy=True) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [*KINDS, "moments", "sparse"])
def test_both_devices_agree(family, dtype):
    families = {"moments": _of_moments, "sparse": _of_sparse_kl}
    ops = families[family](dtype) if family in families else _of_divergences(dtype, family)
    for op, arguments in ops.items():
        results = []
        for device in ("cpu", "cuda"):
            moved = _moved(arguments, device)
            returned = op(*moved)
            result = returned if returned is not None else moved[-1]
            results.append(result.cpu().float())
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
