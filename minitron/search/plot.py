"""A plot of the race: losses and ranks against steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from minitron.metrics import log
from minitron.search.results import Candidate

PLOT_FILE = "ranking.svg"


def ranks(candidates: Sequence[Candidate]) -> dict[str, dict[int, int]]:
    """Rank of every candidate at each step at which at least two were measured; 1 is the best."""
    by_name: dict[str, dict[int, int]] = {candidate.name: {} for candidate in candidates}
    for step in sorted({step for candidate in candidates for step in candidate.losses}):
        measured = [candidate for candidate in candidates if step in candidate.losses]
        measured.sort(key=lambda candidate: candidate.losses[step])
        if len(measured) > 1:
            for rank, candidate in enumerate(measured, start=1):
                by_name[candidate.name][step] = rank
    return by_name


@functools.cache  # once, however often the plot is wanted
def _say_missing() -> None:
    log(f"{PLOT_FILE} is not drawn: matplotlib is not installed")


def plot_race(directory: Path, candidates: Sequence[Candidate]) -> None:
    """Write `ranking.svg`, candidates in the order given, the best first; needs matplotlib.

    Before anybody has raced there is nothing to draw.
    """
    racers = [candidate for candidate in candidates if candidate.losses]
    if not racers:
        return
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, NullLocator, StrMethodFormatter
    except ImportError:
        _say_missing()
        return
    legend_rows = -(-len(racers) // 2)
    figure = Figure(figsize=(9, 4 + 0.17 * legend_rows), layout="constrained")
    loss_axes, rank_axes = figure.subplots(1, 2)
    places = ranks(racers)
    last = max(max(candidate.losses) for candidate in racers)
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, candidate in enumerate(racers):
        look = {"color": colors[number % 10], "marker": "os^Dv"[number // 10 % 5], "markersize": 4}
        look |= {"linewidth": 2.5 if number == 0 else 1.25}
        look |= {"alpha": 1.0 if last in candidate.losses else 0.5}  # who dropped out, paler
        steps = sorted(candidate.losses)
        losses = [candidate.losses[step] for step in steps]
        loss_axes.plot(steps, losses, label=candidate.name, **look)
        place = places[candidate.name]
        rank_axes.plot(list(place), list(place.values()), **look)
    loss_axes.set(xlabel="step", ylabel="validation loss (nats per token)", yscale="log")
    loss_axes.yaxis.set_major_locator(MaxNLocator(10))
    loss_axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    loss_axes.yaxis.set_minor_locator(NullLocator())
    rank_axes.set(xlabel="step", ylabel="rank among those still running")
    rank_axes.invert_yaxis()
    rank_axes.yaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
    for axes in (loss_axes, rank_axes):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(directory / PLOT_FILE, metadata={"Date": None})
