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
from typing import Any

from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.sections.prune import GroupReduction
from minitron.sections.search import SIZES, BudgetConfig, GridConfig, Preset

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


def combinations(
    grid: GridConfig, source: Architecture, reduction: GroupReduction = "select"
) -> Iterator[dict[str, Any]]:
    """The sizes of every shape of a grid, each once, in the order of the axes.

    Args:
        grid: sizes to combine.
        source: the model to prune.
        reduction: of key/value heads; selected ones keep their own query heads, averaged ones all.
    """
    grid = _with_preset(grid)
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
        all_heads = source.num_attention_heads if reduction == "mean" else groups * share
        for ffn, heads in itertools.product(ffns, grid.num_attention_heads or [all_heads]):
            sizes = (layers, hidden, ffn, heads, groups)
            if sizes not in seen:
                seen.add(sizes)
                yield dict(zip(SIZES, sizes, strict=True))


def _with_preset(grid: GridConfig) -> GridConfig:
    """The grid with the axes of its preset where it names none."""
    if grid.preset is None:
        return grid
    names = (field.name for field in dataclasses.fields(grid) if field.name != "preset")
    axes = {name: getattr(grid, name) for name in names if getattr(grid, name) is not None}
    if axes.keys() & {"ffn_hidden_size", "ffn_multiples"}:
        axes = {"ffn_hidden_size": None, "ffn_multiples": None} | axes
    return dataclasses.replace(PRESETS[grid.preset], **axes)


def find_shapes(
    source: Architecture,
    grid: GridConfig,
    budget: BudgetConfig,
    costs: Mapping[str, Callable[[Architecture], float]],
    check: Callable[[Architecture], None],
    *,
    reduction: GroupReduction = "select",
) -> tuple[list[Shape], list[MinitronError]]:
    """The shapes of a grid that fit the budgets, largest first, and why others are no shapes.

    Args:
        source: the model to prune.
        grid: sizes to combine.
        budget: limits.
        costs: how to count, cheapest first; a shape that breaks a limit is not counted further.
        check: raises MinitronError for what cannot be pruned to or trained.
        reduction: of key/value heads.

    Raises:
        MinitronError: nothing fits.
    """
    found, refused = [], []
    met: dict[str, list[float]] = {name: [] for name in costs}
    for sizes in combinations(grid, source, reduction):
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
        f"budget.{name}=[{', '.join(f'{limit:.4g}' for limit in getattr(budget, name))}], where "
        f"they have {min(met[name]):.4g} to {max(met[name]):.4g}"
        for name in budget.given()
        if met.get(name)
    ]
    return MinitronError(
        f"no shape of the grid, out of {number}, fits {' and '.join(limits)}; change the grid "
        "or the budgets"
    )
