"""A distillation step with the teacher first, against one with both models in every stage.

    make bench          or: python -m tests.bench.pipeline

NVIDIA's tools run a stage of the teacher and then one of the student on every micro-batch and
send both hidden states on as one tensor [s, b, h_student + h_teacher]; what comes back has the
same shape, its teacher's half zero. `Concatenated` is that scheme in our terms: the same models,
loss, optimizer and megatron-core schedule. Two gloo ranks, one stage and one thread each, take
steps of all variants in turn; docs/teacher_first.md derives what is to be expected.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from minitron import metrics
from minitron.data.batches import Batch, collate
from minitron.data.sampling import Sample
from minitron.distill.losses import DistillConfig, LogitDistillation
from minitron.distill.teacher import Teacher, TeacherConfig
from minitron.model.arch import Architecture
from minitron.model.hf import InitialWeights
from minitron.model.llama import LlamaModel, build_chunks, build_llama
from minitron.model.schedule import run_schedule
from minitron.ops.linear_kl import TeacherHidden, linear_kl
from minitron.parallel import ParallelConfig, Topology, initialize
from minitron.train.config import TrainConfig
from minitron.train.optimizer import build_optimizer, set_learning_rate, wrap_chunk
from tests.harness import close_pool, run_distributed

TEACHER = Architecture(
    num_layers=8,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=4096,
    max_position_embeddings=256,
)
STUDENT = dataclasses.replace(TEACHER, hidden_size=384, ffn_hidden_size=1024)
CONFIG = TrainConfig(lr=1e-4)

Step = Callable[[Sequence[Batch]], float]
"""Trains on a step's micro-batches; the gradient norm."""


class Concatenated(torch.nn.Module):
    """A stage of the student and one of the teacher, side by side in one tensor."""

    def __init__(self, student: DistributedDataParallel, teacher: LlamaModel) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.widths = [student.config.hidden_size, teacher.config.hidden_size]
        self.model_type = ModelType.encoder_or_decoder
        self.config = copy.copy(student.config)
        self.config.hidden_size = sum(self.widths)  # what the schedule receives
        self.config.finalize_model_grads_func = self._finalize

    def _finalize(self, _: Any, num_tokens: Tensor, **options: Any) -> None:
        finalize_model_grads([self.student], num_tokens, **options)

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        """Called by the schedule with what came from the stage before."""
        both = tensors[0]
        ours, theirs = (None, None) if both is None else both.split(self.widths, dim=-1)
        self.student.module.set_input_tensor(ours)
        self.teacher.set_input_tensor(theirs if theirs is None else theirs.detach())

    def forward(self, tokens: Tensor, position_ids: Tensor, mask: None) -> Tensor:
        """Both stages, one after the other."""
        ours = self.student(tokens, position_ids, mask)
        with torch.no_grad():
            theirs = self.teacher(tokens, position_ids, mask)
        return torch.cat([ours, theirs], -1)


def build_student(topology: Topology) -> tuple[list[DistributedDataParallel], Any]:
    """A student's chunks for the topology, wrapped, and its optimizer."""
    weights = InitialWeights(STUDENT, seed=0, init_method_std=0.02)
    chunks = build_chunks(STUDENT, topology, weights, dtype=torch.float32)
    wrapped = [wrap_chunk(chunk) for chunk in chunks]
    optimizer = build_optimizer(wrapped, CONFIG)
    set_learning_rate(optimizer, CONFIG.lr)
    return wrapped, optimizer


