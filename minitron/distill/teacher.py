"""The teacher's pass: before the student's, forward only, through its own pipeline.

The teacher leaves its final hidden states on the last stage, where the student's loss will want
them. They are some thirty times smaller than logits, nothing is concatenated with the student's
activations, and the student then runs an unmodified schedule. Teacher and student share the ranks;
they may differ in depth and width, and their layers may be spread differently.

A step of many micro-batches goes in windows: the teacher takes a window's micro-batches, then the
student does, and gradients add up until the last window. That bounds the states to
`window · s · b · h` floats a rank of the last stage. States can wait in host memory, and so can the
teacher's weights between its passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill.states import TeacherStates
from minitron.errors import MinitronError
from minitron.model.llama import LlamaModel, freeze
from minitron.model.schedule import run_schedule
from minitron.parallel import Topology, split_layers

STATES_BYTES = 1 << 30
"""What the states of a window may take on a rank if the recipe does not say how long it is."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model to learn from, and how it shares the ranks with the student; or what is stored of
    it."""

    path: Path | None = None
    """Its Hugging Face directory."""
    logits: Path | None = None
    """Instead of the model: a store of its outputs, the `out` of launch/cache_logits.py."""
    window: int | None = None
    """Micro-batches whose teacher states exist at a time, `window · s · b · h_teacher` floats on
    each rank of the last stage; null takes as many as fit in 1 GiB, with the states of intermediate
    losses on the rank that has most, and at least four for each pipeline stage, or all of a step if
    they are offloaded. The result is the same for all."""
    offload_states: bool = False
    """Keep the states, those of intermediate losses too, in host memory until the student's loss
    asks for them."""
    placement: Literal["resident", "offload"] = "resident"
    """Where the teacher's weights are while the student trains: on the device, or in host memory,
    from which every window fetches them. The output head stays on the last stage's device."""
    layers_per_stage: list[int] | None = None
    """Teacher layers of each pipeline stage; null spreads them evenly."""
    allow_untrained: bool = False
    """Learn even from a teacher that predicts the training data no better than chance."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.logits is None):
            found = "both were given" if self.path is not None else "neither was given"
            raise MinitronError(f"give either --teacher.path or --teacher.logits; {found}")
        of_model = ("window", "offload_states", "placement", "layers_per_stage", "allow_untrained")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in of_model if getattr(self, name) != defaults[name]]
        if self.logits is not None and given:
            raise MinitronError(
                f"teacher.{given[0]} is of a teacher at hand, not of the store {self.logits}; "
                "leave it out, or give --teacher.path"
            )
        if self.window is not None and self.window < 1:
            raise MinitronError(f"teacher.window={self.window} must be at least 1")

    @property
    def source(self) -> Path:
        """What the student learns from: the model or the store."""
        source = self.path or self.logits
        assert source is not None
        return source

    def topology(self, student: Topology, num_layers: int) -> Topology:
        """The student's topology with this teacher's layers on its stages, one chunk on each.

        Raises:
            MinitronError: the stages do not add up to the teacher, or the window is too short for
                a student whose chunks are interleaved.
        """
        if student.config.is_interleaved and self.window and self.window < student.pp_size:
            raise MinitronError(
                f"teacher.window={self.window} is less than the micro-batches that the student's "
                f"interleaved stages take at a time (parallel.pipeline_model_parallel_size="
                f"{student.pp_size}); use at least {student.pp_size}"
            )
        stages = split_layers(
            num_layers, student.pp_size, self.layers_per_stage, key="teacher.layers_per_stage"
        )
        config = dataclasses.replace(student.config.without_interleaving(), layers_per_stage=stages)
        return dataclasses.replace(student, config=config)


class Teacher:
    """A frozen model and the final hidden states of the micro-batches at hand.

    Args:
        model: this rank's part of the teacher; it is frozen.
        config: the `teacher` section of the recipe.
    """

    def __init__(self, model: LlamaModel, config: TeacherConfig) -> None:
        self.model = freeze(model)
        self.config = config
        self._states: dict[int, Tensor | platform.HostCopy] = {}
        self._others: TeacherStates | None = None
        self._weights = None
        if config.placement == "offload":
            head = model.head if model.post_process else None  # the loss needs it
            self._weights = OffloadedWeights(p for p in model.parameters() if p is not head)

    def share_window(self, states: TeacherStates) -> None:
        """Count other states of the micro-batches at hand in the `window`."""
        self._others = states

    def window(self, microbatches: Sequence[Batch]) -> int:
        """Micro-batches of a step to `run` at a time."""
        if self.config.window is not None:
            return self.config.window
        if self.config.offload_states:
            return len(microbatches)
        batch, model = microbatches[0], self.model.config
        num_stages = model.pipeline_model_parallel_size
        sizes = [0] * num_stages if self._others is None else self._others.bytes_by_stage(batch)
        size = batch.tokens.numel() * model.hidden_size * model.params_dtype.itemsize
        if model.sequence_parallel:
            size //= model.tensor_model_parallel_size
        sizes[-1] += size
        # A drained pipeline idles for p - 1 micro-batches: shorter windows would be half idle.
        return max(STATES_BYTES // max(sizes), 4 * num_stages)

    def run(self, microbatches: Sequence[Batch]) -> None:
        """Forward a window's micro-batches; on the last stage their hidden states are kept."""
        self._states.clear()

        def keep(hidden: Tensor, batch: Batch, index: int) -> None:
            offload = self.config.offload_states
            self._states[index] = platform.HostCopy(hidden) if offload else hidden

        with contextlib.nullcontext() if self._weights is None else self._weights.on_device():
            run_schedule(self.model, microbatches, keep, forward_only=True)

    def take(self, index: int) -> Tensor:
        """Final hidden states [s, b, h] or [s/t, b, h] of a micro-batch, which are let go."""
        state = self._states.pop(index)
        following = self._states.get(index + 1)
        if isinstance(following, platform.HostCopy):
            following.begin()  # it comes while the student computes
        return platform.fetched(state)


class OffloadedWeights:
    """Frozen weights that are on the device only while they are used.

    The way out costs nothing: the host has them still, and the device's copies are dropped.

    Args:
        parameters: emptied at once.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._weights = [(p, platform.HostCopy(p.data)) for p in parameters]
        self._drop()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Fill the parameters for what is inside."""
        for _, copy in self._weights:
            copy.begin()
        for parameter, copy in self._weights:
            parameter.data = copy.fetch()
        try:
            yield
        finally:
            self._drop()

    def _drop(self) -> None:
        for parameter, _ in self._weights:
            parameter.data = parameter.data.new_empty(0)
