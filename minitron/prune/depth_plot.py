"""A plot of what is known of each layer, `depth.svg`: a row for every metric.

On the left everything is drawn over the first layer that was left out, a line for each number of
layers. On the right, on the same scale, is what the greedy search found; where block influence has
no counterpart there, stands which layer it took when.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from minitron.metrics import log
from minitron.prune.depth import Ablation, DepthScores

DEPTH_PLOT = "depth.svg"

_STYLE = {
    "svg.hashsalt": "minitron",  # the same scores give the same bytes
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}
_MARKERS = "os^Dv"
_GREEDY = {"color": "tab:red", "marker": "X"}


class Panel(NamedTuple):
    """What a row shows of every trial."""

    label: str
    value: Callable[[Ablation], float]
    whole: float | None = None
    """The whole model's, where that is not zero."""


def plot_depth(directory: Path, block_influence: Tensor, depth: DepthScores | None) -> None:
    """Write `depth.svg` into an existing directory; needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        log(f"{DEPTH_PLOT} is not drawn: matplotlib is not installed")
        return
    with matplotlib.rc_context(_STYLE):
        figure = _draw(block_influence, depth)
        figure.savefig(directory / DEPTH_PLOT, metadata={"Date": None})


def _draw(block_influence: Tensor, depth: DepthScores | None) -> Any:
    from matplotlib.figure import Figure

    panels = [] if depth is None else _panels(depth)
    widths = [2, 1] if depth is not None and depth.greedy else [1]
    rows, num_layers = 1 + len(panels), len(block_influence)
    figure = Figure(figsize=(7.2, 0.8 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, len(widths), sharex="col", squeeze=False, width_ratios=widths)
    grid[0, 0].bar(range(1, num_layers + 1), block_influence.tolist(), color="0.55", width=0.7)
    grid[0, 0].set_ylabel("block influence\n(1 − cosine)")
    grid[-1, 0].set(xlabel="layer", xticks=_ticks(num_layers), xlim=(0.3, num_layers + 0.7))
    if depth is None:
        return figure
    if depth.windows:
        grid[-1, 0].set_xlabel("first layer left out")
    for (left, *right), panel in zip(grid[1:], panels, strict=True):
        for axes in right:
            axes.sharey(left)
            _draw_greedy(axes, depth, panel)
        _draw_trials(left, depth, panel)
    if depth.greedy:
        taken = [trial.drop_layers[-1] for trial in depth.greedy]
        grid[0, 1].plot(range(1, len(taken) + 1), taken, linestyle="none", **_GREEDY)
        grid[0, 1].set(ylabel="layer that goes", yticks=_ticks(num_layers))
        grid[0, 1].set_ylim(0.3, num_layers + 0.7)
        grid[-1, 1].set(xlabel="layers left out", xticks=_ticks(len(taken), most=6))
    handles = {
        label: handle
        for axes in grid[-1]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=len(handles) if len(handles) <= 5 else 4,
        frameon=False,
    )
    return figure


def _panels(depth: DepthScores) -> list[Panel]:
    panels = [
        Panel("loss increase\n(nats per token)", lambda trial: trial.lm_loss - depth.lm_loss),
        Panel("logit distance\n(relative, squared)", lambda trial: trial.logit_distance),
    ]
    if depth.accuracy is not None:
        panels.append(Panel("accuracy\non tasks", _accuracy, depth.accuracy))
    return panels


def _accuracy(trial: Ablation) -> float:
    assert trial.accuracy is not None, "as the whole model, so every trial"
    return trial.accuracy


def _draw_trials(axes: Any, depth: DepthScores, panel: Panel) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogLocator, NullFormatter

    singles = {1: depth.layers} if depth.layers else {}
    series = singles | depth.windows_by_length()
    for number, (length, trials) in enumerate(series.items()):
        axes.plot(
            [trial.drop_layers[0] for trial in trials],
            [panel.value(trial) for trial in trials],
            color=colormaps["viridis"](number / len(series)),
            marker=_MARKERS[number % len(_MARKERS)],
            label="1 layer left out" if length == 1 else f"{length} neighbours",
        )
    drawn = [panel.value(trial) for trial in (*depth.layers, *depth.windows, *depth.greedy)]
    if panel.whole is not None:
        axes.axhline(panel.whole, color="0.3", linestyle="--", label="whole model")
    elif min(drawn) > 0:
        axes.set_yscale("log")  # the first and last layers cost many times what others do
        if max(drawn) < 100 * min(drawn):
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(panel.label)


def _draw_greedy(axes: Any, depth: DepthScores, panel: Panel) -> None:
    values = [panel.value(trial) for trial in depth.greedy]
    axes.plot(range(1, len(values) + 1), values, label=depth.greedy_name, **_GREEDY)
    axes.tick_params(labelleft=False)  # the left panel's


def _ticks(last: int, *, most: int = 10) -> list[int]:
    """About `most` numbers from 1 to `last`: 1 and the multiples of a round step."""
    step = next((step for step in (1, 2, 4, 5, 8, 10) if last <= most * step), 20)
    return sorted({1, *range(step, last + 1, step)})
