"""A student and its teacher, written for a test."""

from pathlib import Path
from typing import Any

from minitron.sections.distill import TeacherConfig
from minitron.sections.train import TrainConfig
from tests.runs import SEQ_LENGTH, VOCAB, Run, write_tokens
from tests.tiny import save_llama


def save_pair(
    root: Path, train: TrainConfig, *, student: dict[str, Any], teacher: dict[str, Any]
) -> Run:
    """Write both models, as tests.tiny builds them but for what is given, and twelve samples."""
    save_llama(root / "student", vocab_size=VOCAB, **student)
    save_llama(root / "teacher", seed=1, vocab_size=VOCAB, **teacher)
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=write_tokens(root / "tokens", 12 * SEQ_LENGTH + 1),
        out=root,
        train=train,
    )
