"""Logit distillation as a training objective."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from minitron.data.batches import Batch
from minitron.distill.teacher import Teacher
from minitron.model.llama import LlamaModel
from minitron.ops.divergences import Divergence
from minitron.ops.linear_kl import LinearLosses, TeacherHidden, linear_kl
from minitron.ops.logit_moments import LogitDistance
from minitron.ops.objectives import KL, KnownTokens, Objective
from minitron.ops.top_tokens import TopKL
from minitron.sections.distill import DistillConfig

AGREEMENT_STRIDE = 8
"""Of a training step's positions, every eighth shows which token both models find most probable: to
find it at all of them is another sweep over both logits."""


def objective_of(config: DistillConfig) -> Objective:
    """The loss as `minitron.ops` has it."""
    match config.loss:
        case "forward_kl" | "reverse_kl":
            return KL(reverse=config.loss == "reverse_kl")
        case "jsd":
            return Divergence("jsd", config.jsd_beta)
        case "skew_kl" | "skew_reverse_kl":
            return Divergence(config.loss, config.skew_alpha)
        case "tvd":
            return Divergence("tvd")
        case "mse" | "cosine":
            return LogitDistance(config.loss)
        case "top_k":
            return TopKL(config.top_k)
        case "top_p":
            return TopKL(config.top_k, config.top_p)


def shared_columns(student: LlamaModel, teacher: LlamaModel) -> int:
    """Columns of this rank's logits that stand for a token in both models."""
    return min(student.valid_columns, teacher.valid_columns)


class Source(Protocol):
    """Where what the teacher says comes from: the model, or a store."""

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """Micro-batches of a step to `run` at a time; None for all."""
        ...

    def run(self, microbatches: Sequence[Batch]) -> None:
        """Have ready what the teacher says of a window's micro-batches."""
        ...


class Distillation(abc.ABC):
    """A loss between the logits of teacher and student, with a language-model term or without.

    Source: arXiv:2407.14679 §4: forward KL alone, τ = 1, is the best for width-pruned students.

    Args:
        source: of the teacher's side.
        config: the loss.
        knows_top1: whether the source knows the teacher's most probable tokens.
    """

    def __init__(self, source: Source, config: DistillConfig, *, knows_top1: bool = True) -> None:
        self._source = source
        self._config = config
        self._knows_top1 = knows_top1
        self.training_losses: tuple[str, ...] = ("loss", "kl", "ce")
        self.validation_losses: tuple[str, ...] = ("val_loss", "val_kl")
        if knows_top1:
            self.training_losses += ("top1_agreement", "compared")
            self.validation_losses += ("val_top1_agreement",)

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """Micro-batches of a step to `prepare` at a time; None for all."""
        return self._source.window(microbatches)

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Have ready what the teacher says of a window's micro-batches."""
        self._source.run(microbatches)

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The `loss`, and for reading the forward `kl`, the cross-entropy `ce`, and if known
        whether the student agrees with the teacher on the most probable token, and where that was
        `compared`, [s, b].
        """
        stride = AGREEMENT_STRIDE if self._knows_top1 else 0
        found = self._losses(model, hidden, batch, index, stride)
        assert found.cross_entropy is not None
        losses = {"loss": found.loss, "kl": found.forward_kl, "ce": found.cross_entropy}
        if found.top1_agreement is None:
            return losses
        compared = torch.zeros_like(found.forward_kl)
        compared[::AGREEMENT_STRIDE] = 1
        return {**losses, "top1_agreement": found.top1_agreement, "compared": compared}

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """The student's own cross-entropy `val_loss`, its divergence `val_kl`, and if known whether
        it agrees with the teacher on the most probable token, each [s, b].
        """
        found = self._losses(model, hidden, batch, index, 1 if self._knows_top1 else 0)
        assert found.cross_entropy is not None
        losses = {"val_loss": found.cross_entropy, "val_kl": found.forward_kl}
        if found.top1_agreement is None:
            return losses
        return {**losses, "val_top1_agreement": found.top1_agreement}

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """The means, that of the agreement over the tokens compared, if there were any."""
        if not self._knows_top1:
            return losses
        losses = dict(losses)
        agreement, compared = losses.pop("top1_agreement"), losses.pop("compared")
        return {**losses, "top1_agreement": agreement / compared} if compared else losses

    @abc.abstractmethod
    def _losses(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int, agreement: int
    ) -> LinearLosses:
        """`_compare` the student with what the teacher says of micro-batch `index`."""

    def _compare(
        self,
        model: LlamaModel,
        hidden: Tensor,
        batch: Batch,
        teacher: TeacherHidden | KnownTokens,
        objective: Objective,
        valid_columns: int,
        agreement: int,
    ) -> LinearLosses:
        config = self._config
        return linear_kl(
            hidden,
            model.head,
            teacher,
            objective=objective,
            token_weights=batch.loss_mask.t(),
            valid_columns=valid_columns,
            labels=batch.labels.t(),
            lm_weight=config.lm_weight,
            temperature=config.temperature,
            temperature_power=config.temperature_power,
            agreement=agreement,
            sequence_parallel=model.config.sequence_parallel,
            tp_group=model.topology.groups.tp,
        )


class LogitDistillation(Distillation):
    """Distillation from a teacher at hand.

    Args:
        teacher: frozen, on the same ranks as the student.
        config: the loss.
    """

    def __init__(self, teacher: Teacher, config: DistillConfig) -> None:
        super().__init__(teacher, config)
        self._teacher = teacher

    def _losses(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int, agreement: int
    ) -> LinearLosses:
        teacher = self._teacher.model
        states = TeacherHidden(self._teacher.take(index), teacher.head)
        columns = shared_columns(model, teacher)
        return self._compare(
            model, hidden, batch, states, objective_of(self._config), columns, agreement
        )
