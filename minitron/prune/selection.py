"""How a recipe has things chosen, made scores, layers and a plan.

What `launch/prune.py` does for one shape, `launch/search.py` does for many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from minitron import artifact
from minitron.errors import MinitronError
from minitron.metrics import log
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.parallel import on_rank_zero
from minitron.prune.baselines import baseline_scores
from minitron.prune.depth import DepthScores, load_depth, ranked_layers
from minitron.prune.pruning import PruningPlan, plan_pruning
from minitron.prune.scores import ImportanceScores, check_origin, load_scores
from minitron.sections.prune import WIDTHS, SelectionConfig


def stored_scores(
    selection: SelectionConfig, model_dir: Path, scores_path: Path | None, *, seed: int
) -> ImportanceScores | None:
    """What ranks channels, neurons, heads and, by their influence, layers; call on all ranks.

    Args:
        selection: the method, and the aggregations of what was measured.
        model_dir: the model to prune.
        scores_path: what launch/importance.py wrote, for the method that needs it.
        seed: of the random method.

    Returns:
        None where activations rank and there is no `scores_path`.

    Raises:
        MinitronError: the scores are damaged, or of another model.
    """
    if selection.method != "activation":
        arch = hf.read_architecture(model_dir)
        weights = hf.open_weights(model_dir, arch)
        return baseline_scores(selection.method, arch, seed=seed, weights=weights)
    if scores_path is None:
        return None
    aggregation = selection.batch_aggregation, selection.sequence_aggregation
    scores = load_scores(scores_path).scores(*aggregation)
    _check_directory(scores_path, model_dir)
    return scores


def _check_directory(scores_path: Path, model_dir: Path) -> None:
    """Refuse scores or trials that have been altered, or are of another model."""
    directory = scores_path if scores_path.is_dir() else scores_path.parent
    on_rank_zero(lambda: artifact.verify(directory))
    check_origin(scores_path, model_dir)


class LayerChoice:
    """Which layers go: those that trials rank lowest, or those that scores do.

    Args:
        selection: the ranking.
        model_dir: the model to prune.
        scores_path: what launch/importance.py wrote; trials lie beside the scores.

    Raises:
        MinitronError: the ranking needs trials, and there are none of this model, or damaged ones.
    """

    def __init__(
        self, selection: SelectionConfig, model_dir: Path, scores_path: Path | None
    ) -> None:
        self._ranking = selection.layer_ranking
        self._depth: DepthScores | None = None
        if self._ranking == "block_influence":
            return
        if scores_path is None:
            raise MinitronError(
                f"prune.layer_ranking={self._ranking} needs --scores.path, a directory that "
                "launch/importance.py wrote with --depth.layers, --depth.windows or --depth.greedy"
            )
        self._depth = load_depth(scores_path)
        _check_directory(scores_path, model_dir)

    def drop_layers(self, count: int) -> tuple[int, ...] | None:
        """The `count` layers that trials rank lowest, from 1; None where scores rank them.

        Raises:
            MinitronError: what the ranking needs was not tried.
        """
        if self._depth is None or not count:
            return None
        return ranked_layers(self._depth, self._ranking, count)

    def announce(self) -> None:
        """Say by what layers are chosen, if it is by trials."""
        if self._depth is not None:
            name = self._depth.greedy_name if self._ranking == "greedy" else self._ranking
            log(f"layer ranking: {name}, on {self._depth.samples} samples")


def plan_selected(
    selection: SelectionConfig,
    source: Architecture,
    target: Architecture,
    scores: ImportanceScores | None,
    drop_layers: Sequence[int] | None,
) -> PruningPlan:
    """`plan_pruning` with what a recipe says of heads."""
    return plan_pruning(
        source,
        target,
        scores,
        drop_layers,
        head_ranking=selection.head_ranking,
        group_reduction=selection.group_reduction,
        merge_heads=selection.merge_heads,
    )


def prune_flags(
    selection: SelectionConfig, source: Architecture, target: Architecture
) -> list[str]:
    """The keys of `prune` that make launch/prune.py do the same, as its command line takes them."""
    sizes = {name: getattr(target, name) for name in ("num_layers", *WIDTHS)}
    given = {name: size for name, size in sizes.items() if size != getattr(source, name)}
    for key in dataclasses.fields(selection):
        if getattr(selection, key.name) != key.default:
            given[key.name] = getattr(selection, key.name)
    return [text for name, value in given.items() for text in (f"--prune.{name}", str(value))]
