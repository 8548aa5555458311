"""Depth pruning: which layers go.

Layers are dropped whole and the rest is renumbered in its old order. Users count layers from 1, as
the Minitron papers do (dropping 16 to 31 of 32 keeps the first fifteen and the last); code counts
from 0. `kept_layers` is the step from one to the other.

Block influence comes with every score file. `depth.json` beside it holds what was found by leaving
layers out (`minitron.prune.ablation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from minitron import artifact
from minitron.errors import MinitronError
from minitron.prune.scores import top_indices
from minitron.sections.prune import DepthCriterion, LayerRanking

DEPTH_FILE = "depth.json"

_TRIALS: dict[LayerRanking, tuple[Literal["layers", "windows"], DepthCriterion]] = {
    "lm_loss": ("layers", "lm_loss"),
    "logit_distance": ("layers", "logit_distance"),
    "accuracy": ("layers", "accuracy"),
    "window": ("windows", "lm_loss"),
    "window_logit_distance": ("windows", "logit_distance"),
    "window_accuracy": ("windows", "accuracy"),
}
"""What a ranking looks at, and what it keeps low."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A model without some of its layers."""

    drop_layers: list[int]
    """The layers that were left out, counted from 1, in the order in which they went."""
    lm_loss: float
    """Language-model loss in nats per token."""
    logit_distance: float
    """Squared distance of the logits from the whole model's, over the squares of these."""
    accuracy: float | None = None
    """Mean over the tasks, if there were any."""

    def cost(self, criterion: DepthCriterion) -> tuple[float, ...]:
        """What a search keeps low; of equal accuracies, which are common, the lower loss wins."""
        if criterion == "accuracy":
            assert self.accuracy is not None, "accuracy needs tasks"
            return -self.accuracy, self.lm_loss
        return (getattr(self, criterion),)


@dataclass(frozen=True, kw_only=True)
class DepthScores:
    """What was found by leaving layers out; lists are empty where it was not tried."""

    samples: int
    """Calibration samples of every trial."""
    lm_loss: float
    """Of the whole model."""
    accuracy: float | None = None
    """Of the whole model, if there were tasks."""
    layers: list[Ablation]
    """Without each layer by itself."""
    windows: list[Ablation]
    """Without each run of neighbouring layers."""
    greedy: list[Ablation]
    """Without one more layer each time."""
    criterion: DepthCriterion | None = None
    """What the greedy search kept low; None without one, and where an old file does not say."""

    @property
    def greedy_name(self) -> str:
        """What tables and logs call the greedy search."""
        return f"greedy by {self.criterion}" if self.criterion else "greedy"

    def windows_by_length(self) -> dict[int, list[Ablation]]:
        """The windows of each length, shortest first, in the order of their first layers."""
        lengths = sorted({len(trial.drop_layers) for trial in self.windows})
        return {n: [t for t in self.windows if len(t.drop_layers) == n] for n in lengths}


def by_cost(trials: Sequence[Ablation], criterion: DepthCriterion) -> list[Ablation]:
    """The trials, cheapest first; of equals that of the later layers, as for block influence."""
    return sorted(trials, key=lambda trial: (*trial.cost(criterion), -trial.drop_layers[-1]))


def layers_to_drop(block_influence: Tensor, num_layers: int) -> tuple[int, ...]:
    """The least influential layers, counted from 1, such that `num_layers` remain.

    Of two equally influential layers the later one goes.

    Args:
        block_influence: [L].
        num_layers: layers to keep.

    Raises:
        MinitronError: there are fewer than `num_layers` layers.

    Source: arXiv:2403.03853; arXiv:2407.14679 §2.2.
    """
    total = len(block_influence)
    if not 1 <= num_layers <= total:
        raise MinitronError(f"cannot keep {num_layers} of {total} layers; keep 1 to {total}")
    kept = set(top_indices(block_influence, num_layers).tolist())
    return tuple(layer + 1 for layer in range(total) if layer not in kept)


