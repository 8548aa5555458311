"""Small data and small training runs that tests start on the ranks of the pool."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from minitron import platform
from minitron.data.batches import Batch, EvalBatches, TrainBatches, open_train, open_windows
from minitron.distill.intermediate import IntermediateDistillation
from minitron.distill.losses import LogitDistillation
from minitron.distill.teacher import Teacher, teacher_topology
from minitron.errors import Stopped
from minitron.metrics import read_metrics
from minitron.model.llama import LlamaModel, build_chunks, build_llama
from minitron.model.sharding import open_model, save_model
from minitron.parallel import Topology, initialize, on_rank_zero
from minitron.sections.data import DataConfig
from minitron.sections.distill import DistillConfig, IntermediateConfig, TeacherConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.train import TrainConfig
from minitron.train.checkpoint import ModelFiles
from minitron.train.loop import Trainer
from minitron.train.objective import LanguageModeling, Objective
from tests.harness import run_distributed

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

SEQ_LENGTH = 16
MEASURED = ("tokens_per_second", "peak_memory_gb")  # of a step: differ from run to run
VOCAB = 301  # odd, and more than one rank's padded share
SEED = 5


def _ranks(
    tp: int = 1, pp: int = 1, dp: int = 1, vpp: int = 1, **options: Any
) -> tuple[int, ParallelConfig]:
    return tp * pp * dp, ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        **options,
    )


TOPOLOGIES = {
    "tp1": _ranks(),
    "tp2": _ranks(tp=2),
    "tp2+sp": _ranks(tp=2, sequence_parallel=True),
    "tp4": _ranks(tp=4),
    "tp4+sp": _ranks(tp=4, sequence_parallel=True),
    "pp2": _ranks(pp=2),
    "pp2 uneven": _ranks(pp=2, layers_per_stage=[1, 3]),
    "pp4": _ranks(pp=4),
    "dp2": _ranks(dp=2),
    "pp2 vpp2": _ranks(pp=2, vpp=2),
    "pp2 vpp2 uneven": _ranks(pp=2, vpp=2, layers_per_stage=[1, 3, 2, 2]),
    "pp4 vpp2": _ranks(pp=4, vpp=2),
    "tp2+sp pp2 vpp2": _ranks(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2 vpp2 dp2": _ranks(pp=2, vpp=2, dp=2),
    "tp2 pp2": _ranks(tp=2, pp=2),
    "tp2+sp pp2": _ranks(tp=2, pp=2, sequence_parallel=True),
    "tp2 dp2": _ranks(tp=2, dp=2),
    "pp2 dp2": _ranks(pp=2, dp=2),
}


def run_on(topology: str, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `function(parallel_config, *args)` on the ranks of a topology; results by rank."""
    world_size, config = TOPOLOGIES[topology]
    return run_distributed(function, world_size, config, *args)


def write_tokens(
    prefix: Path, count: int, *, seed: int = 0, repeat: int = 1, prompt: int = 0
) -> Path:
    """Write random tokens, each several times, with megatron-core's builder; returns the prefix.

    They are one document, of which the first `prompt` tokens are a prompt.
    """
    tokens = np.random.default_rng(seed).integers(VOCAB, size=count).repeat(repeat)[:count]
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens, [prompt, count - prompt] if prompt else [count])
    if prompt:
        Path(f"{prefix}.json").write_text('{"prompts": 1}')
    builder.finalize(f"{prefix}.idx")
    return prefix


class Crash(Exception):
    """Ends a run between two steps, as a killed process would."""


class MaskedBatches(TrainBatches):
    """Training batches in which a quarter of the labels do not count."""

    crash_at: int | None = None
    """Step (from 0) that never begins."""
    prompts_at: int | None = None
    """Step none of whose labels counts."""
    stop_at: tuple[int, int, int] | None = None
    """Step, rank and the signal that comes to it as it reads its first micro-batch."""

    def microbatches(self, first: int) -> Iterator[Batch]:
        step = first // self.global_batch_size
        if step == self.crash_at:
            raise Crash
        for batch in super().microbatches(first):
            if self.stop_at is not None and self.stop_at[:2] == (step, dist.get_rank()):
                os.kill(os.getpid(), self.stop_at[2])
            counted = batch.labels % 4 != 0 if step != self.prompts_at else batch.labels < 0
            yield dataclasses.replace(batch, loss_mask=counted.float())


