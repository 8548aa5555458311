import dataclasses

import pytest
import torch

from minitron.model import hf
from minitron.prune.width import WidthPlan, plan_width, same_width, slice_tensor
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
