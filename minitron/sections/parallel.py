"""How ranks share the work, and the precision they work in."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from minitron.errors import MinitronError

Precision = Literal["fp32", "bf16"]


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
