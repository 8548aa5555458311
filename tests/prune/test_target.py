"""The shape that a recipe asks for, and what reaching it needs."""

import dataclasses

import pytest

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.prune.pruning import PruneConfig, comparison, needs_scores, plan_pruning
from tests.prune.scored import random_scores
from tests.tiny import tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())  # 4 layers, 32, 48, 8 heads, 2 groups
LLAMA_31_8B = hf.architecture_from_config(
    {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
)


@pytest.mark.parametrize(
    ("sizes", "total"),
    [
        ({"hidden_size": 3072, "ffn_hidden_size": 9216}, 4_512_746_496),
        ({"drop_layers": list(range(16, 32))}, 4_540_469_248),
        ({"num_layers": 16}, 4_540_469_248),
        ({"num_layers": 32}, 8_030_261_248),
    ],
)
def test_published_students(sizes, total):
    target = PruneConfig(**sizes).target(LLAMA_31_8B)
    assert target.num_parameters == total
    assert target.kv_channels == 128


def test_comparison_shows_both_shapes():
    target = PruneConfig(hidden_size=3072, ffn_hidden_size=9216).target(LLAMA_31_8B)
    lines = comparison(LLAMA_31_8B, target).splitlines()
    assert "8,030,261,248" in lines[-2]
    assert "4,512,746,496" in lines[-2]
    assert "56.2%" in lines[-2]
    assert lines[3].split() == ["hidden", "size", "4,096", "3,072", "75.0%"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({}, "nothing to prune; give at least one of prune.hidden_size, prune.ffn_hidden_size, "),
        ({"drop_layers": []}, "nothing to prune"),
        ({"hidden_size": 64}, "prune.hidden_size=64, but the model has 32; choose 1 to 32"),
        ({"ffn_hidden_size": 49}, "prune.ffn_hidden_size=49, but the model has 48"),
        ({"num_layers": 5}, "prune.num_layers=5, but the model has 4; choose 1 to 4"),
        ({"num_attention_heads": 16}, "prune.num_attention_heads=16, but the model has 8"),
        ({"hidden_size": -8}, "prune.hidden_size=-8, but the model has 32"),
        ({"hidden_size": 0}, "prune.hidden_size=0, but the model has 32"),
        (
            {"num_attention_heads": 5},
            "prune.num_attention_heads=5 is not a multiple of the model's 2 key/value heads, each "
            "of which keeps the same number of query heads; choose 4 or 6",
        ),
        ({"num_attention_heads": 1}, "is not a multiple of .*; choose 2"),
        ({"hidden_size": 30}, "hidden_size=30 is not a multiple of num_attention_heads=8"),
        ({"drop_layers": [5]}, "drop_layers names layer 5; the model has layers 1 to 4"),
        ({"drop_layers": [1, 1]}, "drop_layers names layer 1 twice"),
        ({"drop_layers": [1, 2, 3, 4]}, "drop_layers names all 4 layers"),
        (
            {"drop_layers": [1, 2], "num_layers": 3},
            r"prune.num_layers=3 contradicts prune.drop_layers, which leaves 4 - 2 = 2",
        ),
    ],
)
def test_shapes_that_pruning_cannot_reach(sizes, message):
    with pytest.raises(MinitronError, match=message):
        PruneConfig(**sizes).target(ARCH)


def test_consistent_depth_keys_are_accepted():
    assert PruneConfig(drop_layers=[1, 2], num_layers=2).target(ARCH).num_layers == 2


@pytest.mark.parametrize(
    ("sizes", "needed"),
    [
        ({"drop_layers": [1]}, False),
        ({"num_layers": 3}, True),
        ({"num_layers": 3, "drop_layers": [1]}, False),
        ({"num_layers": 4}, False),
        ({"hidden_size": 32}, False),
        ({"hidden_size": 24}, True),
        ({"ffn_hidden_size": 24}, True),
        ({"num_attention_heads": 4}, True),
        ({"num_attention_heads": 4, "drop_layers": [1]}, True),
    ],
)
def test_when_scores_are_needed(sizes, needed):
    config = PruneConfig(**sizes)
    assert needs_scores(ARCH, config.target(ARCH), config.drop_layers) == needed


def test_scores_of_another_shape_are_refused():
    scores = random_scores(dataclasses.replace(ARCH, ffn_hidden_size=40))
    target = PruneConfig(hidden_size=24).target(ARCH)
    with pytest.raises(MinitronError, match=r"scores.ffn has shape \[4, 40\], the .* \[4, 48\]"):
        plan_pruning(ARCH, target, scores)
