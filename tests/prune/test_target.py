"""The shape that a recipe asks for, and what reaching it needs."""

import dataclasses

import pytest

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.llama import check_parallel
from minitron.prune.pruning import comparison, needs_scores, plan_pruning
from minitron.prune.target import arithmetic, target_shape
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import PruneConfig
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
    target = target_shape(PruneConfig(**sizes), LLAMA_31_8B)
    assert target.num_parameters == total
    assert target.kv_channels == 128


def test_comparison_shows_both_shapes():
    target = target_shape(PruneConfig(hidden_size=3072, ffn_hidden_size=9216), LLAMA_31_8B)
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
        ({"num_query_groups": 3}, "prune.num_query_groups=3, but the model has 2; choose 1 to 2"),
        (
            {"num_query_groups": 1, "num_attention_heads": 6},
            "prune.num_attention_heads=6 in prune.num_query_groups=1 are 6 query heads each, but a "
            "key/value head of the model has 4; choose at most 1 x 4 = 4, or",
        ),
        ({"hidden_size": 8, "multiple": 0}, "prune.multiple=0 must be at least 1"),
        (
            {"hidden_size": 32, "multiple": 64},
            r"prune.hidden_size=32 cannot be rounded: the model has 32, and no smaller size is a "
            r"multiple of 64 = lcm\(64, 8 heads, which transformers demands\); lower",
        ),
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
        target_shape(PruneConfig(**sizes), ARCH)


def test_consistent_depth_keys_are_accepted():
    assert target_shape(PruneConfig(drop_layers=[1, 2], num_layers=2), ARCH).num_layers == 2


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
    assert needs_scores(ARCH, target_shape(config, ARCH), config.drop_layers) == needed


def test_scores_of_another_shape_are_refused():
    scores = random_scores(dataclasses.replace(ARCH, ffn_hidden_size=40))
    target = target_shape(PruneConfig(hidden_size=24), ARCH)
    with pytest.raises(MinitronError, match=r"scores.ffn has shape \[4, 40\], the .* \[4, 48\]"):
        plan_pruning(ARCH, target, scores)


def test_groups_that_pooling_cannot_reach():
    config = PruneConfig(num_query_groups=3, group_reduction="mean")
    message = "num_query_groups=3 does not divide the model's 8 .* choose 1, 2, 4 or 8"
    with pytest.raises(MinitronError, match=message):
        target_shape(config, LLAMA_31_8B)


@pytest.mark.parametrize(
    ("keys", "heads", "groups"),
    [
        ({"num_query_groups": 4}, 16, 4),
        ({"num_query_groups": 4, "num_attention_heads": 8}, 8, 4),
        ({"num_query_groups": 4, "group_reduction": "mean"}, 32, 4),
        ({"num_query_groups": 4, "group_reduction": "mean", "num_attention_heads": 16}, 16, 4),
        ({"num_attention_heads": 16}, 16, 8),
    ],
)
def test_query_heads_that_follow_from_key_value_heads(keys, heads, groups):
    target = target_shape(PruneConfig(**keys), LLAMA_31_8B)
    assert (target.num_attention_heads, target.num_query_groups) == (heads, groups)


def test_rounding_shows_its_arithmetic():
    config = PruneConfig(
        hidden_size=3000,
        ffn_hidden_size=9300,
        num_attention_heads=26,
        num_query_groups=5,
        multiple=128,
        target_tensor_parallel_size=4,
        group_reduction="mean",
    )
    target = target_shape(config, LLAMA_31_8B)
    assert (target.num_query_groups, target.num_attention_heads) == (4, 28)
    assert (target.hidden_size, target.ffn_hidden_size) == (2688, 9216)
    assert arithmetic(config, LLAMA_31_8B) == [
        "num_query_groups: 5 -> 4, a multiple or divisor of 4 ranks",
        "num_attention_heads: 26 -> 28, a multiple of 4 = lcm(4 key/value heads, 4 ranks)",
        "hidden_size: 3000 -> 2688, a multiple of 896 = lcm(128, 28 heads, which transformers "
        "demands)",
        "ffn_hidden_size: 9300 -> 9216, a multiple of 512 = 128 x 4 ranks",
    ]


