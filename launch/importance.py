"""Measure the importance of a model's channels, neurons, heads and layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.eval import TaskConfig
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import AblationConfig, ImportanceConfig, ScoringPrecision
from minitron.stage import parse, run


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
    depth: AblationConfig = field(default_factory=AblationConfig)
    """Layers to leave out on trial; nothing unless asked for."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    """Tasks on which each of these trials is measured too."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the scores are the same for all."""
    precision: ScoringPrecision = "fp32"
    """Of weights and activations; sums are kept in fp64 in any case. With fp64 the scores of all
    topologies are the same but for the last bit of a few, for twice the memory."""
    seed: int = 1234
    """Has no effect: the data is read in order. Every stage accepts it."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""

    def __post_init__(self) -> None:
        if self.tasks.names and self.depth.is_empty:
            raise MinitronError(
                f"tasks.names={self.tasks.names} measures trials, but there are none; add "
                "--depth.layers, --depth.windows or --depth.greedy"
            )
        if self.depth.criterion == "accuracy" and not self.tasks.names:
            raise MinitronError("depth.criterion=accuracy needs tasks; give --tasks.names")


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, config
from minitron.data.tokenizer import find_tokenizer
from minitron.eval.tasks import Tasks, mean_metric
from minitron.model import hf
from minitron.model.llama import LlamaModel
from minitron.parallel import initialize, on_rank_zero
from minitron.prune.ablation import measure_depth
from minitron.prune.depth import save_depth
from minitron.prune.depth_plot import plot_depth
from minitron.prune.depth_table import depth_table, save_depth_table
from minitron.prune.importance import collect_importance, open_calibration
from minitron.prune.scores import check_scores, save_scores


def main(recipe: Recipe) -> None:
    """Measure on all ranks, write on one."""
    artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=[recipe.model.path])
    recipe.parallel.check_seq_length(recipe.data.seq_length)
    recipe.depth.check(hf.read_architecture(recipe.model.path).num_layers)
    topology = initialize(recipe.parallel)
    tasks = None  # or opened before the model is loaded: a misspelt name shows at once
    if recipe.tasks.names:
        tasks = Tasks(recipe.tasks, find_tokenizer(recipe.model.path), recipe.parallel)
    model, batches, calibration = open_calibration(
        recipe.model.path,
        data=recipe.data,
        importance=recipe.importance,
        topology=topology,
        precision=recipe.precision,
    )
    measured = collect_importance(model, batches)
    check_scores(measured.scores(), model.arch)
    depth = None
    if not recipe.depth.is_empty:
        depth = measure_depth(model, batches, recipe.depth, _accuracy(recipe, tasks, model))

    def write() -> None:
        with artifact.publish(recipe.out, overwrite=recipe.overwrite) as directory:
            save_scores(directory, measured, model_dir=recipe.model.path, calibration=calibration)
            if depth is not None:
                save_depth(directory, depth)
            save_depth_table(directory, measured.block_influence, depth)
            plot_depth(directory, measured.block_influence, depth)
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
        print(f"{depth_table(measured.block_influence, depth)}\nwrote {recipe.out}", flush=True)

    on_rank_zero(write)


def _accuracy(recipe: Recipe, tasks: Tasks | None, model: LlamaModel) -> Callable[[], float] | None:
    """What measures the model as it is on the recipe's tasks, if there are any."""
    if tasks is None:
        return None

    def measure() -> float:
        size = recipe.importance.micro_batch_size
        results = tasks.evaluate(model, micro_batch_size=size)
        return mean_metric(results, recipe.depth.metric)

    return measure


if __name__ == "__main__":
    run(main, recipe)
