"""What a training run minimises: the one thing in which stages of training differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from minitron.data.batches import Batch
from minitron.model.llama import LlamaModel
from minitron.ops.cross_entropy import cross_entropy


class Objective(Protocol):
    """Turns the model's final hidden states into per-token losses, on the last pipeline stage."""

    training_losses: tuple[str, ...]
    """Names that `training` returns; the first is minimised, all are logged."""
    validation_losses: tuple[str, ...]
    """Names that `validation` returns."""

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """Most micro-batches of a step to `prepare` at a time; None for all."""
        ...

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Called on every rank before a window of micro-batches goes through the model."""
        ...

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """Losses [s, b] of micro-batch `index` of the window, from its final hidden states."""
        ...

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The same for a held-out micro-batch, without gradients."""
        ...

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """Called on every rank after a step with the means of `training`; what to log of them."""
        ...


class LanguageModeling:
    """Next-token cross-entropy: pre-training, teacher correction."""

    training_losses = ("loss",)
    validation_losses = ("val_loss",)

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """A step is one window."""
        return None

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Nothing to prepare."""

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The cross-entropy as `loss`, [s, b]."""
        return {"loss": language_modeling_loss(model, model.logits(hidden), batch)}

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The cross-entropy as `val_loss`, [s, b]."""
        return {"val_loss": language_modeling_loss(model, model.logits(hidden), batch)}

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """The means as they are."""
        return losses


def language_modeling_loss(model: LlamaModel, logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy [s, b] of vocabulary-parallel logits [s, b, v/t] with the batch's labels."""
    return cross_entropy(
        logits,
        batch.labels.t(),
        valid_columns=model.valid_columns,
        tp_group=model.topology.groups.tp,
    )
