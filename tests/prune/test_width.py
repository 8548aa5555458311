import dataclasses
import itertools

import pytest
import torch

from minitron.model import hf
from minitron.prune.width import (
    WidthPlan,
    choose_heads,
    merge_partners,
    plan_width,
    same_width,
    slice_tensor,
)
from tests.prune.scored import random_scores
from tests.tiny import tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())  # 8 heads in 2 groups of dimension 4


class Tensors(dict):
    """Tensors in memory; remembers what was read."""

    def read(self, name, *index):
        self.index = index
        return self[name][index]


def test_hidden_channels_are_ranked_by_the_sum_over_layers():
    scores = random_scores(ARCH)
    scores.hidden[:, 5] = 0.0
    scores.hidden[0, 5] = 100.0  # best by far, in one layer only
    plan = plan_width(ARCH, dataclasses.replace(ARCH, hidden_size=8), scores)
    total = [sum(row[i] for row in scores.hidden.double().tolist()) for i in range(32)]
    assert plan.hidden.tolist() == sorted(sorted(range(32), key=lambda i: -total[i])[:8])
    assert 5 in plan.hidden
    assert plan.ffn is None
    assert plan.heads is None


def test_neurons_are_ranked_in_each_layer():
    scores = random_scores(ARCH)
    plan = plan_width(ARCH, dataclasses.replace(ARCH, ffn_hidden_size=11), scores)
    assert plan.hidden is None
    for layer, row in enumerate(scores.ffn.tolist()):
        assert plan.ffn[layer].tolist() == sorted(sorted(range(48), key=lambda i: -row[i])[:11])
    assert not torch.equal(plan.ffn[0], plan.ffn[1])


def test_heads_are_ranked_inside_their_group():
    scores = random_scores(ARCH)
    scores.heads[:] = torch.tensor([8.0, 7, 6, 5, 1, 3, 2, 4])  # the best four share a group
    plan = plan_width(ARCH, dataclasses.replace(ARCH, num_attention_heads=4), scores)
    assert plan.heads.tolist() == [[0, 1, 5, 7]] * 4
    plan = plan_width(ARCH, dataclasses.replace(ARCH, num_attention_heads=2), scores)
    assert plan.heads.tolist() == [[0, 7]] * 4


def test_ties_go_to_the_lower_position():
    scores = random_scores(ARCH)
    for tensor in (scores.hidden, scores.ffn, scores.heads):
        tensor[:] = 1.0
    target = dataclasses.replace(ARCH, hidden_size=8, ffn_hidden_size=3, num_attention_heads=4)
    plan = plan_width(ARCH, target, scores)
    assert plan.hidden.tolist() == list(range(8))
    assert plan.ffn.tolist() == [[0, 1, 2]] * 4
    assert plan.heads.tolist() == [[0, 1, 4, 5]] * 4


def test_equal_width_needs_no_scores():
    deeper = dataclasses.replace(ARCH, num_layers=2)
    assert same_width(ARCH, deeper)
    plan = plan_width(ARCH, deeper, None)
    assert plan.hidden is plan.ffn is plan.heads is None
    with pytest.raises(AssertionError):
        plan_width(ARCH, dataclasses.replace(ARCH, hidden_size=8), None)


def test_what_is_kept_along_each_axis():
    plan = WidthPlan(
        hidden=torch.tensor([1, 4]),
        ffn=torch.tensor([[0, 2], [1, 3]]),
        heads=torch.tensor([[0, 2], [1, 3]]),
        kv_channels=2,
    )
    assert plan.kept("hidden", None).tolist() == [1, 4]
    assert plan.kept("ffn", 1).tolist() == [1, 3]
    assert plan.kept("query", 0).tolist() == [0, 1, 4, 5]
    assert plan.kept("query", 1).tolist() == [2, 3, 6, 7]
    assert plan.kept("vocab", None) is plan.kept("kv", 0) is None
    assert WidthPlan(kv_channels=2).kept("query", 0) is None


