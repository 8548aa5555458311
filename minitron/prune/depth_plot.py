"""A plot of all depth metrics, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minitron.metrics import log
from minitron.prune.depth import Ablation, DepthScores

DEPTH_PLOT = "depth.svg"


def plot_depth(directory: Path, block_influence: Tensor, depth: DepthScores | None) -> None:
    """Write `depth.svg`: one panel a metric over layers counted from 1; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log(f"{DEPTH_PLOT} is not drawn: matplotlib is not installed")
        return
    panels = [("block influence", np.arange(1, len(block_influence) + 1), block_influence.numpy())]
    if depth is not None:
        panels += _trials(depth)
    figure = Figure(figsize=(7, 1.9 * len(panels)), layout="constrained")
    for axes, (title, x, y) in zip(np.ravel(figure.subplots(len(panels), 1)), panels, strict=True):
        axes.bar(x, y, color="0.35", width=0.7)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("layers taken out" if "greedy" in title else "layer", fontsize=8)
        axes.locator_params(axis="x", integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(directory / DEPTH_PLOT, metadata={"Date": None})


def _trials(depth: DepthScores) -> list[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Title, x and y of a panel for everything that was tried."""

    def increase(trials: Sequence[Ablation]) -> NDArray[Any]:
        return np.array([trial.lm_loss for trial in trials]) - depth.lm_loss

    def first(trials: Sequence[Ablation]) -> NDArray[Any]:
        return np.array([trial.drop_layers[0] for trial in trials])

    def accuracy(trials: Sequence[Ablation]) -> NDArray[Any]:
        return np.array([trial.accuracy for trial in trials])

    panels = []
    has_accuracy = depth.accuracy is not None
    if depth.layers:
        distance = np.array([trial.logit_distance for trial in depth.layers])
        panels += [
            ("loss increase without it", first(depth.layers), increase(depth.layers)),
            ("logit distance without it", first(depth.layers), distance),
        ]
        if has_accuracy:
            panels.append(("accuracy without it", first(depth.layers), accuracy(depth.layers)))
    for length in sorted({len(trial.drop_layers) for trial in depth.windows}):
        chosen = [trial for trial in depth.windows if len(trial.drop_layers) == length]
        title = f"loss increase without {length} layers from it on"
        panels.append((title, first(chosen), increase(chosen)))
        if has_accuracy:
            title = f"accuracy without {length} layers from it on"
            panels.append((title, first(chosen), accuracy(chosen)))
    if depth.greedy:
        taken = np.arange(1, len(depth.greedy) + 1)
        panels.append(("loss increase of the greedy search", taken, increase(depth.greedy)))
        if has_accuracy:
            panels.append(("accuracy of the greedy search", taken, accuracy(depth.greedy)))
    return panels
