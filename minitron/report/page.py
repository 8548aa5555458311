"""The HTML page: one file without network access, for a laptop, a phone and a printer."""

from __future__ import annotations

import html
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import yaml

from minitron import artifact
from minitron.errors import MinitronError
from minitron.report import plots
from minitron.report.runs import Run, read_runs
from minitron.report.style import CSS
from minitron.report.table import Table

_BANDS = "bands hold the middle 50% and 90% of each layer's scores, lines their median"


def write_report(run_dirs: Sequence[Path], out: Path) -> Table:
    """Write the page `out` and the same table as Markdown beside it; return the table.

    A report is a view: an older one is replaced, by a whole file or not at all.

    Raises:
        MinitronError: a directory is no run, a file in it is damaged, or matplotlib is missing.
    """
    if out.suffix != ".html":
        raise MinitronError(
            f"--out {out} must end in .html; the Markdown table is written beside it"
        )
    if out.is_dir():
        raise MinitronError(
            f"--out {out} is a directory; give a file name such as {out}/report.html"
        )
    plots.require_matplotlib()
    runs = read_runs(run_dirs)
    table = Table(runs)
    artifact.create_directory(out.parent)
    for path, text in ((out.with_suffix(".md"), table.markdown()), (out, render(runs, table))):
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return table


def render(runs: Sequence[Run], table: Table) -> str:
    """The whole page as text."""
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    trained = [
        run for run in runs if run.training or run.validation
    ]  # in the order of their colors
    labels = table.labels()
    scored = [run for run in runs if run.scores is not None]
    sections = [
        _section("Results", table.html() if table.rows else ""),
        _section(
            "Validation loss",
            _figure(plots.validation_figure(trained, [labels[run.name] for run in trained])),
        ),
        _section(
            "Training",
            _grid(
                _figure(plots.training_figure(run, color), caption=run.name + _note(run))
                for color, run in enumerate(trained)
            ),
        ),
        _section(
            "Importance",
            "\n".join(
                _figure(plots.scores_figure(run), caption=f"{run.name}; {_BANDS}") for run in scored
            ),
        ),
        _section("Runs", "\n".join(map(_article, runs))),
    ]
    body = "\n".join(section for section in sections if section)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>minitron report</title>
<style>
{CSS}</style>
</head>
<body>
<header>
<h1>minitron report</h1>
<p class="muted">{len(runs)} run{"s" * (len(runs) != 1)}, written {written}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _section(title: str, content: str) -> str:
    """A titled section; nothing where there is nothing to show."""
    if not content:
        return ""
    name = title.lower().replace(" ", "-")
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{title}</h2>\n{content}\n</section>'
    )


def _note(run: Run) -> str:
    """What explains a KL below zero."""
    if run.training is None or not (run.training["kl"] < 0).any():
        return ""
    return "; a KL estimated from draws of the teacher may be below zero"


def _figure(svg: str | None, *, caption: str = "") -> str:
    if svg is None:
        return ""
    text = f"<figcaption>{html.escape(caption)}</figcaption>\n" if caption else ""
    return f"<figure>\n{text}{svg}</figure>"


def _grid(items: Iterable[str]) -> str:
    content = "\n".join(filter(None, items))
    return content and f'<div class="grid">\n{content}\n</div>'


def _article(run: Run) -> str:
    """Where one run comes from, and the command that ran it."""
    rows = "\n".join(
        f"<dt>{html.escape(term)}</dt><dd>{html.escape(text)}</dd>" for term, text in _facts(run)
    )
    command = recipe = ""
    if run.command:
        command = f"<pre>{html.escape(shlex.join(run.command))}</pre>\n"
    if run.recipe:
        text = html.escape(yaml.safe_dump(dict(run.recipe), sort_keys=False))
        recipe = f"<details><summary>Recipe</summary><pre>{text}</pre></details>\n"
    status = f'<span class="muted">{html.escape(run.status)}</span>'
    return (
        f"<article>\n<h3>{html.escape(run.name)} {status}</h3>\n"
        f"<dl>\n{rows}\n</dl>\n{command}{recipe}</article>"
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [("directory", str(run.path))]
    if run.created:
        facts.append(("finished", run.created))
    if run.ranks > 1:
        facts.append(("ranks", f"{run.ranks:,}"))
    if run.num_parameters is not None:
        facts.append(("parameters", f"{run.num_parameters:,}"))
    if run.training is not None:
        facts.append(("steps", f"{run.training['step'][-1]:,.0f}"))
        speed = run.training["tokens_per_second"]
        if np.isfinite(speed).any():
            facts.append(("tokens/s", f"{np.nanmedian(speed):,.0f} (median of the steps)"))
    if run.evaluation is not None:
        facts += [
            ("LM loss", f"{run.evaluation['lm_loss']:.4f} nats per token"),
            ("perplexity", f"{run.evaluation['perplexity']:.2f}"),
            ("evaluated on", f"{run.evaluation['tokens']:,.0f} tokens"),
        ]
    for role, parent in run.parents.items():
        facts.append((role, f"{parent['path']} ({parent['fingerprint']})"))
    if run.versions:
        facts.append(("versions", ", ".join(f"{k} {v}" for k, v in run.versions.items())))
    return facts
