"""The teacher's pass: before the student's, forward only, through its own pipeline.

The teacher leaves its final hidden states on the last stage, where the student's loss will want
them. They are some thirty times smaller than logits, nothing is concatenated with the student's
activations, and the student then runs an unmodified schedule. Teacher and student may differ in
depth and width; they share the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minitron.data.batches import Batch
from minitron.model.llama import LlamaModel, freeze
from minitron.model.schedule import run_schedule


class Teacher:
    """A frozen model and the final hidden states of the micro-batches at hand.

    Args:
        model: this rank's part of the teacher; it is frozen.
    """

    def __init__(self, model: LlamaModel) -> None:
        self.model = freeze(model)
        self._hidden: dict[int, Tensor] = {}

    def run(self, microbatches: Sequence[Batch]) -> None:
        """Forward all micro-batches; on the last stage their hidden states are kept."""
        self._hidden.clear()

        def keep(hidden: Tensor, batch: Batch, index: int) -> None:
            self._hidden[index] = hidden

        run_schedule(self.model, microbatches, keep, forward_only=True)

    def take(self, index: int) -> Tensor:
        """Final hidden states [s, b, h] or [s/t, b, h] of a micro-batch, which are let go."""
        return self._hidden.pop(index)
