"""Logit distillation as a training objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from minitron.data.batches import Batch
from minitron.distill.intermediate import IntermediateConfig
from minitron.distill.teacher import Teacher
from minitron.errors import MinitronError
from minitron.model.llama import LlamaModel
from minitron.ops.linear_kl import LinearKL, linear_kl


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student learns from the teacher."""

    temperature: float = 1.0
    """Divides the logits of both; the loss is not multiplied by any power of it."""
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    """Losses between states inside the models, added to that of the logits."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise MinitronError(f"distill.temperature={self.temperature} must be positive")


def shared_columns(student: LlamaModel, teacher: LlamaModel) -> int:
    """Columns of this rank's logits that stand for a token in both models."""
    return min(student.valid_columns, teacher.valid_columns)


class LogitDistillation:
    """Forward KL(teacher || student) over the whole vocabulary, without a language-model term.

    Source: arXiv:2407.14679 §4: logits alone, τ = 1, is the best loss for width-pruned students.

    Args:
        teacher: frozen, on the same ranks as the student.
        config: the temperature.
    """

    training_losses = ("loss", "kl")
    validation_losses = ("val_loss", "val_kl")

    def __init__(self, teacher: Teacher, config: DistillConfig) -> None:
        self._teacher = teacher
        self._config = config

    def window(self, microbatches: Sequence[Batch]) -> int:
        """Micro-batches whose teacher states exist at a time."""
        return self._teacher.window(microbatches)

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Run the teacher on a window's micro-batches."""
        self._teacher.run(microbatches)

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """`kl` [s, b], which is also the `loss`."""
        kl = self._losses(model, hidden, batch, index, labels=None).forward_kl
        return {"loss": kl, "kl": kl}

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The student's own cross-entropy `val_loss` and its divergence `val_kl`, both [s, b]."""
        losses = self._losses(model, hidden, batch, index, labels=batch.labels.t())
        assert losses.cross_entropy is not None
        return {"val_loss": losses.cross_entropy, "val_kl": losses.forward_kl}

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """The means as they are."""
        return losses

    def _losses(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int, labels: Tensor | None
    ) -> LinearKL:
        return linear_kl(
            hidden,
            model.head,
            self._teacher.take(index),
            self._teacher.model.head,
            token_weights=batch.loss_mask.t(),
            valid_columns=shared_columns(model, self._teacher.model),
            labels=labels,
            temperature=self._config.temperature,
            sequence_parallel=model.config.sequence_parallel,
            tp_group=model.topology.groups.tp,
        )
