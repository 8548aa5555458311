"""What a search has found so far: `search.json`, which an interrupted search goes on from.

The file is written anew after every measurement, complete or not at all. It says for every shape
what it costs, its loss right after pruning and, for those that raced, its validation losses by
step. `search.md`, written with it, is the same as a table, best first.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron import artifact, metrics
from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.report.table import count_text
from minitron.search.space import Shape
from minitron.sections.search import SIZES

RESULTS_FILE = "search.json"
TABLE_FILE = "search.md"

_TITLES = {
    "params": "params",
    "non_embedding_params": "non-emb.",
    "memory_gb": "GB",
    "latency": "latency, s",
}


@dataclass(kw_only=True)
class Candidate:
    """A shape that fits, and what was measured of it."""

    shape: Shape
    pruned_loss: float | None = None
    """Validation loss right after pruning, nats per token."""
    losses: dict[int, float] = field(default_factory=dict)
    """Validation loss after so many steps of distillation."""
    diverged: int | None = None
    """The rung that it did not reach, because its loss was no number any more."""

    @property
    def name(self) -> str:
        """The shape's."""
        return self.shape.name

    @property
    def place(self) -> tuple[float, ...]:
        """Sorts candidates: who got farther comes first, and of those who has the lower loss; who
        diverged comes last.
        """
        steps = max(self.losses, default=-1)
        pruned = float("inf") if self.pruned_loss is None else self.pruned_loss
        return (self.diverged is not None, -steps, self.losses.get(steps, 0.0), pruned)

    def loss_at(self, step: int) -> float | str | None:
        """What the table says of it at a rung."""
        return "diverged" if step == self.diverged else self.losses.get(step)

    def to_dict(self) -> dict[str, Any]:
        """What `search.json` says of it."""
        return {
            "name": self.name,
            **{size: getattr(self.shape.arch, size) for size in SIZES},
            **self.shape.costs,
            "pruned_loss": self.pruned_loss,
            "losses": {str(step): loss for step, loss in sorted(self.losses.items())},
            "diverged": self.diverged,
        }


@dataclass(kw_only=True)
class Results:
    """All candidates, in the order in which they were found, and the best once it is known."""

    source: Architecture
    source_loss: float | None = None
    """Validation loss of the model that is pruned."""
    candidates: list[Candidate]
    best: str | None = None

    def candidate(self, name: str) -> Candidate:
        """The candidate of this name."""
        return next(c for c in self.candidates if c.name == name)

    def ranked(self) -> list[Candidate]:
        """The candidates, best first."""
        return sorted(self.candidates, key=lambda candidate: candidate.place)

    def save(self, directory: Path, rungs: Sequence[int]) -> None:
        """Write `search.md`, with a column for each rung, and `search.json`."""
        text = f"{metrics.format_markdown(*self._table(rungs))}\n\n{self._note()}\n"
        temporary = directory / f".{TABLE_FILE}.partial"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, directory / TABLE_FILE)
        source = {size: getattr(self.source, size) for size in SIZES}
        content = {
            "source": {**source, "params": self.source.num_parameters, "loss": self.source_loss},
            "best": self.best,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }
        artifact.write_json(directory / RESULTS_FILE, content)

    def table(self, rungs: Sequence[int]) -> str:
        """The table for a terminal."""
        return f"{metrics.format_table(*self._table(rungs))}\n\n{self._note()}"

    def _table(self, rungs: Sequence[int]) -> tuple[list[str], list[list[Any]]]:
        costs = list(self.candidates[0].shape.costs)
        headers = ["rank", "shape", *(_TITLES[name] for name in costs)]
        headers += ["pruned"] * self._is_measured + [f"step {rung}" for rung in rungs]
        rows = []
        for rank, candidate in enumerate(self.ranked(), start=1):
            losses = [candidate.pruned_loss] * self._is_measured
            rows.append(
                [
                    rank,
                    candidate.name,
                    *(_cost_text(name, candidate.shape.costs[name]) for name in costs),
                    *losses,
                    *map(candidate.loss_at, rungs),
                ]
            )
        return headers, rows

    def _note(self) -> str:
        note = (
            "Shapes are named by layers (L), hidden size (h), MLP neurons (f), query heads (n) and "
            "key/value heads (g)."
        )
        if not self._is_measured:
            return note
        return (
            f"{note} Losses are those of validation in nats per token, right after pruning and "
            f"after so many steps of distillation; the source's is {self.source_loss:.4f}."
        )

    @property
    def _is_measured(self) -> bool:
        return self.source_loss is not None


def load_results(directory: Path, source: Architecture) -> Results | None:
    """Read the `search.json` of an earlier attempt; None where there is none.

    Raises:
        MinitronError: it is damaged.
    """
    file = directory / RESULTS_FILE
    if not file.exists():
        return None
    content = artifact.read_json(file)
    try:
        return Results(
            source=source,
            source_loss=content["source"]["loss"],
            candidates=[_candidate(source, values) for values in content["candidates"]],
            best=content["best"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MinitronError(
            f"{file} is not what launch/search.py writes ({error!r}); restore it, or choose "
            "another --out"
        ) from None


def _candidate(source: Architecture, values: dict[str, Any]) -> Candidate:
    arch = dataclasses.replace(source, **{size: values[size] for size in SIZES})
    costs = {name: values[name] for name in _TITLES if name in values}
    return Candidate(
        shape=Shape(arch=arch, costs=costs),
        pruned_loss=values["pruned_loss"],
        losses={int(step): loss for step, loss in values["losses"].items()},
        diverged=values.get("diverged"),
    )


def _cost_text(name: str, cost: float) -> str:
    return count_text(cost) if name.endswith("params") else f"{cost:.3g}"
