"""Plots as inline SVG that follow the page: its font, its colors, light or dark.

matplotlib draws with one literal color for each role; afterwards every such literal becomes the
page's CSS variable of that role, so that one drawing serves both color schemes and print.
"""

from __future__ import annotations

import functools
import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from minitron.errors import MinitronError
from minitron.report.runs import Curve, Run
from minitron.report.table import count_text, scaled

P = ParamSpec("P")
T = TypeVar("T")

NUM_SERIES = 8
SERIES = [f"#ab{i:02d}fe" for i in range(NUM_SERIES)]
INK, MUTED, GRID, PAPER = "#ab90fe", "#ab91fe", "#ab92fe", "#ab93fe"
_CSS_VARIABLES = {
    **{color: f"var(--series-{i})" for i, color in enumerate(SERIES)},
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
}
_MARKERS = "os^DvPX*"
_DOTTED = (0, (1.2, 1.2))
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), _DOTTED, (0, (6, 1.5, 1.2, 1.5)))
_MAX_POINTS = 400  # of one line; a longer one is averaged in pieces, with its range as a band
_MAX_MARKS = 30  # of one line
_BANDS = ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3))  # lower quantile, upper quantile, opacity

_STYLE = {
    "svg.fonttype": "none",  # text stays text: it scales, is found by a search and read aloud
    "svg.hashsalt": "minitron",  # the same runs give the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


class Line(NamedTuple):
    """Points of one plotted line and the range that each stands for."""

    x: NDArray[Any]
    y: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]


def _styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Run a drawing function under the report's matplotlib settings."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        require_matplotlib()
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def validation_figure(runs: Sequence[Run], labels: Sequence[str]) -> str | None:
    """Validation loss against training tokens, all runs in one axis; None where none has any."""
    lines = {
        i: line
        for i, run in enumerate(runs)
        if run.validation and (line := thin(run.validation, "tokens", "val_loss"))
    }
    if not lines:
        return None
    figure = _figure(9.6, 4.4)
    axes = figure.subplots()
    for i, line in lines.items():
        _draw(axes, line, i, label=labels[i])
    axes.set(xlabel="training tokens", ylabel="validation loss (nats per token)")
    _count_ticks(axes)
    axes.margins(x=0.02)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    falls = "; ".join(f"{labels[i]}: {_describe(line)}" for i, line in lines.items())
    return _svg(figure, f"Line plot of validation loss against training tokens. {falls}.")


@_styled
def training_figure(run: Run, index: int) -> str | None:
    """Training loss, and KL where it is another number, against optimizer steps."""
    if run.training is None:
        return None
    keys = ["loss", "kl"]
    if np.allclose(run.training["loss"], run.training["kl"], rtol=1e-4, equal_nan=True):
        keys = ["kl"]  # logit distillation alone: the loss is the KL
    lines = {key: line for key in keys if (line := thin(run.training, "step", key))}
    if not lines:
        return None
    figure = _figure(4.7, 3.1)
    axes = figure.subplots()
    for offset, (key, line) in enumerate(lines.items()):
        # The second line keeps the run's color and takes other dashes.
        _draw(axes, line, index + offset * NUM_SERIES, label=key, alone=True)
    axes.set(xlabel="optimizer step", ylabel=f"{', '.join(lines)} (nats per token)")
    _count_ticks(axes)
    if len(lines) > 1:
        axes.legend(loc="upper right")
    falls = "; ".join(f"{key}: {_describe(line)}" for key, line in lines.items())
    return _svg(figure, f"Line plot of {run.name}'s training against optimizer steps. {falls}.")


