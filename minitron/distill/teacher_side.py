"""What stands opposite the student: a teacher at hand, or a store of its outputs.

A run checks first and builds after: what can be told from files is found before models take memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from minitron.data.batches import EvalBatches, TrainBatches
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.distill.gates import (
    check_start,
    check_stored_start,
    check_weights,
    shared_tokenizer,
    shared_vocab_size,
)
from minitron.distill.intermediate import IntermediateDistillation, find_pairs
from minitron.distill.losses import LogitDistillation
from minitron.distill.offline.files import STORE
from minitron.distill.offline.objective import StoredDistillation
from minitron.distill.offline.store import LogitStore
from minitron.distill.offline.teacher import StoredTeacher
from minitron.distill.teacher import Teacher, teacher_topology
from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel, build_llama, check_parallel
from minitron.model.sharding import open_model
from minitron.parallel import Topology, on_rank_zero
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.train.objective import Objective


class TeacherSide(Protocol):
    """Opened and checked; `objective` builds what it needs."""

    tokenizer: Tokenizer | None
    """Of both models, if any is known."""
    vocab_size: int
    """Tokens that both models know."""
    largest_vocab: int
    """Rows of the longest table that is loaded."""

    def objective(
        self,
        student: Sequence[LlamaModel],
        batches: TrainBatches,
        validation: EvalBatches | None,
        *,
        num_samples: int,
        **options: Any,
    ) -> Objective:
        """Build the loss.

        Args:
            student: this rank's chunks.
            batches: training data.
            validation: held-out data.
            num_samples: that the run learns from.
            options: of `build_llama`, for a teacher.

        Raises:
            MinitronError: the teacher cannot teach this data.
        """
        ...


def open_teacher(
    config: TeacherConfig,
    distill: DistillConfig,
    *,
    student: Architecture,
    student_path: Path,
    topology: Topology,
    seq_length: int,
    seed: int,
) -> TeacherSide:
    """Open what a recipe's `teacher` names; call on all ranks.

    Args:
        config: the `teacher` section.
        distill: the `distill` section.
        student: its shape.
        student_path: its directory.
        topology: the student's.
        seq_length: tokens of a sample.
        seed: of the map of intermediate losses.

    Raises:
        MinitronError: the teacher or the store does not go with the student or the recipe.
    """
    if config.logits is not None:
        return _Store(config.logits, distill, student, student_path, seq_length)
    return _Model(config, distill, student, student_path, topology, seq_length, seed)


class _Store:
    def __init__(
        self,
        path: Path,
        distill: DistillConfig,
        student: Architecture,
        student_path: Path,
        seq_length: int,
    ) -> None:
        if distill.intermediate.states:
            raise MinitronError(
                f"{path} holds no states for distill.intermediate.states="
                f"{distill.intermediate.states}; leave them out or give --teacher.path"
            )
        self._distill = distill
        self._store = LogitStore(path)
        self.tokenizer = find_tokenizer(student_path)
        self._store.check(
            tokenizer=self.tokenizer.fingerprint if self.tokenizer else None,
            seq_length=seq_length,
            temperature=distill.temperature,
        )
        info = self._store.info
        self.vocab_size = shared_vocab_size(
            info.vocab_size,
            student.vocab_size,
            self.tokenizer.vocab_size if self.tokenizer else info.tokenizer_vocab_size,
        )
        self.largest_vocab = student.vocab_size

    def objective(
        self,
        student: Sequence[LlamaModel],
        batches: TrainBatches,
        validation: EvalBatches | None,
        *,
        num_samples: int,
        **options: Any,
    ) -> Objective:
        on_rank_zero(lambda: self._store.check_holds(batches, validation, num_samples=num_samples))
        teacher = StoredTeacher(
            self._store,
            vocab_size=self.vocab_size,
            is_last_stage=student[0].topology.is_last_stage,
        )
        objective = StoredDistillation(teacher, self._distill)
        check_stored_start(objective, student, next(batches.microbatches(0)))
        return objective


class _Model:
    def __init__(
        self,
        config: TeacherConfig,
        distill: DistillConfig,
        student: Architecture,
        student_path: Path,
        topology: Topology,
        seq_length: int,
        seed: int,
    ) -> None:
        self._config, self._distill, self._seed = config, distill, seed
        if (config.source / STORE).exists():
            raise MinitronError(
                f"--teacher.path {config.source} is a store of a teacher's outputs, not a model; "
                "give it as --teacher.logits"
            )
        self._arch, self._weights = open_model(config.source)
        self.tokenizer = shared_tokenizer(config.source, student_path)
        self.vocab_size = shared_vocab_size(
            self._arch.vocab_size,
            student.vocab_size,
            self.tokenizer.vocab_size if self.tokenizer else None,
        )
        distill.check_vocabulary(self.vocab_size)
        self.largest_vocab = max(self._arch.vocab_size, student.vocab_size)
        self._topology = teacher_topology(config, topology, self._arch.num_layers)
        check_parallel(self._arch, self._topology.config)
        self._arch.check_seq_length(seq_length)
        find_pairs(distill.intermediate, student, self._arch)

    def objective(
        self,
        student: Sequence[LlamaModel],
        batches: TrainBatches,
        validation: EvalBatches | None,
        *,
        num_samples: int,
        **options: Any,
    ) -> Objective:
        model = build_llama(self._arch, self._topology, self._weights, **options)
        check_weights(model, self._config.source)
        teacher = Teacher(model, self._config)
        check_start(teacher, student, next(batches.microbatches(0)))
        objective = LogitDistillation(teacher, self._distill)
        if not self._distill.intermediate.states:
            return objective
        return IntermediateDistillation(
            objective,
            student,
            teacher,
            self._distill.intermediate,
            lm_weight=self._distill.lm_weight,
            seed=self._seed,
        )
