"""Ranks and their groups: tensor, sequence, pipeline and data parallelism.

The only reader of megatron-core's `parallel_state`. Everything else is handed a `Topology`, asks it
for groups, ranks and sizes, and works the same for one process without torchrun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from minitron import artifact, platform  # before megatron.core

# isort: split
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron.errors import MinitronError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks share the work; data parallelism takes what the other two leave."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share the layers, one stage each."""
    virtual_pipeline_model_parallel_size: int = 1
    """Chunks of layers on each stage of a training run: the micro-batches visit every rank so many
    times, and the pipeline idles so many times less. 1 is the plain schedule."""
    sequence_parallel: bool = False
    """Share norms and the residual stream along the sequence within a tensor-parallel group."""
    layers_per_stage: list[int] | None = None
    """Layers of each pipeline stage; null spreads them evenly, the first stages taking the rest. If
    stages have several chunks, the layers of each chunk in the model's order: all stages' first
    chunks, then all second ones."""
    timeout_minutes: int = 30
    """A collective that waits longer than this ends the run."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "timeout_minutes",
        ):
            if getattr(self, name) < 1:
                raise MinitronError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        if self.is_interleaved and self.pipeline_model_parallel_size == 1:
            raise MinitronError(
                "parallel.virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size} interleaves the chunks of several "
                "stages, but parallel.pipeline_model_parallel_size=1; give it 2 or more stages, or "
                "1 chunk"
            )
        if self.layers_per_stage is not None:
            _check_stages(
                self.layers_per_stage,
                self.pipeline_model_parallel_size,
                self.virtual_pipeline_model_parallel_size,
                _LAYERS_PER_STAGE,
            )

    @property
    def is_interleaved(self) -> bool:
        """True where a stage has several chunks of layers."""
        return self.virtual_pipeline_model_parallel_size > 1

    def without_interleaving(self) -> ParallelConfig:
        """The same ranks with one chunk of layers on each stage."""
        if not self.is_interleaved:
            return self
        stages = self.layers_per_stage and [
            sum(self.layers_per_stage[stage :: self.pipeline_model_parallel_size])
            for stage in range(self.pipeline_model_parallel_size)
        ]
        return dataclasses.replace(
            self, virtual_pipeline_model_parallel_size=1, layers_per_stage=stages
        )

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks left for data parallelism.

        Raises:
            MinitronError: the world does not divide.
        """
        model = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        if world_size % model:
            raise MinitronError(
                f"the number of ranks, {world_size}, does not divide into groups of "
                f"parallel.tensor_model_parallel_size={self.tensor_model_parallel_size} x "
                f"parallel.pipeline_model_parallel_size={self.pipeline_model_parallel_size} = "
                f"{model}; start a multiple of {model} ranks (torchrun --nproc-per-node)"
            )
        return world_size // model

    def check_seq_length(self, seq_length: int) -> None:
        """Refuse samples that sequence parallelism cannot split.

        Raises:
            MinitronError: the length does not divide.
        """
        if self.sequence_parallel and seq_length % self.tensor_model_parallel_size:
            raise MinitronError(
                f"data.seq_length={seq_length} is not divisible by "
                f"parallel.tensor_model_parallel_size={self.tensor_model_parallel_size}, which "
                "parallel.sequence_parallel splits it by; use a multiple"
            )

    def check_num_microbatches(self, count: int) -> None:
        """Refuse a step that the interleaved schedule cannot divide.

        Raises:
            MinitronError: the micro-batches of a rank do not come in groups of one per stage.
        """
        stages = self.pipeline_model_parallel_size
        if self.is_interleaved and count % stages:
            raise MinitronError(
                f"a step has {count} micro-batches on each rank (train.global_batch_size / "
                "(train.micro_batch_size x data-parallel ranks)), and "
                "parallel.virtual_pipeline_model_parallel_size="
                f"{self.virtual_pipeline_model_parallel_size} takes them in groups of "
                f"parallel.pipeline_model_parallel_size={stages}; use a multiple of {stages}"
            )

    def split_layers(self, num_layers: int) -> list[int]:
        """Layers of each chunk of each pipeline stage; see the function of this name."""
        return split_layers(
            num_layers,
            self.pipeline_model_parallel_size,
            self.layers_per_stage,
            chunks=self.virtual_pipeline_model_parallel_size,
        )


