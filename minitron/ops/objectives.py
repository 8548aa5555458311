"""What a student's logits can be made to minimise: the frame that all objectives share.

An objective condenses the logits of some tokens into a few numbers a token, which ranks exchange,
and later writes the gradient by the student's logits from those numbers, without a collective. It
says the first as a generator that yields whenever a collective is under way, so that its caller can
do something else meanwhile: `minitron.ops.linear_kl` takes the next chunk of tokens through the
heads. `logit_loss` is the differentiable op over logits that exist as a whole.
"""

from __future__ import annotations

import abc
import ast
import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.ops.logit_kl import (
    logit_kl_fused,
    logit_kl_gradient,
    logit_kl_merge,
    logit_kl_statistics,
)
from minitron.ops.steps import Steps
from minitron.ops.vocab_parallel import first_column, label_columns, start_gathering


class KnownTokens(NamedTuple):
    """A teacher of whom a few tokens of each distribution are known; see `sparse_kl`."""

    ids: Tensor
    """[s, b, k] or [tokens, k], ids in the whole vocabulary; −1 pads."""
    log_probabilities: Tensor
    """The same shape, at τ."""


Teacher = Tensor | KnownTokens
"""Logits, of the student's shape, or what is known of them."""


@dataclass(frozen=True)
class Logits:
    """The logits of some tokens on this rank, and all that goes with them."""

    student: Tensor
    """[tokens, v/t]."""
    teacher: Teacher
    """[tokens, v/t], or known tokens [tokens, k]."""
    valid_columns: int
    """Leading columns that stand for a token."""
    temperature: float = 1.0
    labels: Tensor | None = None
    """[tokens] ids in the whole vocabulary; asks for the cross-entropy too."""
    forward_kl: bool = True
    """Asks for the forward KL too, which costs some objectives a sweep."""
    mask: Tensor | None = None
    """[tokens] bool; where False, logits are not read and losses are zero."""
    tp_group: dist.ProcessGroup | None = None

    @property
    def offset(self) -> int:
        """Id of the first column."""
        return first_column(self.student, self.tp_group)

    @property
    def teacher_logits(self) -> Tensor:
        """[tokens, v/t]."""
        if isinstance(self.teacher, KnownTokens):
            raise ValueError("of a teacher with known tokens, only SparseKL makes a loss")
        return self.teacher

    @property
    def known_tokens(self) -> KnownTokens:
        """[tokens, k]."""
        if not isinstance(self.teacher, KnownTokens):
            raise ValueError("SparseKL wants known tokens of the teacher, not logits")
        return self.teacher

    def select(self, rows: Tensor | slice) -> Logits:
        """Those of some tokens."""
        of_tokens = (self.labels, self.mask)
        labels, mask = (None if x is None else x[rows] for x in of_tokens)
        if isinstance(self.teacher, KnownTokens):
            teacher: Teacher = KnownTokens(*(x[rows] for x in self.teacher))
        else:
            teacher = self.teacher[rows]
        return replace(self, student=self.student[rows], teacher=teacher, labels=labels, mask=mask)


class Losses(NamedTuple):
    """Per-token losses [tokens] in nats, the same on every rank."""

    objective: Tensor
    forward_kl: Tensor
    """KL(teacher || student) at τ; meaningless unless asked for."""
    cross_entropy: Tensor
    """Of the student with the labels, at τ = 1; meaningless unless asked for."""


Saved = tuple[Tensor, ...]


class Objective(abc.ABC):
    """A loss between a student's and a teacher's next-token distributions.

    A frozen dataclass of words and numbers: an op is given it by its name, which says them all.
    """

    name: str
    _kinds: ClassVar[dict[str, type[Objective]]] = {}

    def __init_subclass__(cls) -> None:
        Objective._kinds[cls.__name__] = cls

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"{type(self).__name__}{tuple(vars(self).values())}")

    @staticmethod
    @functools.cache
    def named(name: str) -> Objective:
        """The objective of this name."""
        kind, parenthesis, values = name.partition("(")
        return Objective._kinds[kind](*ast.literal_eval(parenthesis + values))

    @abc.abstractmethod
    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """Compute the losses, and what the gradient needs of them."""

    @abc.abstractmethod
    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """Write the gradient of a weighted sum of losses by the student's logits.

        Args:
            logits: those of `losses`.
            saved: from `losses`.
            weights: [2, tokens] of the objective and of the cross-entropy.
            destination: [tokens, v/t] takes the gradient; may be the student's logits.
        """