@pytest.mark.parametrize("tp", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("multiple", [16, 64, 128])
def test_rounded_shapes_run_on_the_ranks_they_are_rounded_for(tp, multiple):
    for asked in (100, 1111, 3000, 4000):
        config = PruneConfig(
            hidden_size=asked,
            ffn_hidden_size=3 * asked,
            num_query_groups=3,
            num_attention_heads=8,
            multiple=multiple,
            target_tensor_parallel_size=tp,
        )
        target = target_shape(config, LLAMA_31_8B)
        check_parallel(target, ParallelConfig(tensor_model_parallel_size=tp))
        assert target.hidden_size % multiple == 0
        assert target.ffn_hidden_size // tp % multiple == 0


@pytest.mark.parametrize(
    ("keys", "sizes", "lines"),
    [
        (  # heads are rounded to what divides a hidden size that nobody gave
            {"num_attention_heads": 26, "multiple": 128},
            (4096, 14336, 32, 8),
            [
                "num_attention_heads: 26 -> 32, a multiple of 8 = lcm(8 key/value heads, 1 ranks) "
                "that divides the hidden size, 4096"
            ],
        ),
        (
            {"hidden_size": 3072, "multiple": 3000},
            None,
            r"prune.hidden_size=3072 cannot be rounded: the model has 4096, and no smaller size is",
        ),
        (
            {"hidden_size": 3100, "multiple": 512, "target_tensor_parallel_size": 8},
            (3072, 14336, 32, 8),
            [
                "hidden_size: 3100 -> 3072, a multiple of 512 = lcm(512, 32 heads, which "
                "transformers demands)",
                "ffn_hidden_size: stays 14336, no multiple of 4096 = 512 x 8 ranks; give "
                "prune.ffn_hidden_size to round it",
            ],
        ),
        (
            {"ffn_hidden_size": 9216, "multiple": 128, "target_tensor_parallel_size": 8},
            (4096, 9216, 32, 8),
            ["ffn_hidden_size: 9216, a multiple of 1024 = 128 x 8 ranks"],
        ),
        (  # query heads follow from key/value heads, and are rounded with them
            {"num_query_groups": 3, "target_tensor_parallel_size": 4},
            (4096, 14336, 16, 4),
            [
                "num_query_groups: 3 -> 4, a multiple or divisor of 4 ranks that divides the "
                "hidden size, 4096",
                "num_attention_heads: 16, a multiple of 4 = lcm(4 key/value heads, 4 ranks) that "
                "divides the hidden size, 4096",
            ],
        ),
        (
            {"hidden_size": 3072, "target_tensor_parallel_size": 3},
            None,
            r"num_query_groups=8 was not asked to change, and is no multiple or divisor of 3 "
            r"ranks; give prune.num_query_groups, which is then rounded, or lower "
            r"prune.target_tensor_parallel_size",
        ),
        (
            {"hidden_size": 3072, "target_tensor_parallel_size": 64},
            None,
            r"num_attention_heads=32 was not asked to change, and is no multiple of 64 = lcm\(8 ",
        ),
        (
            {"hidden_size": 3072, "num_layers": 20, "rounds": 3},
            (3744, 14336, 32, 8),
            [
                "hidden_size: 4096 to 3072 in 3 rounds, now 3755 -> 3744, a multiple of 32 = "
                "lcm(1, 32 heads, which transformers demands)",
                "num_layers: 32 to 20 in 3 rounds, now 28",
            ],
        ),
    ],
)
def test_only_what_is_asked_for_is_rounded(keys, sizes, lines):
    config = PruneConfig(**keys)
    if sizes is None:
        with pytest.raises(MinitronError, match=lines):
            target_shape(config, LLAMA_31_8B)
        return
    target = target_shape(config, LLAMA_31_8B)
    assert arithmetic(config, LLAMA_31_8B) == lines
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    assert tuple(getattr(target, name) for name in names) == sizes


def test_rounds_of_heads_never_leave_a_hidden_size_that_nobody_gave():
    arch, shapes = LLAMA_31_8B, []
    for left in (4, 3, 2, 1):
        arch = target_shape(PruneConfig(num_query_groups=2, rounds=left), arch)
        shapes.append((arch.hidden_size, arch.num_attention_heads, arch.num_query_groups))
    assert shapes == [(4096, 32, 8), (4096, 32, 8), (4096, 16, 4), (4096, 8, 2)]


def test_without_rounding_sizes_are_those_asked_for():
    config = PruneConfig(hidden_size=3008, ffn_hidden_size=9217)
    assert arithmetic(config, LLAMA_31_8B) == []
    assert target_shape(config, LLAMA_31_8B).ffn_hidden_size == 9217


def test_rounds_divide_the_way_and_end_at_the_shape():
    asked = {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_layers": 20}
    arch, shapes = LLAMA_31_8B, []
    for left in (4, 3, 2, 1):
        arch = target_shape(PruneConfig(rounds=left, **asked), arch)
        shapes.append((arch.hidden_size, arch.ffn_hidden_size, arch.num_layers))
    way = [(3840, 13056, 29), (3584, 11776, 26), (3328, 10496, 23), (3072, 9216, 20)]
    assert shapes == way


@pytest.mark.parametrize("reduction", ["select", "mean"])
def test_every_round_is_a_shape_that_ranks_can_share(reduction):
    config = {"hidden_size": 2048, "ffn_hidden_size": 5000, "num_query_groups": 2}
    config |= {"group_reduction": reduction, "target_tensor_parallel_size": 2, "multiple": 64}
    arch = LLAMA_31_8B
    for left in (3, 2, 1):
        arch = target_shape(PruneConfig(rounds=left, **config), arch)
        check_parallel(arch, ParallelConfig(tensor_model_parallel_size=2))
    assert (arch.hidden_size, arch.num_query_groups) == (2048, 2)


def test_rounds_that_are_impossible():
    with pytest.raises(MinitronError, match=r"prune.rounds=0 must be at least 1"):
        PruneConfig(num_layers=2, rounds=0)
    with pytest.raises(MinitronError, match=r"rounds=2 cannot split prune.drop_layers=\[3\]; give"):
        PruneConfig(drop_layers=[3], rounds=2)
