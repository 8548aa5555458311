"""Small data and small training runs that tests start on the ranks of the pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron import platform
from minitron.data.batches import Batch, DataConfig, EvalBatches, TrainBatches
from minitron.data.batches import open_train, open_windows
from minitron.distill.losses import DistillConfig, LogitDistillation
from minitron.distill.teacher import Teacher
from minitron.model.llama import LlamaModel, build_llama
from minitron.model.sharding import open_model
from minitron.parallel import ParallelConfig, Topology, initialize
from minitron.platform import Precision
from minitron.train.config import TrainConfig
from minitron.train.loop import Trainer
from minitron.train.objective import LanguageModeling, Objective
from tests.harness import run_distributed

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

SEQ_LENGTH = 16
VOCAB = 301  # odd, and spread over more than one rank's padded share


def _ranks(tp: int = 1, pp: int = 1, dp: int = 1, **options: Any) -> tuple[int, ParallelConfig]:
    return tp * pp * dp, ParallelConfig(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **options
    )


TOPOLOGIES = {
    "tp1": _ranks(),
    "tp2": _ranks(tp=2),
    "tp2+sp": _ranks(tp=2, sequence_parallel=True),
    "tp4": _ranks(tp=4),
    "tp4+sp": _ranks(tp=4, sequence_parallel=True),
    "pp2": _ranks(pp=2),
    "dp2": _ranks(dp=2),
    "tp2 pp2": _ranks(tp=2, pp=2),
    "tp2+sp pp2": _ranks(tp=2, pp=2, sequence_parallel=True),
    "tp2 dp2": _ranks(tp=2, dp=2),
    "pp2 dp2": _ranks(pp=2, dp=2),
}


def run_on(topology: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(parallel_config, *args)` on the ranks of a topology; results by rank."""
    world_size, config = TOPOLOGIES[topology]
    return run_distributed(function, world_size, config, *args)


def write_tokens(prefix: Path, count: int, *, seed: int = 0) -> Path:
    """Write random tokens with megatron-core's builder; returns the prefix of the pair."""
    tokens = np.random.default_rng(seed).integers(VOCAB, size=count)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens, [count])
    builder.finalize(f"{prefix}.idx")
    return prefix


class MaskedBatches(TrainBatches):
    """Training batches in which a quarter of the labels do not count."""

    def microbatches(self, step: int) -> Iterator[Batch]:
        for batch in super().microbatches(step):
            yield dataclasses.replace(batch, loss_mask=(batch.labels % 4 != 0).float())


class Crash(Exception):
    """Ends a run at a step, as a killed process would."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run on disk; with a teacher it distills."""

    model: Path
    tokens: Path
    out: Path
    train: TrainConfig
    teacher: Path | None = None
    valid: Path | None = None
    precision: Precision = "fp32"
    resume: bool = False
    crash_after: int | None = None
    """Steps after which the run dies."""

    def batches(self, *, rank: int = 0, size: int = 1) -> MaskedBatches:
        """Batches of a data-parallel rank."""
        return MaskedBatches(
            open_train(DataConfig(path=[str(self.tokens)], seq_length=SEQ_LENGTH)),
            global_batch_size=self.train.global_batch_size,
            micro_batch_size=self.train.micro_batch_size,
            data_parallel_rank=rank,
            data_parallel_size=size,
            seed=5,
        )

    def build(self, path: Path, topology: Topology) -> LlamaModel:
        """This rank's part of a model directory."""
        arch, weights = open_model(path)
        return build_llama(arch, topology, weights, dtype=platform.DTYPES[self.precision])

    def objective(self, topology: Topology) -> Objective:
        """The loss of the run."""
        if self.teacher is None:
            return LanguageModeling()
        return LogitDistillation(Teacher(self.build(self.teacher, topology)), DistillConfig())


def build_trainer(parallel: ParallelConfig, run: Run) -> Trainer:
    """A trainer on this rank."""
    topology = initialize(parallel)
    validation = None
    if run.valid is not None:
        validation = EvalBatches(
            open_windows([str(run.valid)], SEQ_LENGTH),
            micro_batch_size=run.train.micro_batch_size,
            data_parallel_rank=topology.dp_rank,
            data_parallel_size=topology.dp_size,
            include_remainder=False,
        )
    return Trainer(
        run.build(run.model, topology),
        run.objective(topology),
        run.batches(rank=topology.dp_rank, size=topology.dp_size),
        validation,
        run.train,
        run.out,
    )
