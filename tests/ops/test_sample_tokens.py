"""Systematic draws against the cumulative distribution in fp64, on 1, 2 and 4 ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron.ops.sample_tokens import sample_tokens
from tests.harness import run_distributed
from tests.ops.shards import B, S, shard

VOCAB = 301
DRAWS = 40


def _inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(S, B, VOCAB, generator=generator) + 300
    logits[1, :, 10:] = -torch.inf  # ten tokens are possible
    logits[2, :, 7] = 400  # one token is
    return logits, torch.rand(S, B, generator=generator, dtype=torch.float64)


def _run(rank, size, group, seed):
    logits, uniform = _inputs(seed)
    part, valid = shard(logits, rank, size)
    options = {"valid_columns": valid, "temperature": 1.7, "tp_group": group}
    return sample_tokens(part, uniform, DRAWS, **options)


def _on_rank(seed):
    return _run(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, seed)


def _counts(ids):
    return F.one_hot(ids, VOCAB).sum(-2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_draws_follow_the_cumulative_distribution(world_size):
    ranks = run_distributed(_on_rank, world_size, 3) if world_size > 1 else [_run(0, 1, None, 3)]
    logits, uniform = _inputs(3)
    log_q = F.log_softmax(logits.double() / 1.7, -1)
    cumulative = log_q.exp().cumsum(-1)
    targets = (torch.arange(DRAWS) + uniform[..., None]) / DRAWS
    expected = (cumulative[..., None, :] <= targets[..., None]).sum(-1)
    entropy = -(log_q.exp() * log_q.clamp(min=-1e9)).sum(-1)
    for ids, found_entropy in ranks:
        assert torch.equal(ids, expected)
        torch.testing.assert_close(found_entropy, entropy, rtol=1e-9, atol=1e-9)
    assert _counts(expected)[2, :, 7].tolist() == [DRAWS] * B


def test_counts_are_unbiased_and_within_one_of_the_mean():
    logits = 2 * torch.randn(1, 1, 50, generator=torch.Generator().manual_seed(0))
    mean = DRAWS * F.softmax(logits.double(), -1)
    steps = 4000  # u on a grid: the mean over it is the expectation, up to its spacing
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5).view(-1, 1) / steps
    ids, _ = sample_tokens(logits.expand(steps, 1, -1), uniform, DRAWS, valid_columns=50)
    counts = F.one_hot(ids, 50).sum(-2).double()
    assert ((counts >= mean.floor()) & (counts <= mean.ceil())).all()
    torch.testing.assert_close(counts.mean(0, keepdim=True), mean, atol=2 / steps, rtol=0)


def test_the_ends_of_the_unit_interval_are_tokens():
    logits = torch.tensor([[[-60.0, 0.0, -60.0, -torch.inf, 5.0]]])
    for u in (0.0, 1 - 2**-53):
        ids, _ = sample_tokens(
            logits, torch.full((1, 1), u, dtype=torch.float64), 1, valid_columns=4
        )
        assert 0 <= ids.item() <= 2