_LAYERS_PER_STAGE = "parallel.layers_per_stage"


def split_layers(
    num_layers: int,
    stages: int,
    given: list[int] | None,
    *,
    chunks: int = 1,
    key: str = _LAYERS_PER_STAGE,
) -> list[int]:
    """Layers of each chunk of each pipeline stage, in the model's order.

    Args:
        num_layers: of the whole model.
        stages: how many.
        given: what the recipe says; None spreads the layers evenly.
        chunks: of each stage.
        key: where the recipe says it.

    Raises:
        MinitronError: the stages do not add up to the model, or one would be empty.
    """
    if given is not None:
        _check_stages(given, stages, chunks, key)
        if sum(given) == num_layers and min(given) > 0:
            return list(given)
        raise MinitronError(
            f"{key}={given} adds up to {sum(given)} layers, the model has {num_layers}, and no "
            "stage may be empty"
        )
    places = stages * chunks
    if num_layers < places:
        raise MinitronError(
            f"{num_layers} layers do not fill {_size(stages, chunks)} stages; use at most "
            f"{num_layers}"
        )
    share, rest = divmod(num_layers, places)
    return [share + (place < rest) for place in range(places)]


def _check_stages(given: list[int], stages: int, chunks: int, key: str) -> None:
    if len(given) != stages * chunks:
        raise MinitronError(f"{key}={given} names {len(given)} stages, but {_size(stages, chunks)}")


def _size(stages: int, chunks: int) -> str:
    if chunks == 1:
        return f"parallel.pipeline_model_parallel_size={stages}"
    return (
        "parallel.pipeline_model_parallel_size x parallel.virtual_pipeline_model_parallel_size = "
        f"{stages} x {chunks} = {stages * chunks}"
    )


@dataclass(frozen=True)
class Topology:
    """This rank's place: its groups and its rank and size in each."""

    config: ParallelConfig
    groups: ProcessGroupCollection = field(repr=False)
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int

    @property
    def is_first_stage(self) -> bool:
        """True where the embedding lives."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True where the final norm, the output head and the loss live."""
        return self.pp_rank == self.pp_size - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.groups.pp, self.pp_size - 1)


def initialize(config: ParallelConfig, *, seed: int = 1234) -> Topology:
    """Join the process group, build the model-parallel groups, seed the generators.

    Works under torchrun and, as a world of one, without it.

    Raises:
        MinitronError: the number of ranks does not divide by the model-parallel sizes.
    """
    config.data_parallel_size(int(os.environ.get("WORLD_SIZE", 1)))
    if not dist.is_initialized():
        timeout = datetime.timedelta(minutes=config.timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(platform.backend(), timeout=timeout)
        else:
            dist.init_process_group(
                platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout
            )
    platform.select_device()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=(
            config.virtual_pipeline_model_parallel_size if config.is_interleaved else None
        ),
        distributed_timeout_minutes=config.timeout_minutes,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Topology(
        config=config,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
    )


def is_rank_zero() -> bool:
    """True on the one rank that talks to the user and owns files; without torchrun, always."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", 0)) == 0


def world() -> tuple[int, int]:
    """This process's rank among all, and how many there are; without a process group, 0 of 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def any_rank(flag: bool) -> bool:
    """Whether a flag is set on any rank; call on all."""
    if not dist.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=platform.device())
    dist.all_reduce(votes)
    return votes.item() > 0


def on_rank_zero(function: Callable[[], T]) -> T:
    """Run `function` on rank 0 while the others wait, and return its result everywhere.

    An error on rank 0 is raised on every rank, so that nobody waits for a rank that has left.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[1], Exception):
        raise outcome[1]
    return outcome[0]  # type: ignore[return-value]


@contextlib.contextmanager
def publish(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`artifact.publish` for a directory that all ranks write into."""
    directory = on_rank_zero(lambda: artifact.prepare(out, overwrite=overwrite))
    try:
        yield directory
    except BaseException:
        if is_rank_zero():
            shutil.rmtree(directory, ignore_errors=True)
        raise
    barrier()  # until all have written
    on_rank_zero(lambda: artifact.replace_directory(directory, out))
