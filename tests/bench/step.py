"""A distillation step of ours on random tokens and weights, and its parts, to be timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minitron import platform
from minitron.data.batches import TrainBatches, open_train
from minitron.distill.losses import LogitDistillation
from minitron.distill.teacher import Teacher
from minitron.model.arch import Architecture
from minitron.model.initial import InitialWeights
from minitron.model.llama import LlamaModel, build_llama
from minitron.model.schedule import run_schedule
from minitron.parallel import Topology, initialize
from minitron.sections.data import DataConfig
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from minitron.train.objective import LanguageModeling, Objective
from tests.runs import write_tokens

Step = Callable[[], float]
"""Learns from the next batch; returns the gradient norm."""


@dataclass(frozen=True)
class Problem:
    """Two models, their data, and the speedup to reach."""

    teacher: Architecture
    student: Architecture
    precision: Precision
    micro_batch_size: int
    num_microbatches: int
    seq_length: int
    speedup: float | None = None

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.num_microbatches * self.micro_batch_size * self.seq_length


def open_batches(problem: Problem) -> TrainBatches:
    """Random tokens; their ids are small, which changes nothing."""
    with tempfile.TemporaryDirectory() as directory:
        prefix = write_tokens(Path(directory) / "tokens", 64 * problem.seq_length + 1)
        return TrainBatches(
            open_train(DataConfig(path=[str(prefix)], seq_length=problem.seq_length)),
            global_batch_size=problem.micro_batch_size * problem.num_microbatches,
            micro_batch_size=problem.micro_batch_size,
            data_parallel_rank=0,
            data_parallel_size=1,
            seed=0,
        )


def build(arch: Architecture, topology: Topology, problem: Problem, seed: int) -> LlamaModel:
    """A model of random weights: the same for both sides, or on a GPU any, for there it matters
    that they come fast."""
    dtype = platform.DTYPES[problem.precision]
    source = None if platform.has_cuda() else InitialWeights(arch, seed=seed)
    model = build_llama(arch, topology, source, dtype=dtype)
    if source is None:
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.ones_(parameter)
    return model


class Ours:
    """Steps of `Trainer`, and the parts that a distillation cannot do without."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.topology = initialize(ParallelConfig())
        self.batches = open_batches(problem)
        self.teacher = build(problem.teacher, self.topology, problem, seed=1)
        self.config = TrainConfig(
            steps=1_000_000,
            lr=1e-4,
            micro_batch_size=problem.micro_batch_size,
            global_batch_size=problem.micro_batch_size * problem.num_microbatches,
        )
        teacher = Teacher(self.teacher, TeacherConfig(path=Path("teacher")))
        self.trainer = self._trainer(LogitDistillation(teacher, DistillConfig()))

    def _trainer(self, objective: Objective) -> Trainer:
        student = build(self.problem.student, self.topology, self.problem, seed=0)
        out = Path("never written")
        return Trainer([student], objective, self.batches, None, self.config, out)

    def distillation(self) -> float:
        """A whole step."""
        return self.trainer.train_step()["grad_norm"]

    def language_modeling(self) -> Step:
        """Steps of another such student on the next token."""
        trainer = self._trainer(LanguageModeling())
        return lambda: trainer.train_step()["grad_norm"]

    def teacher_forward(self) -> None:
        """The teacher's logits."""

        def logits(hidden: Tensor, *_: object) -> None:
            self.teacher.logits(hidden)

        run_schedule(
            self.teacher,
            list(self.batches.microbatches(0)),
            logits,
            forward_only=True,
        )

    @property
    def gradient_bytes(self) -> int:
        """Of the buffers that stay between steps."""
        return sum(b.grad_data.nbytes for chunk in self.trainer.wrapped for b in chunk.buffers)