@pytest.mark.parametrize("hidden", [[0, 1, 2], [3, 4, 5], [0, 3, 5], [2, 4], [5]])
@pytest.mark.parametrize("neurons", [[0, 1, 2, 3], [1, 2], [0, 3]])
def test_slice_takes_rows_and_columns(hidden, neurons):
    plan = WidthPlan(hidden=torch.tensor(hidden), ffn=torch.tensor([neurons]), kv_channels=2)
    weights = Tensors(w=torch.arange(24.0).view(4, 6), b=torch.arange(4.0))
    sliced = slice_tensor(weights, "w", ("ffn", "hidden"), plan, 0)
    assert sliced.tolist() == [[6.0 * i + j for j in hidden] for i in neurons]
    ranges = (slice(neurons[0], neurons[-1] + 1), slice(hidden[0], hidden[-1] + 1))
    assert weights.index == ranges  # nothing outside the kept range is read
    assert slice_tensor(weights, "b", ("ffn",), plan, 0).tolist() == neurons


def test_an_axis_that_is_kept_whole_is_not_touched():
    weights = Tensors(w=torch.arange(24.0).view(4, 6))
    sliced = slice_tensor(weights, "w", ("vocab", "hidden"), WidthPlan(kv_channels=2), None)
    assert sliced.data_ptr() == weights["w"].data_ptr()
    assert torch.equal(sliced, weights["w"])


def test_groups_are_kept_by_their_own_score_and_heads_inside_them():
    heads = torch.tensor([[8.0, 7, 6, 5, 1, 3, 2, 4]])
    groups = torch.tensor([[1.0, 2, 9, 3]])
    kept = choose_heads(heads, groups, num_groups=2, heads_per_group=1, ranking="group")
    assert [x.tolist() for x in kept] == [[[5, 7]], [[2, 3]]]


@pytest.mark.parametrize(("groups", "size"), [(2, 4), (4, 2), (8, 1), (1, 8)])
def test_heads_across_groups_against_every_legal_choice(groups, size):
    """The kept heads have the highest sum of scores of all that fill groups of one size."""
    scores = torch.rand(5, groups * size, generator=torch.Generator().manual_seed(groups))
    for num_groups, share in itertools.product(range(1, groups + 1), range(1, size + 1)):
        heads, filled = choose_heads(
            scores,
            torch.rand(5, groups),
            num_groups=num_groups,
            heads_per_group=share,
            ranking="across",
        )
        legal = [
            choice
            for choice in itertools.combinations(range(groups * size), num_groups * share)
            if all(
                sum(head // size == group for head in choice) % share == 0
                for group in range(groups)
            )
        ]
        for layer, row in enumerate(scores.tolist()):
            best = max(legal, key=lambda choice: sum(row[head] for head in choice))
            assert tuple(heads[layer].tolist()) == best
            owners = heads[layer].view(num_groups, share) // size
            assert (owners == filled[layer][:, None]).all()


def test_pruned_heads_are_merged_from_the_middle_outwards():
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1]])
    four = merge_partners(scores, torch.tensor([[0, 1, 2, 3]]), 1)  # L = 6, K = 4: ranks 3 and 4
    assert four.tolist() == [[0, 1, 5, 4]]
    two = merge_partners(scores, torch.tensor([[0, 1]]), 1)  # ranks 5 and 6 have no partner
    assert two.tolist() == [[3, 2]]
    grouped = merge_partners(scores, torch.tensor([[0, 1, 3, 4]]), 2)
    assert grouped.tolist() == [[0, 2, 3, 5]]


def test_a_range_with_a_repeated_position_is_selected():
    """As long as the range that it spans, and yet not the range."""
    plan = WidthPlan(
        heads=torch.tensor([[0, 1, 2]]), groups=torch.tensor([[0, 0, 2]]), kv_channels=2
    )
    weights = Tensors(k=torch.arange(6.0)[:, None])
    sliced = slice_tensor(weights, "k", ("kv", "hidden"), plan, 0)
    assert sliced.flatten().tolist() == [0, 1, 0, 1, 4, 5]


@pytest.mark.parametrize("rows", itertools.combinations(range(7), 2))
def test_of_averaged_heads_only_the_members_are_read(rows):
    """Heads of dimension 2, averaged in pairs; any range of the result's six rows."""
    weights = Tensors(k=torch.arange(24.0).view(12, 2).square())
    plan = WidthPlan(hidden=torch.tensor([1]), pooled=2, kv_channels=2)
    part = slice(*rows)
    sliced = slice_tensor(weights, "k", ("kv", "hidden"), plan, 0, part)
    averaged = weights["k"].view(3, 2, 2, 2).mean(1).view(6, 2)
    assert torch.equal(sliced, averaged[part, 1:])
    first, last = rows[0] // 2, (rows[1] - 1) // 2  # averaged heads
    assert weights.index == (slice(4 * first, 4 * last + 4), slice(1, 2))