@dataclass(frozen=True)
class KL(Objective):
    """Forward KL(teacher || student), or reverse KL(student || teacher), from one sweep."""

    reverse: bool = False

    def losses(self, logits: Logits) -> Steps[tuple[Losses, Saved]]:
        """See `Objective`."""
        losses, merged = yield from kl_losses(logits, reverse=self.reverse)
        return self._losses(losses), (merged,)

    def gradient(self, logits: Logits, saved: Saved, weights: Tensor, destination: Tensor) -> None:
        """See `Objective`."""
        logit_kl_gradient(
            logits.student,
            logits.teacher_logits,
            logits.labels,
            logits.mask,
            *saved,
            self._weights(weights),
            logits.valid_columns,
            logits.offset,
            logits.temperature,
            self.reverse,
            logits.labels is not None,
            destination,
        )

    def fused(self, logits: Logits, weights: Tensor) -> Losses:
        """`losses`, and `gradient` over the student's logits, in one read of a whole vocabulary."""
        statistics = logit_kl_fused(
            logits.student,
            logits.teacher_logits,
            logits.labels,
            logits.mask,
            self._weights(weights),
            logits.valid_columns,
            logits.temperature,
            self.reverse,
            logits.labels is not None,
            logits.student,
        )
        losses, _ = logit_kl_merge(statistics.unsqueeze(0), logits.mask, logits.temperature)
        return self._losses(losses)

    def _losses(self, losses: Tensor) -> Losses:
        forward_kl, reverse_kl, cross_entropy, _ = losses.unbind(0)
        return Losses(reverse_kl if self.reverse else forward_kl, forward_kl, cross_entropy)

    def _weights(self, weights: Tensor) -> Tensor:
        by_objective, by_cross_entropy = weights
        zero = torch.zeros_like(by_objective)
        kl = (zero, by_objective) if self.reverse else (by_objective, zero)
        return torch.stack([*kl, by_cross_entropy, zero])


def kl_losses(logits: Logits, *, reverse: bool = False, extra: Tensor | None = None) -> Steps[Any]:
    """The sweep of `minitron.ops.logit_kl`, with which most objectives begin.

    Args:
        logits: of both.
        reverse: also the reverse KL.
        extra: [tokens, k] to gather in the same collective.

    Returns:
        Losses [4, tokens] and merged statistics [tokens, 8]; with `extra`, also that of all ranks,
        [t, tokens, k].
    """
    statistics = logit_kl_statistics(
        logits.student,
        logits.teacher_logits,
        logits.labels,
        logits.mask,
        logits.valid_columns,
        logits.offset,
        logits.temperature,
        reverse,
        logits.labels is not None,
    )
    width = statistics.size(1)
    if extra is not None:
        statistics = torch.cat([statistics, extra], 1)
    wait = start_gathering(statistics, logits.tp_group)
    yield
    gathered = wait()
    found = logit_kl_merge(gathered[..., :width].contiguous(), logits.mask, logits.temperature)
    return found if extra is None else (*found, gathered[..., width:])


def add_cross_entropy_gradient(
    grad: Tensor, student: Tensor, labels: Tensor, offset: int, merged: Tensor, weights: Tensor
) -> None:
    """Add the gradient of the cross-entropy to that of another loss, both before rounding.

    Args:
        grad: [tokens, valid columns].
        student: the same logits, of the same dtype.
        labels: [tokens] ids in the whole vocabulary.
        offset: id of the first column.
        merged: [tokens, 8] of `kl_losses`.
        weights: [tokens] of the cross-entropy.
    """
    if not grad.size(1):
        return
    maximum, unit_sum = merged[:, 0, None], merged[:, 6, None]
    grad += (student - maximum).exp_().mul_(weights[:, None] / unit_sum)
    columns, here = label_columns(labels, offset, grad.size(1))
    grad.scatter_add_(1, columns[:, None], -torch.where(here, weights, 0)[:, None])