@_styled
def scores_figure(run: Run) -> str:
    """Block influence, and how the importance of channels, neurons and heads is spread."""
    from matplotlib.ticker import LogLocator, NullLocator

    assert run.scores is not None
    scores = run.scores
    influence = scores["block_influence"]
    layers = np.arange(1, len(influence) + 1)  # counted from 1, like prune.drop_layers
    axes_names = {"hidden": "Embedding channels", "ffn": "MLP neurons", "heads": "Attention heads"}
    figure = _figure(9.6, 6.2)
    grid = figure.add_gridspec(2, 6, hspace=0.12)

    axes = figure.add_subplot(grid[0, :3], title="Block influence")
    axes.bar(layers, influence, color=INK, alpha=0.75, width=0.7)
    axes.set(xlabel="layer", ylabel="1 - cosine(input, output)")
    axes.locator_params(axis="x", integer=True)

    axes = figure.add_subplot(grid[0, 3:], title="Importance retained")
    for i, (name, label) in enumerate(axes_names.items()):
        # Channels are ranked once for all layers, by their sum; the others within each layer.
        ranked = scores[name].sum(axis=0, keepdims=True) if name == "hidden" else scores[name]
        _draw(axes, retained(ranked), i, label=label)
    axes.plot([0, 100], [0, 100], color=MUTED, lw=0.8, linestyle=_DOTTED, label="All alike")
    axes.set(xlabel="kept, the best first (%)", ylabel="share of all importance (%)")
    axes.set(xlim=(0, 100), ylim=(0, 101))
    axes.legend(loc="lower right")

    for i, (name, label) in enumerate(axes_names.items()):
        axes = figure.add_subplot(grid[1, 2 * i : 2 * i + 2], title=label)
        for lower, upper, alpha in _BANDS:
            low, high = np.quantile(scores[name], (lower, upper), axis=1)
            axes.fill_between(layers, low, high, color=SERIES[i], alpha=alpha, lw=0)
        median = np.median(scores[name], axis=1)
        _draw(axes, Line(layers, median, median, median), i)
        axes.set(xlabel="layer", ylabel="importance" if i == 0 else "")
        axes.locator_params(axis="x", integer=True)
        if scores[name].min() > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_locator(NullLocator())
    order = np.argsort(influence)
    return _svg(
        figure,
        f"Five plots of the importance scores in {run.name}. Block influence of {len(layers)} "
        f"layers, lowest in layer {layers[order[0]]} ({influence[order[0]]:.3g}) and highest in "
        f"layer {layers[order[-1]]} ({influence[order[-1]]:.3g}); the share of all importance that "
        "the best channels, neurons and heads hold; the spread of each of the three by layer.",
    )


def thin(curve: Curve, x: str, y: str) -> Line | None:
    """The finite points of a curve, averaged where they are too many; None without any."""
    finite = np.isfinite(curve[x]) & np.isfinite(curve[y])
    if not finite.any():
        return None
    xs, ys = curve[x][finite], curve[y][finite]
    if len(xs) <= _MAX_POINTS:
        return Line(xs, ys, ys, ys)
    starts = np.linspace(0, len(xs), _MAX_POINTS, endpoint=False, dtype=int)
    counts = np.diff(starts, append=len(xs))
    return Line(
        np.add.reduceat(xs, starts) / counts,
        np.add.reduceat(ys, starts) / counts,
        np.minimum.reduceat(ys, starts),
        np.maximum.reduceat(ys, starts),
    )


def retained(scores: NDArray[Any]) -> Line:
    """Share of the summed importance that the best hold, against how many are kept, in percent.

    Args:
        scores: [rows, units]; ranked within each row, then averaged over the rows.
    """
    ranked = -np.sort(-scores.astype(np.float64), axis=1)
    total = np.maximum(ranked.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    share = 100 * (np.cumsum(ranked, axis=1) / total).mean(axis=0)
    share = np.concatenate([[0.0], share])
    units = scores.shape[1]
    keep = np.unique(np.linspace(0, units, min(units, _MAX_POINTS) + 1, dtype=int))
    return Line(100 * keep / units, share[keep], share[keep], share[keep])


def _draw(
    axes: Any, line: Line, index: int, *, label: str | None = None, alone: bool = False
) -> None:
    """Draw a line and its range in the color, dashes and marker of series `index`.

    Args:
        axes: where to draw.
        line: what to draw.
        index: the series; what it looks like stays the same in all plots.
        label: its name in the legend.
        alone: no other series is in the axes, so that a long line needs no markers.
    """
    color = SERIES[index % NUM_SERIES]
    axes.plot(
        line.x,
        line.y,
        color=color,
        label=label,
        linestyle=_DASHES[index // NUM_SERIES % len(_DASHES)],
        marker=None if alone and len(line.x) > _MAX_MARKS else _MARKERS[index % NUM_SERIES],
        markevery=-(-len(line.x) // _MAX_MARKS),
    )
    if (line.high > line.low).any():
        axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, lw=0)


def _count_ticks(axes: Any) -> None:
    """Label the x axis with whole counts: 0, 500k, 1M."""
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(lambda value, _: "{:g}{}".format(*scaled(value)))


def _describe(line: Line) -> str:
    if len(line.x) == 1:
        return f"{line.y[0]:.3f} at {count_text(line.x[0])}"
    return (
        f"from {line.y[0]:.3f} at {count_text(line.x[0])} "
        f"to {line.y[-1]:.3f} at {count_text(line.x[-1])}"
    )


def require_matplotlib() -> None:
    """Check that there is something to draw with.

    Raises:
        MinitronError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MinitronError(
            "the report needs matplotlib, which is not installed; run: pip install matplotlib"
        ) from None


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Any, alternative_text: str) -> str:
    """Render a figure as an SVG element that takes its colors from the page around it."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for color, variable in _CSS_VARIABLES.items():
        svg = svg.replace(color, variable)
    # Several figures share one page, so that their ids must differ.
    prefix = "f" + hashlib.sha256(alternative_text.encode()).hexdigest()[:8]
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = html.escape(alternative_text, quote=True)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
