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

import torch
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill.states import TeacherStates
from minitron.errors import MinitronError
from minitron.model.llama import LlamaModel, freeze
from minitron.model.schedule import run_schedule
from minitron.parallel import Topology
from minitron.sections.distill import TeacherConfig
from minitron.sections.parallel import split_layers

STATES_BYTES = 1 << 30
"""What the states of a window may take on a rank if the recipe does not say how long it is."""


def teacher_topology(config: TeacherConfig, student: Topology, num_layers: int) -> Topology:
    """The student's topology with the teacher's layers on its stages, one chunk on each.

    Raises:
        MinitronError: the stages do not add up to the teacher, or the window is too short for
            a student whose chunks are interleaved.
    """
    if student.config.is_interleaved and config.window and config.window < student.pp_size:
        raise MinitronError(
            f"teacher.window={config.window} is less than the micro-batches that the student's "
            f"interleaved stages take at a time (parallel.pipeline_model_parallel_size="
            f"{student.pp_size}); use at least {student.pp_size}"
        )
    stages = split_layers(
        num_layers, student.pp_size, config.layers_per_stage, key="teacher.layers_per_stage"
    )
    parallel = dataclasses.replace(student.config.without_interleaving(), layers_per_stage=stages)
    return dataclasses.replace(student, config=parallel)


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
