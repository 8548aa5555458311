"""Distillation from a store, as a training objective."""

from __future__ import annotations

from torch import Tensor

from minitron.data.batches import Batch
from minitron.distill.losses import Distillation
from minitron.distill.offline.teacher import StoredTeacher
from minitron.errors import MinitronError
from minitron.model.llama import LlamaModel
from minitron.ops.linear_kl import LinearLosses
from minitron.ops.sparse_kl import SparseKL
from minitron.sections.distill import DistillConfig


class StoredDistillation(Distillation):
    """Forward KL(teacher || student) to what a store holds of the teacher.

    To the top k it is the divergence of k + 1 bins, never more than the whole one. To draws its
    mean and that of its gradient over the draws are those of the whole divergence; a single token's
    may be negative, and which token is the most probable is not known: few draws often tie.

    Args:
        teacher: reads the store.
        config: the loss; its temperature is that of the store.

    Raises:
        MinitronError: the loss needs more of the teacher than a store has.
    """

    def __init__(self, teacher: StoredTeacher, config: DistillConfig) -> None:
        if config.loss != "forward_kl":
            raise MinitronError(
                f"distill.loss={config.loss} needs the teacher's whole distributions, which a "
                "store does not hold; set distill.loss=forward_kl, or teacher.path instead of "
                "teacher.logits"
            )
        self.is_estimate = teacher.store.info.draws is not None
        super().__init__(teacher, config, knows_top1=not self.is_estimate)
        self._teacher = teacher

    def _losses(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int, agreement: int
    ) -> LinearLosses:
        known, excess = self._teacher.take(index)
        objective = SparseKL(tail=self._teacher.store.has_tail)
        columns = model.columns_of(self._teacher.vocab_size)
        found = self._compare(model, hidden, batch, known, objective, columns, agreement)
        factor = self._config.temperature**self._config.temperature_power
        return found._replace(
            loss=found.loss + factor * excess, forward_kl=found.forward_kl + excess
        )
