"""Distill a teacher, at hand or in a store of its logits, into a student."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.sections.data import DataConfig
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.train import TrainConfig
from minitron.stage import parse, run


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
    """Of the order of the samples, and of the map between the widths of intermediate losses."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Continue the run in `out` from its newest checkpoint; starts anew if there is none. SIGTERM
    and SIGUSR1 leave one behind."""
    allow_change: bool = False
    """Let `resume` go on with another data.seq_length, train.global_batch_size, train.steps or
    learning rate than the run had, or with other content of the student's or the data's path; ranks
    and what the teacher has learnt may always be others."""
    until_step: int | None = None
    """Stop after this step with the model so far in `out`, for `resume` to go on; the learning rate
    is still that of a run to train.steps. null goes to the last step."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import


from minitron import artifact, platform
from minitron.distill.gates import check_weights
from minitron.distill.teacher_side import open_teacher
from minitron.model.llama import build_chunks, check_parallel, padded_vocab_size
from minitron.model.sharding import open_model
from minitron.parallel import initialize, on_rank_zero
from minitron.train.checkpoint import ModelFiles
from minitron.train.loop import Trainer
from minitron.train.run import fingerprints, finish_run, has_more_to_do, open_batches, open_run


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
    student_arch.check_seq_length(recipe.data.seq_length)
    side = open_teacher(
        recipe.teacher,
        recipe.distill,
        student=student_arch,
        student_path=student_path,
        topology=topology,
        seq_length=recipe.data.seq_length,
        seed=recipe.seed,
    )
    batches, validation = open_batches(
        recipe.data,
        recipe.train,
        topology,
        tokenizer=side.tokenizer,
        vocab_size=side.vocab_size,
        seed=recipe.seed,
    )
    models = {"teacher": teacher_path, "student": student_path}
    inputs = fingerprints(models, batches, validation)
    if not has_more_to_do(recipe, inputs):
        return
    dtype = platform.DTYPES[recipe.precision]
    options: dict[str, Any] = {
        "dtype": dtype,
        "transformer_impl": "local" if recipe.distill.intermediate.states else "auto",
        "padded_vocab": padded_vocab_size(side.largest_vocab, topology.tp_size),
    }
    student = build_chunks(
        student_arch, topology, student_weights, recompute=recipe.train.recompute, **options
    )
    for chunk in student:
        check_weights(chunk, student_path)
    num_samples = recipe.train.steps * recipe.train.global_batch_size
    objective = side.objective(student, batches, validation, num_samples=num_samples, **options)
    files = ModelFiles(dtype=dtype, base_dir=student_path, tokenizer=side.tokenizer)
    trainer = Trainer(student, objective, batches, validation, recipe.train, recipe.out, files)
    with contextlib.closing(trainer):
        if recipe.resume:
            trainer.resume()
        open_run(recipe, inputs)  # a change that is refused has changed nothing
        metrics = trainer.run(recipe.until_step)
    finish_run(recipe, student, stage="distill", parents=models, metrics=metrics, files=files)


if __name__ == "__main__":
    run(main, recipe)
