"""Compare runs: one HTML page with plots, and the same table as Markdown and on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Compare runs on one page: report.py RUN_DIR... --out report.html."""

    runs: list[Path] = field(default_factory=list)
    """Directories that stages wrote (their --out); also plain arguments, in the order to show."""
    out: Path = Path("report.html")
    """The page; the table is written beside it as Markdown. Older ones are replaced."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise MinitronError(
                "no run directory is given; name one or more: report.py RUN_DIR... --out FILE.html"
            )


def with_named_runs(arguments: Sequence[str]) -> list[str]:
    """Put `--runs` before every argument that is neither a key nor a key's value."""
    named: list[str] = []
    previous = ""
    for argument in arguments:
        is_value = previous.startswith("--") and "=" not in previous
        if not argument.startswith("-") and not is_value:
            named.append("--runs")
        named.append(argument)
        previous = argument
    return named


if __name__ == "__main__":
    sys.argv[1:] = with_named_runs(sys.argv[1:])
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron.metrics import launch_rank
from minitron.report.page import write_report


def main(recipe: Recipe) -> None:
    """Write the page and print its table."""
    if launch_rank():
        return  # under torchrun one rank is enough
    table = write_report(recipe.runs, recipe.out)
    print(f"{table.text()}\n\nwrote {recipe.out} and {recipe.out.with_suffix('.md')}")


if __name__ == "__main__":
    run(main, recipe)
