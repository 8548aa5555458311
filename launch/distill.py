"""Distill a teacher, at hand or in a store of its logits, into a student."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import artifact, platform
from minitron.data.batches import DataConfig
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.distill.gates import check_start, check_weights, shared_vocab_size
from minitron.distill.intermediate import IntermediateDistillation
from minitron.distill.losses import DistillConfig, LogitDistillation
from minitron.distill.offline.objective import StoredDistillation
from minitron.distill.offline.store import LogitStore
from minitron.distill.offline.teacher import StoredTeacher
from minitron.distill.teacher import Teacher, TeacherConfig
from minitron.errors import MinitronError
from minitron.model.llama import build_chunks, build_llama, check_parallel, padded_vocab_size
from minitron.model.sharding import open_model
from minitron.parallel import ParallelConfig, initialize, on_rank_zero
from minitron.platform import Precision
from minitron.stage import run
from minitron.train.checkpoint import ModelFiles
from minitron.train.config import TrainConfig
from minitron.train.loop import Trainer
from minitron.train.objective import Objective
from minitron.train.run import finish_run, open_batches, open_run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk."""

    path: Path
    """Its Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Distill a teacher into a student: minimise a divergence between their next-token
    distributions (`distill.loss`), with the teacher frozen. Both must have the same tokenizer;
    depth and width may differ.
    """

    teacher: TeacherConfig
    """The model to learn from."""
    student: ModelSource
    """The model to train, usually pruned from the teacher."""
    data: DataConfig
    """Training and validation data."""
    out: Path
    """Directory of the run: metrics, checkpoints, and in the end the student."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Steps, batches, optimizer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; `layers_per_stage` is the student's. The result is the same."""
    precision: Precision = "fp32"
    """Of weights and activations; the optimizer keeps fp32 main weights."""
    seed: int = 1234
    """Of the order of the samples."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; starts anew if there is none."""
    allow_change: bool = False
    """Let `resume` go on with another data.seq_length, train.global_batch_size, train.steps or
    learning rate than the run had; ranks may always be others."""
    until_step: int | None = None
    """Stop after this step with the model so far in `out`, for `resume` to go on; the learning rate
    is still that of a run to train.steps. null goes to the last step."""


def main(recipe: Recipe) -> None:
    """Build the models, train the student, write it."""
    topology = initialize(recipe.parallel, seed=recipe.seed)
    teacher_path, student_path = recipe.teacher.source, recipe.student.path
    on_rank_zero(
        lambda: artifact.check_out(
            recipe.out,
            overwrite=recipe.overwrite,
            resume=recipe.resume,
            inputs=[teacher_path, student_path],
        )
    )
    student_arch, student_weights = open_model(student_path)
    check_parallel(student_arch, recipe.parallel)
    intermediate = recipe.distill.intermediate
    student_arch.check_seq_length(recipe.data.seq_length)
    store = None if recipe.teacher.logits is None else LogitStore(recipe.teacher.logits)
    vocab_size = largest_vocab = student_arch.vocab_size
    if store is not None:
        if intermediate.states:
            raise MinitronError(
                f"{teacher_path} holds no states for distill.intermediate.states="
                f"{intermediate.states}; leave them out or give --teacher.path"
            )
        tokenizer = find_tokenizer(student_path)
        store.check(
            tokenizer=tokenizer.fingerprint if tokenizer else None,
            vocab_size=student_arch.vocab_size,
            seq_length=recipe.data.seq_length,
            temperature=recipe.distill.temperature,
        )
    else:
        teacher_arch, teacher_weights = open_model(teacher_path)
        tokenizer = _shared_tokenizer(recipe)
        vocab_size = shared_vocab_size(teacher_arch, student_arch, tokenizer)
        largest_vocab = max(teacher_arch.vocab_size, student_arch.vocab_size)
        teacher_topology = recipe.teacher.topology(topology, teacher_arch.num_layers)
        check_parallel(teacher_arch, teacher_topology.config)
        teacher_arch.check_seq_length(recipe.data.seq_length)
        intermediate.pairs(student_arch, teacher_arch)
    batches, validation = open_batches(
        recipe.data,
        recipe.train,
        topology,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        seed=recipe.seed,
    )
    dtype = platform.DTYPES[recipe.precision]
    options: dict[str, Any] = {
        "dtype": dtype,
        "transformer_impl": "local" if intermediate.states else "auto",
        "padded_vocab": padded_vocab_size(largest_vocab, topology.tp_size),
    }
    student = build_chunks(
        student_arch, topology, student_weights, recompute=recipe.train.recompute, **options
    )
    for chunk in student:
        check_weights(chunk, student_path)
    objective: Objective
    if store is not None:
        count = recipe.train.steps * recipe.train.global_batch_size
        on_rank_zero(lambda: store.check_holds(batches, validation, num_samples=count))
        stored = StoredTeacher(store, is_last_stage=topology.is_last_stage)
        objective = StoredDistillation(stored, recipe.distill)
    else:
        model = build_llama(teacher_arch, teacher_topology, teacher_weights, **options)
        check_weights(model, teacher_path)
        teacher = Teacher(model, recipe.teacher)
        check_start(teacher, student, next(batches.microbatches(0)))
        objective = LogitDistillation(teacher, recipe.distill)
        if intermediate.states:
            objective = IntermediateDistillation(
                objective, student, model, intermediate, seed=recipe.seed
            )
    files = ModelFiles(dtype=dtype, base_dir=student_path, tokenizer=tokenizer)
    open_run(recipe)
    trainer = Trainer(student, objective, batches, validation, recipe.train, recipe.out, files)
    if recipe.resume:
        trainer.resume()
    metrics = trainer.run(recipe.until_step)
    parents = {"teacher": teacher_path, "student": student_path}
    finish_run(recipe, student, stage="distill", parents=parents, metrics=metrics, files=files)


def _shared_tokenizer(recipe: Recipe) -> Tokenizer | None:
    """The tokenizer of both models, of the one that brings it, or None.

    Raises:
        MinitronError: the models speak of other tokens.
    """
    of_teacher = find_tokenizer(recipe.teacher.source)
    of_student = find_tokenizer(recipe.student.path)
    if of_teacher and of_student and of_teacher.fingerprint != of_student.fingerprint:
        raise MinitronError(
            f"the tokenizers differ: {of_teacher.path} ({of_teacher.fingerprint}) and "
            f"{of_student.path} ({of_student.fingerprint}); give a student with the teacher's "
            "tokenizer"
        )
    return of_student or of_teacher


if __name__ == "__main__":
    run(Recipe, main)