def teacher_first(topology: Topology, teacher: LlamaModel, window: int | None) -> Step:
    """A step of ours."""
    config = TeacherConfig(path=Path("teacher"), window=window)
    objective = LogitDistillation(Teacher(teacher, config), DistillConfig())
    wrapped, optimizer = build_student(topology)

    def on_output(hidden: Tensor, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        kl = objective.training(wrapped[-1].module, hidden, batch, index)["loss"]
        return kl.sum(), batch.loss_mask.sum().to(torch.int)

    def step(microbatches: Sequence[Batch]) -> float:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(
            wrapped,
            microbatches,
            on_output,
            forward_only=False,
            window=objective.window(microbatches),
            prepare=objective.prepare,
        )
        return float(optimizer.step()[1])

    return step


def concatenating(topology: Topology, teacher: LlamaModel) -> Step:
    """A step of the peers'."""
    (student,), optimizer = build_student(topology)
    both = Concatenated(student, teacher)

    def on_output(hidden: Tensor, batch: Batch, index: int) -> tuple[Tensor, Tensor]:
        ours, theirs = hidden.split(both.widths, dim=-1)
        loss = linear_kl(
            ours.contiguous(),
            student.module.head,
            TeacherHidden(theirs.contiguous(), teacher.head),
            token_weights=batch.loss_mask.t(),
            valid_columns=student.module.valid_columns,
            tp_group=topology.groups.tp,
        ).loss
        return loss.sum(), batch.loss_mask.sum().to(torch.int)

    def step(microbatches: Sequence[Batch]) -> float:
        student.zero_grad_buffer()
        optimizer.zero_grad()
        run_schedule(both, microbatches, on_output, forward_only=False)
        return float(optimizer.step()[1])

    return step


def compare(rounds: int, num_microbatches: int, seq_length: int) -> dict[str, list[float]]:
    """Seconds, bytes sent and first gradient norm of every variant, on this rank."""
    stages = dist.get_world_size()
    interleaved = initialize(
        ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=2)
    )
    plain = dataclasses.replace(interleaved, config=interleaved.config.without_interleaving())
    teacher = build_llama(
        TEACHER, plain, InitialWeights(TEACHER, seed=1, init_method_std=0.02), dtype=torch.float32
    )
    variants = {
        "concatenating": concatenating(plain, teacher),
        "teacher first": teacher_first(plain, teacher, None),
        "in 2 windows": teacher_first(plain, teacher, num_microbatches // 2),
        "2 chunks a stage": teacher_first(interleaved, teacher, None),
    }
    tokens = torch.randint(
        STUDENT.vocab_size,
        (num_microbatches, seq_length + 1),
        generator=torch.Generator().manual_seed(0),
    )
    whole = np.ones(seq_length, bool)
    samples = [Sample(row.numpy(), whole, (0, number)) for number, row in enumerate(tokens)]
    microbatches = [collate([sample], size=1, seq_length=seq_length) for sample in samples]
    sent = 0
    communicate = P2PCommunicator._communicate

    def count(self: Any, *, tensor_send_next: Any, tensor_send_prev: Any, **options: Any) -> Any:
        nonlocal sent
        for tensor in (tensor_send_next, tensor_send_prev):
            sent += 0 if tensor is None else tensor.nbytes
        return communicate(
            self, tensor_send_next=tensor_send_next, tensor_send_prev=tensor_send_prev, **options
        )

    found = {}
    with mock.patch.object(P2PCommunicator, "_communicate", count):
        for name, step in variants.items():  # also warms up
            sent = 0
            norm = step(microbatches)
            found[name] = [norm, float(sent)]
    for _ in range(rounds):
        for name, step in variants.items():
            dist.barrier()
            start = time.perf_counter()
            step(microbatches)
            dist.barrier()
            found[name].append(time.perf_counter() - start)
    return found


def main() -> None:
    """Compare on two ranks and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--stages", type=int, default=2)
    options = parser.parse_args()
    sizes = options.rounds, options.microbatches, options.seq_length
    try:
        ranks = run_distributed(compare, options.stages, *sizes, timeout_s=600)
    finally:
        close_pool()
    base = ranks[0]["concatenating"]
    rows = []
    for name, (norm, _, *seconds) in ranks[0].items():
        if abs(norm - base[0]) > 1e-5 * base[0]:
            raise AssertionError(f"{name} has gradient norm {norm}, concatenating {base[0]}")
        ratios = [theirs / ours for ours, theirs in zip(seconds, base[2:], strict=True)]
        sent = sum(rank[name][1] for rank in ranks)
        rows.append((name, 1 / statistics.median(seconds), statistics.median(ratios), sent / 1e6))
    title = f"{options.stages} stages, {options.microbatches} micro-batches"
    print(metrics.format_table((title, "steps/s", "x concatenating", "MB sent"), rows))


if __name__ == "__main__":
    main()
