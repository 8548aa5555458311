"""Measure the importance of a model's channels, neurons, heads and layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from minitron import artifact, config
from minitron.data.batches import DataConfig
from minitron.parallel import ParallelConfig, on_rank_zero
from minitron.platform import Precision
from minitron.prune.importance import ImportanceConfig, measure_importance
from minitron.prune.scores import save_scores
from minitron.stage import run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to score."""

    path: Path
    """Its Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Score every embedding channel, MLP neuron, query head, key/value head and layer of a model,
    in one forward-only pass. One score file holds all nine aggregations and serves any number of
    prunings.
    """

    model: ModelSource
    """The model to score."""
    data: DataConfig
    """Calibration data."""
    out: Path
    """Directory of the scores."""
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    """Samples and their batches."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the scores are the same for all."""
    precision: Precision = "fp32"
    """Of weights and activations; sums are kept in fp64."""
    seed: int = 1234
    """Has no effect: the data is read in order. Every stage accepts it."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""


def main(recipe: Recipe) -> None:
    """Measure on all ranks, write on one."""
    artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=[recipe.model.path])
    measured, calibration = measure_importance(
        recipe.model.path,
        data=recipe.data,
        importance=recipe.importance,
        parallel=recipe.parallel,
        precision=recipe.precision,
    )

    def write() -> None:
        with artifact.publish(recipe.out, overwrite=recipe.overwrite) as directory:
            save_scores(directory, measured)
            artifact.write_manifest(
                directory,
                stage="importance",
                recipe=config.to_dict(recipe),
                parents={"model": recipe.model.path},
                metrics={
                    "calibration": dataclasses.asdict(calibration),
                    "block_influence": measured.block_influence.tolist(),
                },
            )

    on_rank_zero(write)


if __name__ == "__main__":
    run(Recipe, main)
