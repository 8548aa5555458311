"""Ops whose tests run on the CPU alone: the same on a GPU."""

import pytest
import torch

from minitron.ops import sparse_kl

TOKENS, COLUMNS, VALID, KNOWN, TEMPERATURE = 15, 8209, 8200, 9, 1.7


def _draws(dtype):
    torch.seed()
    student = (3 * torch.randn(TOKENS, COLUMNS)).to(dtype)
    student[1, 40:60] = -torch.inf
    labels = torch.randint(VALID, (TOKENS,))
    return student, labels, torch.rand(TOKENS) < 0.7


def _of_sparse_kl(dtype):
    student, labels, mask = _draws(dtype)
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
def test_both_devices_agree(dtype):
    for op, arguments in _of_sparse_kl(dtype).items():
        results = []
        for device in ("cpu", "cuda"):
            moved = _moved(arguments, device)
            returned = op(*moved)
            result = returned if returned is not None else moved[-1]
            results.append(result.cpu().float())
        tolerance = 2.0**-8 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
