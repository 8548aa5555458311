"""The shapes to choose from: a grid of sizes, of which budgets leave a few.

Every size of an axis is combined with every size of the others. Counting the cost of a shape takes
no time, so the whole grid is looked at; what a shape is worth is only measured for those that fit.

Source of the grids: arXiv:2407.14679 §4.3 (where the embedding size 4680 is a misprint of 4608).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from minitron.errors import MinitronError
from minitron.model.arch import Architecture

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
"""What a search may change."""

Preset = Literal["minitron_8b", "minitron_4b", "llama3.1_4b"]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The sizes to combine, each with all of the others; an axis without any stays as it is."""

    preset: Preset | None = None
    """A grid whose axes hold where none is given here: the paper's for Minitron 8B and for Minitron
    4B, or what lies between the two Llama-3.1-Minitron-4B, Width and Depth."""
    num_layers: list[int] | None = None
    """Layers to keep."""
    hidden_size: list[int] | None = None
    """Embedding channels to keep."""
    ffn_hidden_size: list[int] | None = None
    """Neurons of each MLP to keep."""
    ffn_multiples: list[float] | None = None
    """The same as multiples of the hidden size; one of the two."""
    num_attention_heads: list[int] | None = None
    """Query heads to keep."""
    num_query_groups: list[int] | None = None
    """Key/value heads to keep. Unless num_attention_heads says otherwise, their query heads stay
    with them."""

    def __post_init__(self) -> None:
        if self.ffn_hidden_size is not None and self.ffn_multiples is not None:
            raise MinitronError(
                f"grid.ffn_hidden_size={self.ffn_hidden_size} and "
                f"grid.ffn_multiples={self.ffn_multiples} both say how many neurons; give one"
            )
        for name in (*SIZES, "ffn_multiples"):
            sizes = getattr(self, name)
            if sizes == [] or any(size <= 0 for size in sizes or ()):
                raise MinitronError(f"grid.{name}={sizes} must name one or more sizes above 0")

    def combinations(self, source: Architecture) -> Iterator[dict[str, Any]]:
        """The sizes of every shape of the grid, each once, in the order of the axes."""
        grid = self._with_preset()
        share = source.num_attention_heads // source.num_query_groups
        seen = set()
        for layers, hidden, groups in itertools.product(
            grid.num_layers or [source.num_layers],
            grid.hidden_size or [source.hidden_size],
            grid.num_query_groups or [source.num_query_groups],
        ):
            ffns = grid.ffn_hidden_size or [source.ffn_hidden_size]
            if grid.ffn_multiples is not None:
                ffns = [round(multiple * hidden) for multiple in grid.ffn_multiples]
            for ffn, heads in itertools.product(ffns, grid.num_attention_heads or [groups * share]):
                sizes = (layers, hidden, ffn, heads, groups)
                if sizes not in seen:
                    seen.add(sizes)
                    yield dict(zip(SIZES, sizes, strict=True))

    def _with_preset(self) -> GridConfig:
        """The grid with the axes of its preset where it names none."""
        if self.preset is None:
            return self
        names = (field.name for field in dataclasses.fields(self) if field.name != "preset")
        axes = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if axes.keys() & {"ffn_hidden_size", "ffn_multiples"}:
            axes = {"ffn_hidden_size": None, "ffn_multiples": None} | axes
        return dataclasses.replace(PRESETS[self.preset], **axes)


