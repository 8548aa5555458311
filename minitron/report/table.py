"""The one table of the report: every model with its loss before and after its stage.

Rendered three times from the same cells: aligned text for a terminal, Markdown and HTML. Losses
compare only where they were measured on the same data; the table knows which, marks the lowest
among those that compare, and says so below.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from minitron.report.runs import Run

HEADER = ("model", "stage", "parameters", "loss before", "loss after", "tokens")
NUM_TEXT_COLUMNS = 2  # the columns after these are numbers
MISSING = "-"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model; None is what nobody measured."""

    model: str
    stage: str
    parameters: float | None
    loss_before: float | None
    """Nats per token before the stage's first update."""
    loss_after: float | None
    tokens: float | None
    """Training tokens consumed."""
    data: str | None
    """What the losses were measured on; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the table."""

    text: str
    best: bool = False
    """True for the lowest of the losses that it compares with."""
    note: int | None = None
    """Number of the note that says what it was measured on."""

    @property
    def marks(self) -> str:
        """What follows the text where there is no typography."""
        return (f" [{self.note}]" if self.note else "") + "*" * self.best


def row_of(run: Run) -> Row:
    """Reduce a run to its row."""
    before, after, tokens = (
        measured(run.losses.get(name, math.nan)) for name in ("before", "after", "tokens")
    )
    if run.validation is not None:
        steps, losses = run.validation["step"], run.validation["val_loss"]
        before = measured(losses[0]) if steps[0] == 0 else None
        after = measured(losses[-1]) if steps[-1] > 0 else None
    if run.evaluation is not None:
        after = measured(run.evaluation["lm_loss"])
    has_loss = before is not None or after is not None
    curves = [curve for curve in (run.validation, run.training) if curve is not None]
    if curves:
        tokens = measured(max(curve["tokens"][-1] for curve in curves))
    return Row(
        model=run.name,
        stage=run.status,
        parameters=run.num_parameters,
        loss_before=before,
        loss_after=after,
        tokens=tokens,
        data=(run.validation_data or "unknown data") if has_loss else None,
    )


class Table:
    """Rows of models, ready to be rendered."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.rows = [row_of(run) for run in runs if run.scores is None]  # scores are no model
        self._data = list(dict.fromkeys(row.data for row in self.rows if row.data is not None))

    def labels(self) -> dict[str, str]:
        """Each model's name with the number of the note on its data: width [2]."""
        return {
            row.model: row.model + (f" [{note}]" if (note := self._note(row)) else "")
            for row in self.rows
        }

    def cells(self) -> list[list[Cell]]:
        """The table's body, row by row."""
        before = self._loss_cells([row.loss_before for row in self.rows])
        after = self._loss_cells([row.loss_after for row in self.rows])
        return [
            [
                Cell(text=row.model),
                Cell(text=row.stage),
                Cell(text=count_text(row.parameters)),
                before[i],
                after[i],
                Cell(text=count_text(row.tokens)),
            ]
            for i, row in enumerate(self.rows)
        ]

    def notes(self) -> list[str]:
        """What the columns hold and on which data the losses were measured."""
        notes = [
            "loss: validation LM loss in nats per token, before the stage's first update and after "
            "its last; of a pruned model the source's and its own, of a search the best shape's; "
            f"tokens: training tokens consumed; {MISSING}: not measured"
        ]
        several = len(self._data) > 1
        if any(cell.best for row in self.cells() for cell in row):
            notes.append(f"*: the lowest of its column{' on the same data' if several else ''}")
        for number, data in enumerate(self._data, start=1):
            notes.append(f"{f'[{number}] ' if several else ''}losses measured on {data}")
        return notes

    def text(self) -> str:
        """Aligned plain text for a terminal."""
        body = self.cells()
        columns = []
        for i, title in enumerate(HEADER):
            cells = [row[i] for row in body]
            width = max((len(cell.marks) for cell in cells), default=0)
            texts = [title, *(cell.text + cell.marks.ljust(width) for cell in cells)]
            width = max(map(len, texts))
            align = str.ljust if i < NUM_TEXT_COLUMNS else str.rjust
            texts.insert(1, "-" * width)
            columns.append([align(text, width) for text in texts])
        lines = ["  ".join(row).rstrip() for row in zip(*columns, strict=True)]
        return "\n".join([*lines, "", *self.notes()])

    def markdown(self) -> str:
        """A GitHub-flavoured Markdown table and its notes."""
        rules = [":--" if i < NUM_TEXT_COLUMNS else "--:" for i in range(len(HEADER))]
        body = [[_markdown_cell(cell) for cell in row] for row in self.cells()]
        lines = [f"| {' | '.join(row)} |" for row in (HEADER, rules, *body)]
        notes = [f"- {_escape_markdown(note)}" for note in self.notes()]
        return "\n".join([*lines, "", *notes]) + "\n"

    def html(self) -> str:
        """An HTML table and its notes."""
        rows = "\n".join(
            f"<tr>{''.join(_html_cell(cell, i) for i, cell in enumerate(row))}</tr>"
            for row in self.cells()
        )
        head = "".join(f'<th scope="col">{title}{_html_marks(title, "")}</th>' for title in HEADER)
        notes = "\n".join(f"<li>{html.escape(note)}</li>" for note in self.notes())
        return (
            '<div class="scroll"><table class="results">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n"
            f'<ul class="notes">\n{notes}\n</ul>'
        )

    def _loss_cells(self, losses: Sequence[float | None]) -> list[Cell]:
        """One column of losses, the lowest on each data marked where it has competitors."""
        measured_on: dict[str | None, list[float]] = {}
        for row, loss in zip(self.rows, losses, strict=True):
            if loss is not None:
                measured_on.setdefault(row.data, []).append(loss)
        return [
            Cell(text=MISSING)
            if loss is None
            else Cell(
                text=f"{loss:.3f}",
                best=loss == min(measured_on[row.data]) < max(measured_on[row.data]),
                note=self._note(row),
            )
            for row, loss in zip(self.rows, losses, strict=True)
        ]

    def _note(self, row: Row) -> int | None:
        """Number of the note on a row's data; None where all losses share theirs."""
        if row.data is None or len(self._data) == 1:
            return None
        return self._data.index(row.data) + 1


def measured(value: float) -> float | None:
    """The value as a plain float, or None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def count_text(count: float | None) -> str:
    """A count with three significant digits and the usual suffix: 4.51B, 8.39M, 512."""
    if count is None:
        return MISSING
    value, suffix = scaled(count)
    return f"{value:#.3g}".rstrip(".") + suffix if suffix else f"{value:.0f}"


def scaled(count: float) -> tuple[float, str]:
    """A count in its largest unit, and the unit's suffix."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * unit:  # what rounds to 1000k is 1.00M
            return count / unit, suffix
    return count, ""


def _markdown_cell(cell: Cell) -> str:
    text = _escape_markdown(cell.text)
    return (f"**{text}**" if cell.best else text) + _escape_markdown(cell.marks)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([\\|*_`<\[\]])", r"\\\1", text)


def _html_cell(cell: Cell, column: int) -> str:
    text = html.escape(cell.text)
    if cell.best:
        text = f"<strong>{text}</strong>"
    text += _html_marks(HEADER[column], cell.marks)
    return f'<th scope="row">{text}</th>' if column == 0 else f"<td>{text}</td>"


def _html_marks(title: str, marks: str) -> str:
    """The marks in a column of losses; where empty, their room, so that the numbers line up."""
    return f"<sup>{marks}</sup>" if title.startswith("loss") else ""
