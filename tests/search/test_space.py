"""Grids and budgets: the papers' own lists, and brute force."""

import itertools
from dataclasses import dataclass, replace

import pytest

from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.search.space import Shape, combinations, find_shapes
from minitron.search.trials import check_candidate
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import SelectionConfig
from minitron.sections.search import SIZES, BudgetConfig, GridConfig

LLAMA_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)


@dataclass(frozen=True, kw_only=True)
class Nemotron(Architecture):
    """The papers' source: an MLP of two matrices, squared ReLU between them. minitron runs none."""

    @property
    def num_non_embedding_parameters(self):
        return super().num_non_embedding_parameters - (
            self.num_layers * self.hidden_size * self.ffn_hidden_size
        )


NEMOTRON_15B = Nemotron(
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=256000,
)

# Layers, query heads, MLP neurons, embedding channels.
TABLE_19 = {
    (29, 32, 16128, 4608), (29, 32, 12800, 5120), (29, 48, 13824, 4608), (30, 32, 16128, 4608),
    (30, 32, 12800, 5120), (30, 48, 16384, 4096), (30, 48, 13824, 4608), (31, 32, 16128, 4608),
    (31, 32, 12800, 5120), (31, 48, 16384, 4096), (31, 48, 13824, 4608), (32, 32, 13824, 4608),
    (32, 32, 12800, 5120), (32, 48, 16384, 4096), (32, 48, 11520, 4608),
}  # fmt: skip
FOUR_BILLION = {
    (29, 24, 9216, 3072), (30, 24, 9216, 3072), (31, 24, 9216, 3072), (32, 24, 9216, 3072),
    (31, 24, 7680, 3072), (32, 24, 7680, 3072), (29, 32, 9216, 3072), (29, 32, 7680, 3072),
    (30, 32, 7680, 3072), (31, 32, 7680, 3072), (32, 32, 7680, 3072), (32, 32, 10240, 2560),
    (29, 48, 10240, 2560), (30, 48, 10240, 2560), (31, 48, 10240, 2560), (32, 48, 10240, 2560),
    (31, 48, 8960, 2560), (32, 48, 8960, 2560),
}  # fmt: skip


def params(arch):
    return arch.num_parameters


def accept(arch):
    """Every shape will do."""


@pytest.mark.parametrize(
    ("preset", "budget", "expected"),
    [("minitron_8b", [7.87e9, 8.50e9], TABLE_19), ("minitron_4b", [3.80e9, 4.20e9], FOUR_BILLION)],
)
def test_the_papers_own_lists(preset, budget, expected):
    shapes, refused = find_shapes(
        NEMOTRON_15B,
        GridConfig(preset=preset),
        BudgetConfig(params=budget),
        {"params": params},
        accept,
    )
    names = ("num_layers", "num_attention_heads", "ffn_hidden_size", "hidden_size")
    found = [tuple(getattr(shape.arch, name) for name in names) for shape in shapes]
    assert len(found) == len(expected) == {"minitron_8b": 15, "minitron_4b": 18}[preset]
    assert set(found) == expected
    assert not refused
    costs = [shape.costs["params"] for shape in shapes]
    assert costs == sorted(costs, reverse=True)


def test_the_released_models_are_among_them():
    counts = {}
    for name, sizes in {"8b": (32, 4096, 16384, 48, 8), "4b": (32, 3072, 9216, 24, 8)}.items():
        arch = replace(NEMOTRON_15B, **dict(zip(SIZES, sizes, strict=True)))
        counts[name] = arch.num_parameters
    assert counts == {"8b": 8_271_433_728, "4b": 4_190_309_376}  # "8.27B" and "4.19B"


