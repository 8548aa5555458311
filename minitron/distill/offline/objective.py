"""Distillation from a store, as a training objective."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minitron.data.batches import Batch
from minitron.distill.losses import DistillConfig
from minitron.distill.offline.teacher import StoredTeacher
from minitron.errors import MinitronError
from minitron.model.llama import LlamaModel
from minitron.ops.linear_kl import LinearLosses, linear_kl
from minitron.ops.objectives import KnownTokens
from minitron.ops.sparse_kl import SparseKL


class StoredDistillation:
    """Forward KL(teacher || student) to what a store holds of the teacher.

    To the top k it is the divergence of k + 1 bins, never more than the whole one. To draws its
    mean and that of its gradient over the draws are those of the whole divergence; a single token's
    may be negative.

    Args:
        teacher: reads the store.
        config: the loss; its temperature is that of the store.

    Raises:
        MinitronError: the loss needs more of the teacher than a store has.
    """

    validation_losses = ("val_loss", "val_kl")

    def __init__(self, teacher: StoredTeacher, config: DistillConfig) -> None:
        if config.loss != "forward_kl":
            raise MinitronError(
                f"distill.loss={config.loss} needs the teacher's whole distributions, which a "
                "store does not hold; set distill.loss=forward_kl, or teacher.path instead of "
                "teacher.logits"
            )
        self._teacher = teacher
        self._config = config
        self.training_losses = config.training_losses

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """A step is one window: targets are read as they are needed."""
        return None

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Begin to read the targets of the micro-batches."""
        self._teacher.run(microbatches)

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The `loss`, and for reading `kl` and the cross-entropy `ce`, each [s, b]."""
        found = self._losses(model, hidden, batch, index, labels=bool(self._config.lm_weight))
        losses = {"loss": found.loss, "kl": found.forward_kl}
        return losses if found.cross_entropy is None else {**losses, "ce": found.cross_entropy}

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The student's own cross-entropy `val_loss` and its divergence `val_kl`, both [s, b]."""
        found = self._losses(model, hidden, batch, index, labels=True)
        assert found.cross_entropy is not None
        return {"val_loss": found.cross_entropy, "val_kl": found.forward_kl}

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """The means as they are."""
        return losses

    def _losses(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int, *, labels: bool
    ) -> LinearLosses:
        targets, config = self._teacher.take(index), self._config
        found = linear_kl(
            hidden,
            model.head,
            KnownTokens(targets.ids, targets.log_probs),
            objective=SparseKL(tail=self._teacher.store.has_tail),
            token_weights=batch.loss_mask.t(),
            valid_columns=model.valid_columns,
            labels=batch.labels.t() if labels else None,
            lm_weight=config.lm_weight,
            temperature=config.temperature,
            temperature_power=config.temperature_power,
            sequence_parallel=model.config.sequence_parallel,
            tp_group=model.topology.groups.tp,
        )
        factor = config.temperature**config.temperature_power
        return found._replace(
            loss=found.loss + factor * targets.entropy_excess,
            forward_kl=found.forward_kl + targets.entropy_excess,
        )
