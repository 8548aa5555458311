"""What is known of each layer, as tables: shown on the terminal, and in full in `depth.md`."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from minitron.metrics import format_markdown, format_table
from minitron.prune.depth import Ablation, DepthScores, by_cost
from minitron.sections.prune import DepthCriterion

TABLE_FILE = "depth.md"

Table = tuple[list[str], list[list[object]]]
"""Headers and rows."""


def depth_table(block_influence: Tensor, depth: DepthScores | None) -> str:
    """Every metric of every layer, the best windows and the steps of the greedy search."""
    tables = [_layers(block_influence, depth)]
    if depth is not None:
        tables += [_best_windows(depth), _greedy(depth)]
    return _joined(format_table, tables, depth)


def save_depth_table(directory: Path, block_influence: Tensor, depth: DepthScores | None) -> None:
    """Write `depth.md`: the tables that are shown, then all windows; in an existing directory."""
    tables = [_layers(block_influence, depth)]
    if depth is not None:
        tables += [_best_windows(depth), _greedy(depth), *_windows(depth)]
    text = _joined(format_markdown, tables, depth)
    (directory / TABLE_FILE).write_text(f"{text}\n", encoding="utf-8")


def _joined(
    render: Callable[[list[str], list[list[object]]], str],
    tables: Sequence[Table],
    depth: DepthScores | None,
) -> str:
    parts = [render(headers, rows) for headers, rows in tables if rows]
    return "\n\n".join(parts if depth is None else [*parts, _note(depth)])


def _note(depth: DepthScores) -> str:
    accuracy = "" if depth.accuracy is None else f" and its accuracy {depth.accuracy:.4f}"
    return (
        f"On {depth.samples} samples the whole model's loss is {depth.lm_loss:.4f} nats per token"
        f"{accuracy}. Layers count from 1.\nLogit distance: squares of what the logits moved by, "
        "over the whole model's squares."
    )


def _layers(block_influence: Tensor, depth: DepthScores | None) -> Table:
    headers = ["layer", "block influence"]
    rows: list[list[object]] = [[i, x] for i, x in enumerate(block_influence.tolist(), start=1)]
    if depth is not None and depth.layers:
        headers += ["lm loss without it", *_measured(depth)[1:]]
        for row, trial in zip(rows, depth.layers, strict=True):
            row += _measures(depth, trial)
    return headers, rows


def _best_windows(depth: DepthScores) -> Table:
    """The best windows of each length, and what they are the best by."""
    criteria = typing.get_args(DepthCriterion)[: 2 if depth.accuracy is None else 3]
    rows: list[list[object]] = []
    for windows in depth.windows_by_length().values():
        best = [(by_cost(windows, criterion)[0], criterion) for criterion in criteria]
        best.sort(key=lambda found: found[0].drop_layers[0])
        for _, same in itertools.groupby(best, key=lambda found: found[0].drop_layers[0]):
            (trial, name), *others = same
            names = ", ".join([name, *(name for _, name in others)])
            rows.append([_range(trial), names, *_measures(depth, trial)])
    return ["best window", "by", *_measured(depth)], rows


def _windows(depth: DepthScores) -> list[Table]:
    return [
        (
            [f"window of {length}", *_measured(depth)],
            [[_range(trial), *_measures(depth, trial)] for trial in windows],
        )
        for length, windows in depth.windows_by_length().items()
    ]


def _greedy(depth: DepthScores) -> Table:
    rows = [
        [count, trial.drop_layers[-1], *_measures(depth, trial)]
        for count, trial in enumerate(depth.greedy, start=1)
    ]
    return [depth.greedy_name, "takes layer", *_measured(depth)], rows


def _measured(depth: DepthScores) -> list[str]:
    accuracy = [] if depth.accuracy is None else ["accuracy"]
    return ["lm loss", "increase", "logit distance", *accuracy]


def _measures(depth: DepthScores, trial: Ablation) -> list[object]:
    accuracy = [] if trial.accuracy is None else [trial.accuracy]
    return [trial.lm_loss, trial.lm_loss - depth.lm_loss, trial.logit_distance, *accuracy]


def _range(window: Ablation) -> str:
    first, last = window.drop_layers[0], window.drop_layers[-1]
    return str(first) if first == last else f"{first}-{last}"
