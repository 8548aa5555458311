"""Prune a Llama to a smaller shape: fewer layers, channels, neurons, query or key/value heads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.prune import CheckConfig, ImportanceConfig, PruneConfig
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to prune."""

    path: Path
    """Its Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class ScoresSource:
    """Importance scores of that model."""

    path: Path | None = None
    """Directory that launch/importance.py wrote; without it, scores are measured on `data`. Read
    only where prune.method is activation."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Slice a model to a smaller shape, keeping what is important: what importance scores rank
    highest, those of `scores.path` or new ones measured on `data`. Naming layers to drop needs
    neither. What was written is read back and compared, and runs once: on `data`, or on what the
    scores were measured on, its loss is shown beside the source's and that of a student pruned at
    random. Several ranks share measuring, slicing and checking. Options count layers from 1,
    `pruning.json` in `out` counts layers and everything else from 0.
    """

    model: ModelSource
    """The model to prune."""
    scores: ScoresSource = field(default_factory=ScoresSource)
    """Its importance scores."""
    prune: PruneConfig
    """The shape to reach; what is not named stays as it is."""
    out: Path
    """Directory of the pruned model."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """How to measure importance; used only without `scores.path`."""
    data: DataConfig | None = None
    """What to measure importance on, without `scores.path`, and to check the pruned model on; for
    the check, what the scores of `scores.path` were measured on if it is still there."""
    check: CheckConfig = field(default_factory=CheckConfig)
    """The check of the pruned model's loss. Without any data the model runs on random tokens, and
    what comes out has to be finite."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the forward passes; pruning gives the same result for all."""
    precision: Precision = "fp32"
    """Precision of the measurement; the weights keep the dtype they have."""
    seed: int = 1234
    """Of prune.method=random and of the check's random tokens; the check's random student has the
    next seed, so that it is never the same."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, config
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.parallel import initialize, is_rank_zero, on_rank_zero, publish
from minitron.prune.baselines import baseline_scores
from minitron.prune.check import (
    calibration_data,
    check_finite,
    check_sizes,
    compare_losses,
    losses_table,
)
from minitron.prune.importance import measure_importance
from minitron.prune.pruning import comparison, needs_scores, prune_model
from minitron.prune.scores import ImportanceScores
from minitron.prune.selection import LayerChoice, plan_selected, stored_scores
from minitron.prune.target import arithmetic, target_shape


def main(recipe: Recipe) -> None:
    """Rank, slice, and write the smaller model."""
    source = hf.read_architecture(recipe.model.path)
    target = target_shape(recipe.prune, source)
    if "RANK" in os.environ:
        initialize(recipe.parallel)  # the ranks share the tensors
    drop_layers = _drop_layers(recipe, source, target)
    check_data = _check_data(recipe)
    if recipe.check.samples:
        check_sizes(source, target, check_data, recipe.parallel)
    inputs = [recipe.model.path, recipe.scores.path]
    on_rank_zero(lambda: artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=inputs))
    ranked = needs_scores(source, target, drop_layers)
    scores = _scores(recipe) if ranked else None
    _write(recipe, source, target, scores, drop_layers, check_data)


def _drop_layers(
    recipe: Recipe, source: Architecture, target: Architecture
) -> Sequence[int] | None:
    """The layers that the recipe names or that trials beside its scores rank lowest, if either."""
    count = source.num_layers - target.num_layers
    if recipe.prune.drop_layers or not count:
        return recipe.prune.drop_layers
    choice = LayerChoice(recipe.prune, recipe.model.path, recipe.scores.path)
    choice.announce()
    return choice.drop_layers(count)


def _check_data(recipe: Recipe) -> DataConfig | None:
    """What to check the pruned model on: the recipe's data, else that of its scores."""
    data, check = recipe.data, recipe.check
    if data is None and recipe.scores.path is not None:
        data = calibration_data(recipe.scores.path)
    if data is None and check.samples and check != CheckConfig():
        raise MinitronError(
            f"check.samples={check.samples} with check.micro_batch_size={check.micro_batch_size} "
            "needs data, and there is none that scores were measured on; give --data.path"
        )
    return data


def _scores(recipe: Recipe) -> ImportanceScores:
    """The scores that the recipe names, or new ones, measured by all ranks."""
    prune, model = recipe.prune, recipe.model.path
    scores = stored_scores(prune, model, recipe.scores.path, seed=recipe.seed)
    if scores is not None:
        return scores
    if recipe.data is None:
        raise MinitronError(
            "pruning to this shape needs importance scores; give --scores.path (a directory that "
            "launch/importance.py wrote) or --data.path to measure them now"
        )
    measured, _ = measure_importance(
        model,
        data=recipe.data,
        importance=recipe.importance,
        parallel=recipe.parallel,
        precision=recipe.precision,
    )
    return measured.scores(prune.batch_aggregation, prune.sequence_aggregation)


def _write(
    recipe: Recipe,
    source: Architecture,
    target: Architecture,
    scores: ImportanceScores | None,
    drop_layers: Sequence[int] | None,
    check_data: DataConfig | None,
) -> None:
    prune = recipe.prune
    plan = plan_selected(prune, source, target, scores, drop_layers)
    if is_rank_zero():
        lines = [*arithmetic(prune, source), comparison(source, target)]
        if dropped := plan.dropped_layers(source):
            layers = "layer" if len(dropped) == 1 else "layers"
            lines.append(f"dropped {layers} {', '.join(map(str, dropped))} (counted from 1)")
        if prune.merge_heads != "none" and target.num_attention_heads == source.num_attention_heads:
            lines.append(
                f"prune.merge_heads={prune.merge_heads} has no effect: all "
                f"{source.num_attention_heads} query heads stay"
            )
        print("\n".join(lines), flush=True)
    parents = {"model": recipe.model.path}
    ranked = scores is not None and prune.method == "activation"
    if recipe.scores.path and (ranked or drop_layers != prune.drop_layers):
        parents["scores"] = recipe.scores.path
    results: dict[str, Any] = {
        "num_parameters": target.num_parameters,
        "num_non_embedding_parameters": target.num_non_embedding_parameters,
        "source_num_parameters": source.num_parameters,
    }
    with publish(recipe.out, overwrite=recipe.overwrite) as directory:
        prune_model(recipe.model.path, directory, plan)
        if recipe.check.samples and check_data is not None:
            chance = baseline_scores("random", source, seed=recipe.seed + 1)
            losses = compare_losses(
                recipe.model.path,
                directory,
                plan_selected(prune, source, target, chance, None),
                data=check_data,
                check=recipe.check,
                parallel=recipe.parallel,
                precision=recipe.precision,
            )
            if is_rank_zero():
                print(losses_table(losses, source, target), flush=True)
            results["lm_loss"] = losses
            results["lm_loss_data"] = {
                "path": list(map(str, check_data.path)),
                "seq_length": check_data.seq_length,
                "samples": recipe.check.samples,
            }
        elif recipe.check.samples:
            check_finite(
                directory, parallel=recipe.parallel, precision=recipe.precision, seed=recipe.seed
            )
            if is_rank_zero():
                print("loss not checked: give --data.path", flush=True)

        def manifest() -> None:
            artifact.write_manifest(
                directory,
                stage="prune",
                recipe=config.to_dict(recipe),
                parents=parents,
                metrics=results,
            )

        on_rank_zero(manifest)
    if is_rank_zero():
        print(f"wrote {recipe.out}", flush=True)


if __name__ == "__main__":
    run(main, recipe)