def missing_trials(
    ranking: LayerRanking,
    count: int,
    *,
    layers: bool,
    windows: Collection[int],
    greedy: int,
    tasks: bool,
) -> str | None:
    """The key of launch/importance.py that a ranking of layers still needs; None if it has all.

    Args:
        ranking: of layers.
        count: layers to drop.
        layers: whether each was, or will be, left out by itself.
        windows: lengths of the runs of neighbours that were left out.
        greedy: layers that the greedy search took.
        tasks: whether trials were measured on tasks.
    """
    if ranking == "block_influence":
        return None
    if ranking == "greedy":
        return None if greedy >= count else f"depth.greedy {count}"
    tried, criterion = _TRIALS[ranking]
    if tried == "layers" and not layers:
        return "depth.layers"
    if tried == "windows" and count not in windows:
        return f"depth.windows {count}"
    return "tasks.names" if criterion == "accuracy" and not tasks else None


def ranked_layers(depth: DepthScores, ranking: LayerRanking, count: int) -> tuple[int, ...]:
    """The `count` layers to drop by trial, counted from 1.

    `lm_loss`, `logit_distance` and `accuracy` take the layers whose absence alone costs least, the
    windows the run of neighbours that does, `greedy` what the greedy search took first.

    Raises:
        MinitronError: this was not tried.
    """
    windows = depth.windows_by_length()
    missing = missing_trials(
        ranking,
        count,
        layers=bool(depth.layers),
        windows=windows,
        greedy=len(depth.greedy),
        tasks=depth.accuracy is not None,
    )
    if missing:
        raise MinitronError(
            f"prune.layer_ranking={ranking} needs trials that these scores do not hold; run "
            f"launch/importance.py with --{missing}"
        )
    if ranking == "greedy":
        trials = depth.greedy[count - 1 : count]
    else:
        tried, criterion = _TRIALS[ranking]
        if tried == "layers":
            trials = by_cost(depth.layers, criterion)[:count]
        else:
            trials = by_cost(windows[count], criterion)[:1]
    return tuple(sorted(layer for trial in trials for layer in trial.drop_layers))


def save_depth(directory: Path, depth: DepthScores) -> None:
    """Write `depth.json` into an existing directory."""
    artifact.write_json(directory / DEPTH_FILE, dataclasses.asdict(depth))


def load_depth(scores_path: Path) -> DepthScores:
    """Read the `depth.json` beside a score file.

    Raises:
        MinitronError: it is missing or damaged.
    """
    directory = scores_path if scores_path.is_dir() else scores_path.parent
    file = directory / DEPTH_FILE
    if not file.exists():
        raise MinitronError(
            f"{file} does not exist; run launch/importance.py with --depth.layers, "
            "--depth.windows or --depth.greedy"
        )
    values = artifact.read_json(file)
    try:
        return DepthScores(
            samples=values["samples"],
            lm_loss=values["lm_loss"],
            accuracy=values.get("accuracy"),
            layers=[Ablation(**trial) for trial in values["layers"]],
            windows=[Ablation(**trial) for trial in values["windows"]],
            greedy=[Ablation(**trial) for trial in values["greedy"]],
            criterion=values.get("criterion"),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise MinitronError(
            f"{file} is not what launch/importance.py writes ({error}); measure again"
        ) from None


def kept_layers(num_layers: int, drop_layers: Sequence[int]) -> tuple[int, ...]:
    """The layers that remain, counted from 0: layer i of the result was `kept_layers(...)[i]`.

    Args:
        num_layers: layers of the source model.
        drop_layers: layers to drop, counted from 1.

    Raises:
        MinitronError: a layer does not exist or is named twice, or none would remain.
    """
    unknown = [layer for layer in drop_layers if not 1 <= layer <= num_layers]
    if unknown:
        raise MinitronError(
            f"drop_layers names layer {unknown[0]}; the model has layers 1 to {num_layers}, "
            "counted from 1"
        )
    repeated = [layer for layer in drop_layers if list(drop_layers).count(layer) > 1]
    if repeated:
        raise MinitronError(f"drop_layers names layer {repeated[0]} twice; name each layer once")
    if len(drop_layers) == num_layers:
        raise MinitronError(f"drop_layers names all {num_layers} layers; keep at least one")
    return tuple(layer for layer in range(num_layers) if layer + 1 not in drop_layers)
