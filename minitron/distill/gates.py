"""What a distillation makes sure of before its first step.

A run against a teacher whose weights were not all there, or that reads another vocabulary, looks
like any other: its loss falls, for as many GPU hours as it is given. Each check costs seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from minitron.data.batches import Batch
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.distill.losses import shared_columns
from minitron.distill.offline.objective import StoredDistillation
from minitron.distill.teacher import Teacher
from minitron.errors import MinitronError
from minitron.eval.perplexity import evaluate
from minitron.metrics import log
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel
from minitron.model.sharding import faulty_tensors
from minitron.ops.linear_kl import TeacherHidden, linear_kl

# A teacher that has learnt anything is better than chance by more than this, in nats a token; one
# of zeros or noise is not.
_LEAST_GAIN = 0.05
# Below it, in nats a token, teacher and student are one model.
_SAME = 1e-6

_ALLOW_UNTRAINED = "--teacher.allow_untrained"


def shared_tokenizer(teacher: Path, student: Path) -> Tokenizer | None:
    """The tokenizer of both model directories, of the one that has one, or None.

    Raises:
        MinitronError: the models speak of other tokens.
    """
    of_teacher, of_student = find_tokenizer(teacher), find_tokenizer(student)
    if of_teacher and of_student and of_teacher.fingerprint != of_student.fingerprint:
        raise MinitronError(
            f"the tokenizers differ: {of_teacher.path} ({of_teacher.fingerprint}) and "
            f"{of_student.path} ({of_student.fingerprint}); give a student with the teacher's "
            "tokenizer"
        )
    return of_student or of_teacher


def shared_vocab_size(teacher: int, student: int, tokenizer: int | None) -> int:
    """Tokens that both models know, where one's table may be padded further than the other's.

    Args:
        teacher: rows of its table.
        student: rows of its table.
        tokenizer: tokens of the tokenizer of both, if they have one.

    Raises:
        MinitronError: the larger table holds more than padding, as far as anybody can tell.
    """
    sizes = teacher, student
    if teacher == student or (tokenizer is not None and tokenizer <= min(sizes)):
        return min(sizes)
    known = "neither brings a tokenizer that could tell which rows are padding"
    if tokenizer is not None:
        known = f"the tokenizer has {tokenizer}"
    raise MinitronError(
        f"the teacher's vocabulary has {teacher} tokens, the student's {student}, and {known}; "
        "distillation compares token by token: give a student pruned from this teacher"
    )


def check_weights(model: LlamaModel, path: Path) -> None:
    """Refuse a model that holds NaN, infinity, or matrices of zeros; call on all ranks.

    Args:
        model: this rank's part.
        path: where it comes from.

    Raises:
        MinitronError: with the first tensors that do.
    """
    faults = faulty_tensors(model)
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise MinitronError(
            f"the weights of {path} are damaged: {', '.join(faults[:3])}{more}; "
            "write them anew, or give another model"
        )


def check_start(teacher: Teacher, student: Sequence[LlamaModel], batch: Batch) -> None:
    """Log both models' losses on a first micro-batch, and refuse a teacher no better than chance.

    A student that looks like the teacher is allowed, with a warning.

    Args:
        teacher: with its model.
        student: this rank's chunks.
        batch: this rank's first micro-batch of training data.

    Raises:
        MinitronError: the teacher predicts the data no better than chance.
    """

    def losses(model: LlamaModel, hidden: Tensor, batch: Batch, index: int) -> dict[str, Tensor]:
        target = TeacherHidden(teacher.take(index), teacher.model.head)
        columns = shared_columns(model, teacher.model)
        of_teacher, _ = _losses(model, target, target, batch, columns)
        of_student, kl = _losses(model, TeacherHidden(hidden, model.head), target, batch, columns)
        return {"teacher": of_teacher, "student": of_student, "kl": kl}

    names = ("teacher", "student", "kl")
    means = evaluate(student, [batch], losses, names, prepare=teacher.run)
    if not means["tokens"]:  # nothing but prompts: nothing to judge by
        return
    log(
        "on the first samples, in nats a token: "
        f"teacher's loss {means['teacher']:.4f}, initial student's loss {means['student']:.4f}, "
        f"KL between them {means['kl']:.4f}"
    )
    if not teacher.config.allow_untrained:
        check_trained(means["teacher"], teacher.model.arch, _ALLOW_UNTRAINED)
    sizes = student[0].arch.num_parameters, teacher.model.arch.num_parameters
    signs = []
    if sizes[0] > sizes[1]:
        signs.append(f"more parameters ({sizes[0]:,} > {sizes[1]:,})")
    if means["student"] < means["teacher"]:
        signs.append(f"a lower loss ({means['student']:.4f} < {means['teacher']:.4f})")
    if means["kl"] < _SAME:
        log("warning: the student says what the teacher says; is --student the pruned model?")
    elif signs:
        log(
            f"warning: the student has {' and '.join(signs)} than the teacher; did you swap "
            "--teacher and --student?"
        )


def check_stored_start(
    objective: StoredDistillation, student: Sequence[LlamaModel], batch: Batch
) -> None:
    """Log the student's losses on a first micro-batch; its teacher was judged before it was stored.

    Args:
        objective: from a store.
        student: this rank's chunks.
        batch: this rank's first micro-batch of training data.
    """
    losses, names = objective.validation, objective.validation_losses
    means = evaluate(student, [batch], losses, names, prepare=objective.prepare)
    if means["tokens"]:
        estimate = " (estimated from draws, it may be below zero)" if objective.is_estimate else ""
        log(
            "on the first samples, in nats a token: "
            f"initial student's loss {means['val_loss']:.4f}, KL from the stored teacher "
            f"{means['val_kl']:.4f}{estimate}"
        )


def check_teacher(teacher: LlamaModel, batch: Batch, *, allow_untrained: bool) -> None:
    """Log a teacher's loss on a first micro-batch, and refuse one no better than chance.

    Args:
        teacher: this rank's part.
        batch: of the data that it is to run over.
        allow_untrained: do not refuse it.

    Raises:
        MinitronError: the teacher predicts the data no better than chance.
    """

    def loss(model: LlamaModel, hidden: Tensor, batch: Batch, _: int) -> dict[str, Tensor]:
        target = TeacherHidden(hidden, model.head)
        return {"loss": _losses(model, target, target, batch, model.valid_columns)[0]}

    means = evaluate([teacher], [batch], loss, ("loss",))
    if not means["tokens"]:
        return
    log(f"before the first sample: teacher's loss {means['loss']:.4f} nats a token")
    if not allow_untrained:
        check_trained(means["loss"], teacher.arch, _ALLOW_UNTRAINED)


def _losses(
    model: LlamaModel, output: TeacherHidden, target: TeacherHidden, batch: Batch, columns: int
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of an output with the data, and KL from a target to it, both [s, b]."""
    found = linear_kl(
        *output,
        target,
        token_weights=batch.loss_mask.t(),
        valid_columns=columns,
        labels=batch.labels.t(),
        sequence_parallel=model.config.sequence_parallel,
        tp_group=model.topology.groups.tp,
    )
    assert found.cross_entropy is not None
    return found.cross_entropy, found.forward_kl


def check_trained(loss: float, teacher: Architecture, flag: str) -> None:
    """Refuse a teacher no better than chance.

    Args:
        loss: the teacher's on the data, nats per token.
        teacher: its shape.
        flag: what to add to a command that wants such a teacher.

    Raises:
        MinitronError: it is no better.
    """
    chance = math.log(teacher.vocab_size)
    if not loss < chance - _LEAST_GAIN:
        raise MinitronError(
            f"the teacher predicts the data no better than chance: its loss is {loss:.2f} nats a "
            f"token, that of guessing among {teacher.vocab_size} tokens {chance:.2f}; check that "
            f"it is the right model for this data, or add {flag}"
        )
