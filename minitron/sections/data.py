"""What to read: data to train on or to measure with, text to tokenise, prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from minitron.errors import MinitronError

DEFAULT_WORKERS = 8

_WEIGHTED = re.compile(r"([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?):(.+)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text or tokens come from, and how they are cut into samples."""

    path: list[str]
    """A .txt file, a .jsonl file with a `text` field (or `prompt` and `response`, of which only the
    response is learnt), a directory of such files, or the prefix of a
    .bin/.idx pair. Several are read as one, or blended if each is given as WEIGHT:PATH. Text is
    tokenised once, into $MINITRON_CACHE (default ~/.cache/minitron/data)."""
    valid_path: list[str] = field(default_factory=list)
    """The same for validation, without weights; empty for none."""
    seq_length: int = 1024
    """Tokens of a sample."""
    valid_samples: int | None = None
    """Most samples of a validation; null for all."""
    workers: int = DEFAULT_WORKERS
    """Most processes that tokenise text; fewer where there are fewer cores or little text."""

    def __post_init__(self) -> None:
        if not self.path:
            raise MinitronError("data.path is empty; give at least one file, directory or prefix")
        weights = [weight for weight, _ in map(split_weight, self.path)]
        if None in weights and any(weight is not None for weight in weights):
            raise MinitronError(
                f"data.path={self.path} has weights for some paths only; "
                "write all as WEIGHT:PATH or none"
            )
        for entry, weight in zip(self.path, weights, strict=True):
            if weight is not None and weight <= 0:
                raise MinitronError(
                    f"data.path={entry} has weight {float(weight)}; weights must be above 0"
                )
        refuse_weights("data.valid_path", self.valid_path)
        for name in ("seq_length", "workers", "valid_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MinitronError(f"data.{name}={value} must be at least 1")


def split_weight(entry: str) -> tuple[Fraction | None, str]:
    """Take WEIGHT:PATH apart."""
    match = _WEIGHTED.fullmatch(entry)
    return (Fraction(match[1]), match[2]) if match else (None, entry)


def refuse_weights(name: str, paths: Sequence[str]) -> None:
    """Refuse weights where they mean nothing.

    Raises:
        MinitronError: an entry has one.
    """
    for entry in paths:
        if split_weight(entry)[0] is not None:
            raise MinitronError(
                f"{name}={entry} has a weight, but this data is read in order, once; "
                "give the path alone"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Text to tokenise."""

    path: list[str]
    """A .txt file (one document), a .jsonl file (one document a line, in the field `text`, or in
    `prompt` and `response`, of which the prompt is read but not learnt), or a directory of such
    files; several are tokenised one after the other."""
    workers: int = DEFAULT_WORKERS
    """Most processes to use; fewer where there are fewer cores or little text."""

    def __post_init__(self) -> None:
        if not self.path:
            raise MinitronError("data.path is empty; give at least one file or directory")
        if self.workers < 1:
            raise MinitronError(f"data.workers={self.workers} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """What to continue."""

    path: list[str]
    """A .jsonl file with a field `prompt`; or text, of whose documents the first `tokens` are
    taken: a .txt file, a .jsonl file with a field `text`, or a directory of such files. Prompts are
    read as training data is, without BOS."""
    tokens: int | None = None
    """Tokens of a text that make a prompt; shorter texts are passed over."""
    limit: int | None = None
    """Most prompts to read; null for all."""

    def __post_init__(self) -> None:
        if not self.path:
            raise MinitronError("prompts.path is empty; give at least one file or directory")
        for name in ("tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MinitronError(f"prompts.{name}={value} must be at least 1")
