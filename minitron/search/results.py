"""What a search has found so far: `search.json`, which an interrupted search goes on from.

The file is written anew after every measurement, complete or not at all. It says for every shape
what it costs, its loss right after pruning and, for those that raced, its validation losses by
step. `search.md` is the same as a table, best first.
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

    def loss_text(self, step: int) -> str:
        """What the table says of it at a rung."""
        if step == self.diverged:
            return "diverged"
        return _loss_text(self.losses.get(step))

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

    def save(self, directory: Path) -> None:
        """Write `search.json`."""
        source = {size: getattr(self.source, size) for size in SIZES}
        content = {
            "source": {**source, "params": self.source.num_parameters, "loss": self.source_loss},
            "best": self.best,
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }
        artifact.write_json(directory / RESULTS_FILE, content)

    def save_table(self, directory: Path, rungs: Sequence[int]) -> None:
        """Write `search.md`."""
        headers, rows = self._table(rungs)
        lines = [headers, ["--:"] * len(headers), *rows]
        lines[1][1] = ":--"
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        temporary = directory / f".{TABLE_FILE}.partial"
        temporary.write_text(f"{text}\n\n{self._note()}\n", encoding="utf-8")
        os.replace(temporary, directory / TABLE_FILE)

    def table(self, rungs: Sequence[int]) -> str:
        """The table for a terminal."""
        return f"{metrics.format_table(*self._table(rungs))}\n\n{self._note()}"

    def _table(self, rungs: Sequence[int]) -> tuple[list[str], list[list[str]]]:
        costs = list(self.candidates[0].shape.costs)
        headers = ["rank", "shape", *(_TITLES[name] for name in costs)]
        headers += ["pruned"] * self._is_measured + [f"step {rung}" for rung in rungs]
        rows = []
        for rank, candidate in enumerate(self.ranked(), start=1):
            losses = [_loss_text(candidate.pruned_loss)] * self._is_measured
            rows.append(
                [
                    str(rank),
                    candidate.name,
                    *(_cost_text(name, candidate.shape.costs[name]) for name in costs),
                    *losses,
                    *map(candidate.loss_text, rungs),
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


def _loss_text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _cost_text(name: str, cost: float) -> str:
    return count_text(cost) if name.endswith("params") else f"{cost:.3g}"
