"""A distillation step with the teacher first, against one with both models in every stage.

    make bench          or: python -m tests.bench.pipeline [--out docs/results]

NVIDIA's tools run a stage of the teacher and then one of the student on every micro-batch and
send both hidden states on as one tensor [s, b, h_student + h_teacher]; what comes back has the
same shape, its teacher's half zero. `Concatenated` is that scheme in our terms: the same models,
loss, optimizer and megatron-core schedule. Two gloo ranks, one stage and one thread each, take
steps of all variants in turn; docs/teacher_first.md derives what is to be expected.

Held are the hidden states, and their gradients, that a stage got or gave away, and the final states
that wait for the student: the most bytes of them that existed at a time, looked at whenever a stage
sends or receives and when the loss takes a state.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
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
from torch.multiprocessing.reductions import StorageWeakRef

from minitron import platform
from minitron.data.batches import Batch, collate
from minitron.data.sampling import Sample
from minitron.distill.losses import LogitDistillation
from minitron.distill.teacher import Teacher
from minitron.model.arch import Architecture
from minitron.model.initial import InitialWeights
from minitron.model.llama import LlamaModel, build_chunks, build_llama
from minitron.model.schedule import run_schedule
from minitron.ops.linear_kl import TeacherHidden, linear_kl
from minitron.parallel import Topology, initialize
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.sections.parallel import ParallelConfig, split_layers
from minitron.sections.train import TrainConfig
from minitron.train.optimizer import build_optimizer, set_learning_rate, wrap_chunk
from tests.bench.runner import describe_machine, write_results
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

    def forward(
        self, tokens: Tensor, position_ids: Tensor, mask: None, inference_context: None
    ) -> Tensor:
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


class Traffic:
    """What a rank's stages send each other, and what they hold."""

    def __init__(self) -> None:
        self.sent = self.most_held = 0
        self._held: list[tuple[StorageWeakRef, int]] = []

    def hold(self, *tensors: Tensor | None) -> None:
        """Count tensors as long as they exist."""
        for tensor in tensors:
            if tensor is not None:
                storage = tensor.untyped_storage()
                self._held.append((StorageWeakRef(storage), storage.nbytes()))
        self._held = [(ref, size) for ref, size in self._held if not ref.expired()]
        sizes = {ref.cdata: size for ref, size in self._held}
        self.most_held = max(self.most_held, sum(sizes.values()))

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Count what goes on meanwhile."""
        communicate, take = P2PCommunicator._communicate, Teacher.take

        def counted_communicate(
            communicator: Any, *, tensor_send_next: Any, tensor_send_prev: Any, **options: Any
        ) -> Any:
            for tensor in (tensor_send_next, tensor_send_prev):
                self.sent += 0 if tensor is None else tensor.nbytes
            received = communicate(
                communicator,
                tensor_send_next=tensor_send_next,
                tensor_send_prev=tensor_send_prev,
                **options,
            )
            self.hold(tensor_send_next, tensor_send_prev, *received[:2])
            return received

        def counted_take(teacher: Teacher, index: int) -> Tensor:
            self.hold(*map(platform.fetched, teacher._states.values()))
            return take(teacher, index)

        with (
            mock.patch.object(P2PCommunicator, "_communicate", counted_communicate),
            mock.patch.object(Teacher, "take", counted_take),
        ):
            yield


def compare(rounds: int, num_microbatches: int, seq_length: int) -> dict[str, dict[str, Any]]:
    """What every variant does on this rank: gradient norm, bytes sent and held, seconds."""
    stages = dist.get_world_size()
    interleaved = initialize(
        ParallelConfig(pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=2)
    )
    plain = dataclasses.replace(interleaved, config=interleaved.config.without_interleaving())
    teacher = build_teacher(plain)
    layers = split_layers(TEACHER.num_layers, stages, None)
    layers = [layers[0] + 1, *layers[1:-1], layers[-1] - 1]  # the last stage has both heads
    uneven = dataclasses.replace(
        plain, config=dataclasses.replace(plain.config, layers_per_stage=layers)
    )
    variants = {
        "concatenating": concatenating(plain, teacher),
        "teacher first": teacher_first(plain, teacher, None),
        "teacher first, in 2 windows": teacher_first(plain, teacher, num_microbatches // 2),
        "teacher first, 2 chunks a stage": teacher_first(interleaved, teacher, None),
        "teacher first, uneven stages": teacher_first(plain, build_teacher(uneven), None),
    }
    tokens = torch.randint(
        STUDENT.vocab_size,
        (num_microbatches, seq_length + 1),
        generator=torch.Generator().manual_seed(0),
    )
    whole = np.ones(seq_length, bool)
    samples = [Sample(row.numpy(), whole, (0, number)) for number, row in enumerate(tokens)]
    microbatches = [collate([sample], size=1, seq_length=seq_length) for sample in samples]
    found: dict[str, dict[str, Any]] = {}
    for name, step in variants.items():  # also warms up
        traffic = Traffic()
        with traffic.watched():
            norm = step(microbatches)
        found[name] = {"norm": norm, "sent": traffic.sent, "held": traffic.most_held, "seconds": []}
    for _ in range(rounds):
        for name, step in variants.items():
            dist.barrier()
            start = time.perf_counter()
            step(microbatches)
            dist.barrier()
            found[name]["seconds"].append(time.perf_counter() - start)
    return found


def build_teacher(topology: Topology) -> LlamaModel:
    """The same teacher on any stages."""
    weights = InitialWeights(TEACHER, seed=1, init_method_std=0.02)
    return build_llama(TEACHER, topology, weights, dtype=torch.float32)


def summarize(ranks: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for every variant, from what each rank found.

    Raises:
        AssertionError: the variants do not do the same.
    """
    base = ranks[0]["concatenating"]
    rows = []
    for name, found in ranks[0].items():
        if abs(found["norm"] - base["norm"]) > 1e-5 * base["norm"]:
            raise AssertionError(
                f"{name} has gradient norm {found['norm']}, concatenating {base['norm']}"
            )
        pairs = zip(found["seconds"], base["seconds"], strict=True)
        rows.append(
            {
                "variant": name,
                "steps_per_second": 1 / statistics.median(found["seconds"]),
                "over_concatenating": statistics.median(theirs / ours for ours, theirs in pairs),
                "mb_sent": sum(rank[name]["sent"] for rank in ranks) / 1e6,
                "mb_held_by_stage": [rank[name]["held"] / 1e6 for rank in ranks],
            }
        )
    return rows


