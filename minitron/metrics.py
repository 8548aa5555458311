"""What a run tells its user: log lines, progress, tables, and metrics on disk.

`metrics.jsonl` is the record that other stages read, one JSON object a line, written as it happens;
TensorBoard gets the same numbers where it is installed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from minitron.errors import MinitronError

METRICS = "metrics.jsonl"
LOG_INTERVAL_S = 10.0
BYTES = "B"
"""The unit that takes a prefix: 3.92 MB, but 3.92M tokens."""


_logger = logging.getLogger("minitron")


def launch_rank() -> int:
    """The rank that torchrun gave this process, known before any process group exists."""
    return int(os.environ.get("RANK", "0"))


def log(message: str) -> None:
    """Log one line; `minitron.stage` lets only rank 0 show it."""
    _logger.info(message)


class MetricsWriter:
    """Appends records to `metrics.jsonl` and, where it is installed, to TensorBoard.

    NaN and infinities, which JSON does not know, are written as null.

    Args:
        directory: where `metrics.jsonl` and `tensorboard/` go; it exists.
        enabled: False makes every method do nothing (ranks other than the one that reports).
        append: keep the records of an earlier run instead of starting anew.
    """

    def __init__(self, directory: Path, *, enabled: bool, append: bool = False) -> None:
        self._path = directory / METRICS
        self._tensorboard_dir = directory / "tensorboard"
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        if not enabled:
            return
        if append and self._path.exists():
            self._rewrite(read_metrics(self._path))
        self._file = self._path.open("a" if append else "w", encoding="utf-8")
        self._tensorboard = _open_tensorboard(self._tensorboard_dir)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record, in full before this returns; its numbers are scalars at its `step`."""
        if self._file is None:
            return
        finite = {key: _finite(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None and "step" in record:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._tensorboard.add_scalar(key, value, record["step"])

    def truncate_after(self, step: int) -> None:
        """Drop the records after `step`, which the run that resumes there will repeat."""
        if self._file is None:
            return
        self._file.close()
        self._rewrite([r for r in read_metrics(self._path) if r.get("step", step) <= step])
        self._file = self._path.open("a", encoding="utf-8")
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = _open_tensorboard(self._tensorboard_dir, purge_step=step + 1)

    def close(self) -> None:
        """Close the files; later records are not written."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def _rewrite(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Replace the file in one step; a line that a crash cut short is gone afterwards."""
        temporary = self._path.with_name(f".{METRICS}.partial")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(temporary, self._path)


def _open_tensorboard(directory: Path, *, purge_step: int | None = None) -> Any:
    """A TensorBoard writer, or None where it is not installed or does not import."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # a broken protobuf raises TypeError
        return None
    return SummaryWriter(str(directory), purge_step=purge_step)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that a crash cut short is left out.

    Raises:
        MinitronError: the file is missing, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise MinitronError(f"{path} cannot be read ({error.strerror})") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise MinitronError(f"{path} line {number} is not a JSON object; delete that line")
    return records


class Progress:
    """How far a loop is, how fast, and how long it still takes: see `progress`."""

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        *,
        total: float | None,
        desc: str,
        unit: str,
        enabled: bool,
        initial: float,
        transient: bool,
    ) -> None:
        self._iterable = iterable
        self._total = total
        self._desc = desc
        self._unit = unit
        self._initial = self._done = initial
        self._transient = transient
        self._postfix: dict[str, Any] = {}
        self._start = self._last_line = time.monotonic()
        self._logged: float | None = None
        self._bar: Any = None
        self._lines = enabled and not sys.stderr.isatty()
        if enabled and not self._lines:
            self._bar = tqdm(
                total=total,
                desc=desc,
                unit=unit if unit == BYTES else f" {unit}",
                unit_scale=True,
                initial=initial,
                dynamic_ncols=True,
                leave=not transient,
            )

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None, "give progress() an iterable, or call update()"
        with self:
            for item in self._iterable:
                yield item
                self.update(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def update(self, n: float = 1, **postfix: float | str) -> None:
        """Count `n` more units and show `postfix` (loss=2.31, ...) beside them."""
        self._done += n
        self._postfix.update(postfix)
        if self._bar is not None:
            self._bar.set_postfix(_formatted(self._postfix), refresh=False)
            self._bar.update(n)
        elif self._lines and time.monotonic() - self._last_line >= LOG_INTERVAL_S:
            self._log_line()

    def close(self) -> None:
        """Show the final state, unless it is transient; more calls do nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._lines and self._done != self._logged and not self._transient:
            self._log_line()
        self._lines = False

    def _log_line(self) -> None:
        now = time.monotonic()
        self._last_line, self._logged = now, self._done
        elapsed = now - self._start
        rate = (self._done - self._initial) / elapsed if elapsed else 0.0
        parts = [_quantity(self._done, self._unit)]
        if self._total:
            percent = f"{100 * self._done / self._total:.0f}%"
            parts = [percent, f"{_short(self._done)}/{_quantity(self._total, self._unit)}"]
        parts.append(f"{_quantity(rate, self._unit)}/s")
        if self._total and rate and self._done < self._total:
            parts.append(f"ETA {tqdm.format_interval((self._total - self._done) / rate)}")
        else:
            parts.append(f"in {tqdm.format_interval(elapsed)}")
        parts += [f"{key} {value}" for key, value in _formatted(self._postfix).items()]
        log(f"{self._desc}: {', '.join(parts)}")


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    desc: str,
    unit: str = "it",
    enabled: bool | None = None,
    initial: float = 0,
    transient: bool = False,
) -> Progress:
    """Show a tqdm bar on a terminal, else a log line every ten seconds and at the end.

    Iterate over it, or use it as a context manager and call `update`.

    Args:
        iterable: what to iterate over; None where the caller calls `update`.
        total: units in all; taken from `len(iterable)` where that exists.
        desc: what is going on.
        unit: what is counted, in the plural ("tokens"), or `BYTES`.
        enabled: False shows nothing; None means rank 0 alone.
        initial: units done before, by the run that this one resumes.
        transient: nothing stays to be seen of it at the end: it is one of many.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # type: ignore[arg-type]
    if enabled is None:
        enabled = launch_rank() == 0
    return Progress(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        enabled=enabled,
        initial=initial,
        transient=transient,
    )


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Align a table as plain text.

    Integers get thousands separators, floats four decimals, None a dash; a column that holds only
    numbers is aligned to the right.
    """
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = _numeric(headers, rows)
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in (list(headers), ["-" * width for width in widths], *cells)
    ]
    return "\n".join(lines)


def format_markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table that `format_table` aligns, in Markdown."""
    rule = ["--:" if right else ":--" for right in _numeric(headers, rows)]
    cells = [[_cell(value) for value in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headers, rule, *cells))


def _numeric(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[bool]:
    """Which columns hold only numbers."""
    return [
        all(value is None or isinstance(value, int | float) for value in column)
        for column in (zip(*rows, strict=True) if rows else ((),) * len(headers))
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _formatted(values: Mapping[str, Any]) -> dict[str, str]:
    return {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in values.items()}


def _quantity(value: float, unit: str) -> str:
    number = _short(value)
    if unit != BYTES or number[-1].isdigit():
        return f"{number} {unit}"
    return f"{number[:-1]} {number[-1]}{unit}"


def _short(value: float) -> str:
    """12.3k, 4.56M; whole numbers below ten thousand as they are."""
    whole = value == int(value) and abs(value) < 10_000
    return str(int(value)) if whole else tqdm.format_sizeof(value)