def test_what_lies_between_the_two_llamas():
    """Against a count of our own: three MLP matrices, untied tables of 128,256 rows."""
    shapes, refused = find_shapes(
        LLAMA_8B,
        GridConfig(preset="llama3.1_4b"),
        BudgetConfig(params=[4.29e9, 4.74e9]),
        {"params": params},
        lambda arch: check_candidate(LLAMA_8B, arch, ParallelConfig(), SelectionConfig()),
    )
    expected = set()
    for layers, h, f in itertools.product(
        (16, 20, 24, 28, 32),
        (2560, 3072, 3584, 4096),
        (7168, 8192, 9216, 10240, 11264, 12288, 14336),
    ):
        count = 2 * 128256 * h + layers * (h * 6144 + 4096 * h + 3 * h * f + 2 * h) + h
        if 4.29e9 <= count <= 4.74e9:
            expected.add((layers, h, f))
    found = {
        (s.arch.num_layers, s.arch.hidden_size, s.arch.ffn_hidden_size): s.costs["params"]
        for s in shapes
    }
    assert found.keys() == expected
    assert len(found) == 18
    assert found[32, 3072, 9216] == 4_512_746_496  # Llama-3.1-Minitron-4B-Width
    assert found[16, 4096, 14336] == 4_540_469_248  # and Depth
    assert [str(error).split(" is ")[1] for error in refused] == ["the model's own shape"]


def test_axes_that_are_not_given_stay_and_those_given_win_over_the_preset():
    grid = GridConfig(preset="minitron_4b", num_layers=[16], ffn_hidden_size=[64, 32])
    sizes = list(combinations(grid, NEMOTRON_15B))
    assert {s["num_layers"] for s in sizes} == {16}
    assert {s["ffn_hidden_size"] for s in sizes} == {32, 64}
    assert {s["num_query_groups"] for s in sizes} == {8}
    assert len(sizes) == 5 * 2 * 3
    assert list(combinations(GridConfig(), LLAMA_8B)) == [
        {name: getattr(LLAMA_8B, name) for name in SIZES}
    ]


def test_query_heads_stay_with_their_group_and_no_shape_comes_twice():
    grid = GridConfig(num_query_groups=[8, 4], ffn_multiples=[2.0, 2.0], hidden_size=[4096])
    sizes = [tuple(s.values()) for s in combinations(grid, LLAMA_8B)]
    assert sizes == [(32, 4096, 8192, 32, 8), (32, 4096, 8192, 16, 4)]
    sizes = [tuple(s.values()) for s in combinations(grid, LLAMA_8B, "mean")]
    assert sizes == [(32, 4096, 8192, 32, 8), (32, 4096, 8192, 32, 4)]


def test_each_budget_keeps_what_brute_force_keeps():
    grid = GridConfig(
        num_layers=[8, 16, 32], hidden_size=[1024, 4096], num_query_groups=[1, 2, 4, 8]
    )
    costs = {
        "params": params,
        "non_embedding_params": lambda arch: arch.num_non_embedding_parameters,
        "memory_gb": lambda arch: arch.num_layers * arch.num_query_groups,
        "latency": lambda arch: arch.hidden_size / arch.num_layers,
    }
    everything = [replace(LLAMA_8B, **sizes) for sizes in combinations(grid, LLAMA_8B)]
    limits = {
        "params": [1e9, 3e9],
        "non_embedding_params": [2e9],
        "memory_gb": [32, 64],
        "latency": [100.0],
    }
    for names in [*itertools.combinations(limits, 1), *itertools.combinations(limits, 2)]:
        budget = BudgetConfig(**{name: limits[name] for name in names})
        shapes, _ = find_shapes(LLAMA_8B, grid, budget, costs, accept)
        expected = {
            arch
            for arch in everything
            if all(
                ([0, *limits[name]])[-2] * (len(limits[name]) > 1)
                <= costs[name](arch)
                <= limits[name][-1]
                for name in names
            )
        }
        assert 0 < len(expected) < len(everything)
        assert {shape.arch for shape in shapes} == expected
        for shape in shapes:
            assert shape.costs == {name: cost(shape.arch) for name, cost in costs.items()}