_PAGE = """# Teacher first against concatenated stages

Written by `python -m tests.bench.pipeline --out docs/results` (part of `make bench`); the same
numbers as JSON are in pipeline_cpu.json. {stages} gloo ranks with one stage and one thread each on
one machine, steps of {microbatches} micro-batches of {seq_length} tokens in fp32; teacher 8 layers
of 512 channels, student 8 of 384, vocabulary 4096. Variants take steps in turn; a rate is that of
the median step, the ratio the median over rounds. All have the same gradient norm to 1e-5. Whence
the columns are derived is in [teacher_first.md](../teacher_first.md).

"Held" are the hidden states and gradients that a stage got or gave away, and the teacher's final
states that wait for the student: the most that existed at a time, by stage. On uneven stages the
first has one of the teacher's layers more, the last one less; the student's are even.

{described}

| | steps/s | × concatenating | MB sent, a step | MB held, by stage |
| :-- | --: | --: | --: | --: |
{rows}

On one machine bytes are nearly free, and of a step of this shape the bubble that teacher first
saves, (p − 1) F, is about 2%.
"""


def _line(row: dict[str, Any]) -> str:
    held = ", ".join(f"{x:.2f}" for x in row["mb_held_by_stage"])
    rates = f"{row['steps_per_second']:.3f} | {row['over_concatenating']:.2f}"
    return f"| {row['variant']} | {rates} | {row['mb_sent']:.2f} | {held} |"


def main() -> None:
    """Compare on two ranks, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a directory for the page and the JSON")
    options = parser.parse_args()
    sizes = options.rounds, options.microbatches, options.seq_length
    machine = describe_machine("cpu", 1, options.rounds)
    try:
        ranks = run_distributed(compare, options.stages, *sizes, timeout_s=600)
    finally:
        close_pool()
    rows = summarize(ranks)
    page = _PAGE.format(
        stages=options.stages,
        microbatches=options.microbatches,
        seq_length=options.seq_length,
        described=", ".join(f"{key} {value}" for key, value in machine.items()),
        rows="\n".join(map(_line, rows)),
    )
    write_results("pipeline_cpu", page, {"machine": machine, "results": rows}, options.out)


if __name__ == "__main__":
    main()
