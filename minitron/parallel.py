"""Ranks and their groups: tensor, sequence, pipeline and data parallelism.

The only reader of megatron-core's `parallel_state`. Everything else is handed a `Topology`, asks it
for groups, ranks and sizes, and works the same for one process without torchrun.
"""

from __future__ import annotations

import contextlib
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

from minitron.metrics import launch_rank, log
from minitron.sections.parallel import ParallelConfig

T = TypeVar("T")


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
            log(f"rank {launch_rank()} of {os.environ['WORLD_SIZE']} is waiting for the others")
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
