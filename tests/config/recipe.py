"""A recipe of every kind of key, and what reading it says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from minitron import config
from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves."""

    warmup: int = 0
    """Steps to warm up."""
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Optimisation of the run."""

    steps: int = 10
    """Optimizer steps;
    100% of them."""
    lr: float = 3e-4
    clip: float | None = 1.0
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise MinitronError(f"train.steps={self.steps} is negative; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Data:
    path: list[Path] = field(default_factory=list)
    weights: list[float] | None = None
    drop: tuple[int, ...] = ()
    mix: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The frozen model."""

    path: Path
    """Its directory."""
    load: Literal["lazy", "eager"] = "lazy"


@dataclass(frozen=True, kw_only=True)
class Base:
    out: Path
    """Output directory."""
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class Recipe(Base):
    """Train a small model.

    This paragraph is for readers of the code.
    """

    overwrite: bool = False
    name: str | None = None
    budget: Literal["all"] | int = "all"
    train: Train = field(default_factory=lambda: Train(lr=0.5))
    data: Data = Data()
    teacher: Teacher | None = None
    """Distil from this model."""


def parse(*argv: str) -> Recipe:
    return config.parse(Recipe, ["--out", "o", *argv])


def parse_yaml(tmp_path: Path, text: str, *argv: str) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return config.parse(Recipe, ["--config", str(file), *argv])


def message(*argv: str) -> str:
    with pytest.raises(MinitronError) as caught:
        config.parse(Recipe, list(argv))
    text = str(caught.value)
    assert "\n" not in text
    return text


def yaml_message(tmp_path: Path, text: str, *argv: str) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("latin-1"))
    text = message("--config", str(file), *argv)
    assert text.startswith(f"{file}: ")
    return text.removeprefix(f"{file}: ")


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]
