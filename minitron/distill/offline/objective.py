"""Distillation from a store, as a training objective."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minitron.data.batches import Batch
from minitron.distill.losses import DistillConfig
from minitron.distill.offline.teacher import StoredTeacher
from minitron.model.llama import LlamaModel
from minitron.ops.sparse_kl import sparse_kl
from minitron.train.objective import language_modeling_loss


class StoredDistillation:
    """Forward KL(teacher || student) to what a store holds of the teacher.

    To the top k it is the divergence of k + 1 bins, never more than the whole one. To draws its
    mean and that of its gradient over the draws are those of the whole divergence; a single token's
    may be negative.

    Args:
        teacher: reads the store.
        config: the temperature, that of the store.
    """

    training_losses = ("loss", "kl")
    validation_losses = ("val_loss", "val_kl")

    def __init__(self, teacher: StoredTeacher, config: DistillConfig) -> None:
        self._teacher = teacher
        self._config = config

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """A step is one window: targets are read as they are needed."""
        return None

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Begin to read the targets of the micro-batches."""
        self._teacher.run(microbatches)

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """`kl` [s, b], which is also the `loss`."""
        kl = self._kl(model, model.logits(hidden), batch, index)
        return {"loss": kl, "kl": kl}

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The student's own cross-entropy `val_loss` and its divergence `val_kl`, both [s, b]."""
        logits = model.logits(hidden)
        cross_entropy = language_modeling_loss(model, logits, batch)
        return {"val_loss": cross_entropy, "val_kl": self._kl(model, logits, batch, index)}

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """The means as they are."""
        return losses

    def _kl(self, model: LlamaModel, logits: Tensor, batch: Batch, index: int) -> Tensor:
        targets = self._teacher.take(index)
        kl = sparse_kl(
            logits,
            targets.ids,
            targets.log_probs,
            tail=self._teacher.store.has_tail,
            valid_columns=model.valid_columns,
            temperature=self._config.temperature,
            loss_mask=batch.loss_mask.t(),
            tp_group=model.topology.groups.tp,
        )
        return kl + targets.entropy_excess
