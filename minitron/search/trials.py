"""Shapes as models: cut from the source as they are loaded, measured, trained, and the best kept.

A shape is never written to disk to be tried. Every rank reads the slices of its part from the
source, so that trying one costs a read of the model and no space. What a race trains lies in its
own run directory, with a checkpoint at each rung, until it drops out.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from minitron import artifact, platform
from minitron.data.batches import EvalBatches, TrainBatches
from minitron.errors import Diverged, MinitronError
from minitron.eval.perplexity import evaluate
from minitron.metrics import METRICS, log, read_metrics
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel, build_chunks, check_parallel, freeze
from minitron.model.sharding import save_model
from minitron.model.weights import WeightReader
from minitron.parallel import Topology, on_rank_zero
from minitron.prune.pruning import PrunedWeights, PruningPlan
from minitron.prune.target import target_shape
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import PruneConfig, SelectionConfig
from minitron.sections.search import SIZES
from minitron.sections.train import TrainConfig
from minitron.train.checkpoint import ModelFiles, checkpoint_path, load_checkpoint
from minitron.train.loop import CHECKPOINTS, Trainer
from minitron.train.objective import LanguageModeling, Objective

RACE_DIR = "race"


def check_candidate(
    source: Architecture,
    arch: Architecture,
    parallel: ParallelConfig,
    selection: SelectionConfig,
) -> None:
    """Refuse the source's own shape, one that it cannot be pruned to, or that ranks cannot share.

    Raises:
        MinitronError: with the sizes.
    """
    sizes = {name: getattr(arch, name) for name in SIZES}
    if arch == source:
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise MinitronError(f"{shown} is the model's own shape")
    try:
        target_shape(PruneConfig(**sizes, **vars(selection)), source)
    except MinitronError as error:
        message = str(error)
        for name in SIZES:  # as this user gives them
            message = message.replace(f"prune.{name}", f"grid.{name}")
        raise MinitronError(message) from None
    check_parallel(arch, parallel)


class Trials:
    """Makes models of shapes on the ranks of this run; all ranks call everything.

    Args:
        plan: what a shape takes of the model.
        weights: the model's tensors.
        topology: this rank's place.
        batches: training data of this data-parallel rank, the same for all shapes.
        validation: held-out data that all losses are measured on.
        train: of the whole race.
        files: config and tokenizer of what is written.
        out: directory of the search.
    """

    def __init__(
        self,
        plan: Callable[[Architecture], PruningPlan],
        weights: WeightReader,
        topology: Topology,
        batches: TrainBatches,
        validation: EvalBatches,
        train: TrainConfig,
        files: ModelFiles,
        out: Path,
    ) -> None:
        self._plan = plan
        self._weights = weights
        self._topology = topology
        self._batches = batches
        self._validation = validation
        self._train = train
        self._files = files
        self._out = out

    def loss(self, model: Sequence[LlamaModel]) -> float:
        """Validation loss of a model, nats per token."""
        objective = LanguageModeling()
        names = objective.validation_losses
        return evaluate(model, self._validation, objective.validation, names)["val_loss"]

    def pruned_loss(self, arch: Architecture) -> float:
        """Validation loss of the source pruned to a shape.

        Raises:
            MinitronError: it is not finite.
        """
        loss = self.loss([freeze(chunk) for chunk in self._build(arch)])
        platform.release_memory()
        if not math.isfinite(loss):
            raise MinitronError(
                f"pruned to {arch.num_parameters:,} parameters the model's loss is {loss}; "
                "evaluate the model and measure its importance again"
            )
        return loss

    def train(
        self, name: str, arch: Architecture, objective: Objective, until_step: int
    ) -> dict[int, float]:
        """Train the source pruned to a shape until a step, from where it was left.

        Returns:
            The validation losses so far, by step; that of the last step is missing if training
            diverged on the way.
        """
        run = self._run(name)
        on_rank_zero(lambda: artifact.create_directory(run))
        model = self._build(arch, trained=True)
        trainer = Trainer(
            model, objective, self._batches, self._validation, self._train, run, self._files
        )
        with contextlib.closing(trainer):
            trainer.resume()
            try:
                trainer.run(until_step)
            except Diverged as error:
                log(f"{name} drops out: {error}")
        del trainer, model
        platform.release_memory()
        records = on_rank_zero(lambda: read_metrics(run / METRICS))
        return {record["step"]: record["val_loss"] for record in records if "val_loss" in record}

    def drop_checkpoints(self, name: str) -> None:
        """Delete what it takes to go on; the run's metrics stay."""
        checkpoints = self._run(name) / CHECKPOINTS
        on_rank_zero(lambda: shutil.rmtree(checkpoints, ignore_errors=True))

    def save(self, name: str, arch: Architecture, step: int, directory: Path) -> None:
        """Write the model of a run's checkpoint as a Hugging Face directory."""
        model = build_chunks(arch, self._topology, None, dtype=self._files.dtype)
        load_checkpoint(checkpoint_path(self._run(name) / CHECKPOINTS, step), model)
        save_model(model, directory, dtype=self._files.dtype)
        on_rank_zero(lambda: self._files.write(directory, arch))

    def _build(self, arch: Architecture, *, trained: bool = False) -> list[LlamaModel]:
        pruned = PrunedWeights(self._weights, self._plan(arch))
        return build_chunks(
            arch,
            self._topology,
            pruned,
            dtype=self._files.dtype,
            recompute=self._train.recompute if trained else "none",
        )

    def _run(self, name: str) -> Path:
        return self._out / RACE_DIR / name
