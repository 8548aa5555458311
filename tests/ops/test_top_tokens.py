"""The most probable tokens against sorting whole logits, on 1, 2 and 4 ranks."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron.ops import top_tokens as module
from minitron.ops.logit_kl import logit_kl
from minitron.ops.objectives import Logits
from minitron.ops.steps import completed
from minitron.ops.top_tokens import TopKL, top_tokens
from tests.harness import run_distributed
from tests.ops.shards import DTYPES, B, S, shard

VOCAB = 301


def _inputs(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(S, B, VOCAB, generator=generator) + 300
    logits[1, :, 10:] = -torch.inf  # ten tokens are possible
    logits[2] = logits[2].round()  # ties
    return logits.to(dtype)


def _expected(logits, k, p, temperature):
    log_q = F.log_softmax(logits.double() / temperature, -1)
    ids = log_q.argsort(dim=-1, descending=True, stable=True)[..., :k]
    log_q = log_q.gather(-1, ids)
    keep = log_q > -torch.inf
    if p is not None:
        for i in range(S):
            for j in range(B):
                mass = 0.0
                for at in range(keep.size(-1)):
                    keep[i, j, at] &= mass < p
                    mass += log_q[i, j, at].exp().item()
    return torch.where(keep, ids, -1), torch.where(keep, log_q, -torch.inf)


def _run(rank, size, group, seed, dtype, k, p):
    logits, valid = shard(_inputs(seed, dtype), rank, size)
    return top_tokens(logits, k, p=p, valid_columns=valid, temperature=1.7, tp_group=group)


def _on_rank(*args):
    return _run(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, *args)


def _check(ranks, seed, dtype, k, p):
    ids, log_q = _expected(_inputs(seed, dtype), k, p, 1.7)
    for found, log_probabilities in ranks:
        assert torch.equal(found, ids)
        torch.testing.assert_close(log_probabilities.double(), log_q, rtol=2e-6, atol=2e-6)


@DTYPES
@pytest.mark.parametrize("k", [1, 20, VOCAB])
@pytest.mark.parametrize("p", [None, 0.5, 0.99])
def test_choice(dtype, k, p, seed):
    _check([_run(0, 1, None, seed, dtype, k, p)], seed, dtype, k, p)


@DTYPES
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("k", "p"), [(20, None), (VOCAB, 0.9), (60, 0.9)])
def test_choice_over_ranks(dtype, world_size, k, p, seed):
    ranks = run_distributed(_on_rank, world_size, seed, dtype, k, p)
    _check([(ids[..., :k], log_q[..., :k]) for ids, log_q in ranks], seed, dtype, k, p)


def test_top_k_is_never_more_than_the_vocabulary():
    ids, log_q = top_tokens(torch.randn(2, 1, 7), 100, valid_columns=5)
    assert ids.shape == log_q.shape == (2, 1, 7)
    assert ids.sort(-1).values.tolist() == [[[-1, -1, 0, 1, 2, 3, 4]]] * 2


def _rows(dtype, columns):
    rows = 3 * torch.randn(9, columns) + 300
    rows[1, 2:] = -torch.inf
    rows[2] = rows[2].round()  # ties
    rows[3] = 5.0
    rows[4, columns // 2] = torch.nan  # taken for the largest
    rows[5] = torch.linspace(0, 300, columns)
    rows[6] = -torch.inf
    rows[7] = torch.nan  # masked
    return rows.to(dtype), torch.arange(9) != 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("columns", "k"), [(5, 1), (5, 9), (333, 1), (333, 40), (333, 333), (20001, 1), (20001, 300)]
)
def test_kernel_equals_its_reference(dtype, columns, k, device):
    rows, mask = (x.to(device) for x in _rows(dtype, columns + 7))
    arguments = (rows, mask, k, columns, 4 * columns, 1.7)
    found = torch.ops.minitron.top_candidates(*arguments)
    expected = module._candidates(*arguments)
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=1e-5, atol=0, equal_nan=True)
    found[:, 1] = expected[:, 1] = 0
    found[4, 0] = expected[4, 0]  # beside a NaN
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_keeps_the_contract_of_torch(dtype, device):
    rows, mask = torch.randn(6, 40).to(device, dtype), torch.rand(6, device=device) < 0.5
    arguments = (rows, mask, 7, 33, 80, 1.3)
    torch.library.opcheck(torch.ops.minitron.top_candidates, arguments)


def test_the_whole_kl_is_not_swept_unless_asked_for(monkeypatch):
    student, teacher = torch.randn(2, 6, 40)
    logits = Logits(student, teacher, 40)
    losses, _ = completed(TopKL(7).losses(logits))
    monkeypatch.delattr(module, "kl_losses")
    unasked, _ = completed(TopKL(7).losses(dataclasses.replace(logits, forward_kl=False)))
    assert torch.equal(unasked.objective, losses.objective)
    torch.testing.assert_close(
        losses.forward_kl, logit_kl(student[:, None], teacher[:, None], valid_columns=40)[:, 0]
    )