_PAPER_FFN = [2.5, 3.0, 3.5, 4.0]
PRESETS: dict[Preset, GridConfig] = {
    "minitron_8b": GridConfig(
        num_layers=[29, 30, 31, 32],
        hidden_size=[4096, 4608, 5120, 5632, 6144],
        ffn_multiples=_PAPER_FFN,
        num_attention_heads=[32, 48],
    ),
    "minitron_4b": GridConfig(
        num_layers=[29, 30, 31, 32],
        hidden_size=[2560, 3072, 3584, 4096, 4608],
        ffn_multiples=_PAPER_FFN,
        num_attention_heads=[24, 32, 48],
    ),
    # Between the two published students, 32 layers x 3072 x 9216 and 16 x 4096 x 14336. All heads
    # stay, as arXiv:2408.11796 advises.
    "llama3.1_4b": GridConfig(
        num_layers=[16, 20, 24, 28, 32],
        hidden_size=[2560, 3072, 3584, 4096],
        ffn_hidden_size=[7168, 8192, 9216, 10240, 11264, 12288, 14336],
    ),
}


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Limits of a shape. One number is the most that it may take, two are the least and the
    most.
    """

    params: list[float] | None = None
    """Parameters, such as [4.3e9, 4.7e9]."""
    non_embedding_params: list[float] | None = None
    """Parameters without the embedding table and the output head."""
    memory_gb: list[float] | None = None
    """Gigabytes, 1e9 bytes each, of the weights and the key/value cache in the deployment."""
    latency: list[float] | None = None
    """Seconds that one batch of requests takes in the deployment, on one device of this machine.
    Layers of random weights are timed: prompt first, then token by token; only where this is
    given."""

    def __post_init__(self) -> None:
        for name in self.given():
            limits = getattr(self, name)
            if len(limits) not in (1, 2) or min(limits) < 0 or limits != sorted(limits):
                raise MinitronError(
                    f"budget.{name}={limits} is no limit; give the most, or the least and the most"
                )

    def given(self) -> list[str]:
        """What is limited."""
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if getattr(self, name) is not None]

    def allows(self, name: str, cost: float) -> bool:
        """Whether a cost is within its limits; one that is not limited always is."""
        limits = getattr(self, name)
        if limits is None:
            return True
        least = limits[0] if len(limits) == 2 else 0.0
        return least <= cost <= limits[-1]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A shape that fits the budgets, and what it costs."""

    arch: Architecture
    costs: dict[str, float]
    """By the names of the budgets."""

    @property
    def name(self) -> str:
        """L32-h3072-f9216-n32-g8: the letters of docs/shapes.md."""
        letters = zip("Lhfng", SIZES, strict=True)
        return "-".join(f"{letter}{getattr(self.arch, size)}" for letter, size in letters)


def find_shapes(
    source: Architecture,
    grid: GridConfig,
    budget: BudgetConfig,
    costs: Mapping[str, Callable[[Architecture], float]],
    check: Callable[[Architecture], None],
) -> tuple[list[Shape], list[MinitronError]]:
    """The shapes of a grid that fit the budgets, largest first, and why others are no shapes.

    Args:
        source: the model to prune.
        grid: sizes to combine.
        budget: limits.
        costs: how to count, cheapest first; a shape that breaks a limit is not counted further.
        check: raises MinitronError for what cannot be pruned to or trained.

    Raises:
        MinitronError: nothing fits.
    """
    found, refused = [], []
    met: dict[str, list[float]] = {name: [] for name in costs}
    for sizes in grid.combinations(source):
        try:
            arch = dataclasses.replace(source, **sizes)
            check(arch)
        except MinitronError as error:
            refused.append(error)
            continue
        counted = {}
        for name, count in costs.items():
            counted[name] = count(arch)
            met[name].append(counted[name])
            if not budget.allows(name, counted[name]):
                break
        else:
            found.append(Shape(arch=arch, costs=counted))
    if not found:
        raise _nothing_fits(budget, met, refused)
    return sorted(found, key=lambda shape: -shape.costs["params"]), refused


def _nothing_fits(
    budget: BudgetConfig, met: Mapping[str, list[float]], refused: list[MinitronError]
) -> MinitronError:
    number = len(met["params"])
    if not number:
        return MinitronError(
            f"no shape of the grid, out of {len(refused)}, can be made of this model, the first "
            f"because {refused[0]}; change the grid"
        )
    limits = [
        f"budget.{name}={getattr(budget, name)}, where they have {min(met[name]):.4g} to "
        f"{max(met[name]):.4g}"
        for name in budget.given()
        if met.get(name)
    ]
    return MinitronError(
        f"no shape of the grid, out of {number}, fits {' and '.join(limits)}; change the grid "
        "or the budgets"
    )