class StoppingBatches(EvalBatches):
    """Validation batches at whose second half a signal comes."""

    stop_at: tuple[int, int, int] | None = None
    """Validation (the first is 0), rank and the signal that comes to it."""
    begun = 0

    def __iter__(self) -> Iterator[Batch]:
        number, self.begun = self.begun, self.begun + 1
        here = number, dist.get_rank()
        for index, batch in enumerate(super().__iter__()):
            if self.stop_at and self.stop_at[:2] == here and index == len(self) // 2:
                os.kill(os.getpid(), self.stop_at[2])
            yield batch


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run; with a teacher it distills. `out` gets metrics, checkpoints and `model/`."""

    model: Path
    tokens: Path
    out: Path
    train: TrainConfig
    teacher: TeacherConfig | None = None
    distill: DistillConfig = field(default_factory=DistillConfig)
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    valid: Path | None = None
    precision: Precision = "fp32"
    seq_length: int = SEQ_LENGTH
    resume: bool = False
    crash_at: int | None = None
    prompts_at: int | None = None
    stop_at: tuple[int, int, int] | None = None
    stop_valid_at: tuple[int, int, int] | None = None
    until_step: int | None = None


def open_batches(run: Run, *, rank: int = 0, size: int = 1) -> MaskedBatches:
    """Training batches of a data-parallel rank."""
    batches = MaskedBatches(
        open_train(DataConfig(path=[str(run.tokens)], seq_length=run.seq_length)),
        global_batch_size=run.train.global_batch_size,
        micro_batch_size=run.train.micro_batch_size,
        data_parallel_rank=rank,
        data_parallel_size=size,
        seed=SEED,
    )
    batches.crash_at, batches.prompts_at = run.crash_at, run.prompts_at
    batches.stop_at = run.stop_at
    return batches


def build_model(
    path: Path, topology: Topology, precision: Precision = "fp32", **options: Any
) -> LlamaModel:
    """This rank's part of a model directory."""
    arch, weights = open_model(path)
    return build_llama(arch, topology, weights, dtype=platform.DTYPES[precision], **options)


def build_chunks_of(
    path: Path, topology: Topology, precision: Precision = "fp32", **options: Any
) -> list[LlamaModel]:
    """This rank's chunks of a model directory."""
    arch, weights = open_model(path)
    return build_chunks(arch, topology, weights, dtype=platform.DTYPES[precision], **options)


def build_objective(run: Run, student: Sequence[LlamaModel]) -> Objective:
    """The loss of a run."""
    if run.teacher is None:
        return LanguageModeling()
    teacher = build_teacher(run.teacher, student[0].topology, run.precision)
    objective = LogitDistillation(teacher, run.distill)
    if not run.intermediate.states:
        return objective
    return IntermediateDistillation(
        objective,
        student,
        teacher,
        run.intermediate,
        lm_weight=run.distill.lm_weight,
        seed=SEED,
    )


def build_teacher(
    config: TeacherConfig, topology: Topology, precision: Precision = "fp32"
) -> Teacher:
    """This rank's part of a teacher, with its own layers on every stage."""
    arch, weights = open_model(config.source)
    topology = teacher_topology(config, topology, arch.num_layers)
    model = build_llama(arch, topology, weights, dtype=platform.DTYPES[precision])
    return Teacher(model, config)


def train(parallel: ParallelConfig, run: Run) -> dict[str, Any]:
    """Do a run on this rank; what `Trainer.run` returns."""
    topology = initialize(parallel)
    ranks = {"data_parallel_rank": topology.dp_rank, "data_parallel_size": topology.dp_size}
    validation = None
    if run.valid:
        validation = StoppingBatches(
            open_windows([str(run.valid)], SEQ_LENGTH),
            micro_batch_size=run.train.micro_batch_size,
            include_remainder=False,
            **ranks,
        )
        validation.stop_at = run.stop_valid_at
    on_rank_zero(lambda: (run.out / "model").mkdir(parents=True, exist_ok=True))
    model = build_chunks_of(run.model, topology, run.precision, recompute=run.train.recompute)
    trainer = Trainer(
        model,
        build_objective(run, model),
        open_batches(run, rank=topology.dp_rank, size=topology.dp_size),
        validation,
        run.train,
        run.out,
        ModelFiles(dtype=platform.DTYPES[run.precision], base_dir=run.model, tokenizer=None),
    )
    if run.resume:
        trainer.resume()
    result = {}
    with contextlib.suppress(Crash, Stopped):
        result = trainer.run(run.until_step)
        dtype = platform.DTYPES[run.precision]
        save_model(model, run.out / "model", dtype=dtype, base_dir=run.model)
    trainer.close()
    return result


def step_records(out: Path) -> list[dict[str, Any]]:
    """The record of a run without what differs from run to run."""
    records = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def save_gradients(model: Sequence[LlamaModel], directory: Path) -> None:
    """Write the gradients in place of the weights, under Hugging Face's names; spoils the model."""
    directory.mkdir(parents=True, exist_ok=True)
    for parameter in itertools.chain(*(chunk.parameters() for chunk in model)):
        gradient = getattr(parameter, "main_grad", parameter.grad)
        parameter.data.copy_(gradient)
    save_model(model, directory, dtype=torch.float32)


def load_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors directory, with safetensors' own reader."""
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