def test_what_breaks_a_cheap_limit_is_not_timed():
    timed = []

    def latency(arch):
        timed.append(arch.num_layers)
        return 0.0

    grid = GridConfig(num_layers=[8, 16, 32])
    budget = BudgetConfig(params=[4e9], latency=[1.0])
    find_shapes(LLAMA_8B, grid, budget, {"params": params, "latency": latency}, accept)
    assert timed == [8]


def test_shapes_that_cannot_be_are_told_apart():
    def check(arch):
        check_candidate(
            LLAMA_8B, arch, ParallelConfig(tensor_model_parallel_size=2), SelectionConfig()
        )

    grid = GridConfig(
        hidden_size=[3072, 3100, 8192], num_attention_heads=[32, 20], ffn_hidden_size=[1000, 1001]
    )
    shapes, refused = find_shapes(LLAMA_8B, grid, BudgetConfig(), {"params": params}, check)
    assert [shape.name for shape in shapes] == ["L32-h3072-f1000-n32-g8"]
    reasons = " ".join(map(str, refused))
    assert len(refused) == 11
    assert "is not a multiple of num_query_groups=8" in reasons
    assert "hidden_size=3100 is not a multiple of num_attention_heads=32" in reasons
    assert "grid.hidden_size=8192, but the model has 4096" in reasons
    assert "not divisible by parallel.tensor_model_parallel_size=2" in reasons


def test_the_models_own_shape_is_none_to_search():
    grid = GridConfig(num_layers=[28, 32])
    shapes, refused = find_shapes(
        LLAMA_8B,
        grid,
        BudgetConfig(),
        {"params": params},
        lambda arch: check_candidate(LLAMA_8B, arch, ParallelConfig(), SelectionConfig()),
    )
    assert [shape.arch.num_layers for shape in shapes] == [28]
    assert "is the model's own shape" in str(*refused)


def test_a_name_tells_all_sizes():
    assert Shape(arch=LLAMA_8B, costs={}).name == "L32-h4096-f14336-n32-g8"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"ffn_hidden_size": [8], "ffn_multiples": [2.0]},
            "grid.ffn_hidden_size=[8] and grid.ffn_multiples=[2.0] both say how many neurons; "
            "give one",
        ),
        ({"num_layers": [2, 0]}, "grid.num_layers=[2, 0] must name one or more sizes above 0"),
        ({"hidden_size": []}, "grid.hidden_size=[] must name one or more sizes above 0"),
    ],
)
def test_grids_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError) as caught:
        GridConfig(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize("limits", [[], [2.0, 1.0], [1.0, 2.0, 3.0], [-1.0]])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(MinitronError) as caught:
        BudgetConfig(memory_gb=limits)
    assert str(caught.value) == (
        f"budget.memory_gb={limits} is no limit; give the most, or the least and the most"
    )


def test_budgets_that_nothing_fits():
    grid = GridConfig(num_layers=[16, 32])
    budget = BudgetConfig(params=[1e9, 2e9], non_embedding_params=[1e9])
    costs = {"params": params, "non_embedding_params": params}
    with pytest.raises(MinitronError) as caught:
        find_shapes(LLAMA_8B, grid, budget, costs, accept)
    assert str(caught.value) == (
        "no shape of the grid, out of 2, fits budget.params=[1e+09, 2e+09], where "
        "they have 4.54e+09 to 8.03e+09; change the grid or the budgets"
    )


def test_a_grid_of_which_nothing_can_be_made():
    with pytest.raises(MinitronError) as caught:
        find_shapes(
            LLAMA_8B,
            GridConfig(num_layers=[64]),
            BudgetConfig(),
            {"params": params},
            lambda arch: check_candidate(LLAMA_8B, arch, ParallelConfig(), SelectionConfig()),
        )
    assert str(caught.value) == (
        "no shape of the grid, out of 1, can be made of this model, the first because "
        "grid.num_layers=64, but the model has 32; choose 1 to 32; change the grid"
    )
