"""What a stage left on disk, read back.

A run directory is any directory that holds a `manifest.json` or a `metrics.jsonl`: a training run
(finished or not), a pruned model, an evaluation, importance scores. A run may still be writing, so
the last line of its metrics may be half a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minitron import artifact
from minitron.errors import MinitronError
from minitron.metrics import METRICS, read_metrics

EVALUATION = "eval.json"
SCORES = "scores.safetensors"

Curve: TypeAlias = dict[str, NDArray[np.float64]]
"""Columns of equal length; NaN where a line lacks the value."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory."""

    path: Path
    name: str
    """The directory's name, with as many parents as it takes to be unique in the report."""
    stage: str
    finished: bool
    recipe: Mapping[str, Any] = field(default_factory=dict)
    parents: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Role -> path and fingerprint."""
    command: Sequence[str] = ()
    """The launch script and its arguments; empty while the run is not finished."""
    ranks: int = 1
    """Ranks that ran it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str | None = None
    """When the run was complete, UTC."""
    num_parameters: int | None = None
    training: Curve | None = None
    """step, tokens, loss, kl and tokens_per_second of every optimizer step."""
    validation: Curve | None = None
    """step, tokens and val_loss of every validation."""
    evaluation: Mapping[str, float] | None = None
    """lm_loss, perplexity and tokens."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """before and after, and tokens, of a stage without curves: of a pruned model its source's loss
    and its own; of a search the winner's right after pruning and in the end."""
    check_data: Mapping[str, Any] | None = None
    """path, seq_length and samples that a pruned model's losses were measured on."""
    scores: Mapping[str, NDArray[np.float32]] | None = None
    """hidden [L, h], ffn [L, f], heads [L, n] and block_influence [L]."""

    @property
    def status(self) -> str:
        """The stage, and whether it is still to finish."""
        return self.stage if self.finished else f"{self.stage}, unfinished"

    @property
    def validation_data(self) -> str | None:
        """What the losses were measured on; losses on different data do not compare."""
        data = self.check_data or self.recipe.get("data") or {}
        paths = data.get("path" if self.evaluation or self.check_data else "valid_path")
        if not paths:
            return None
        text = ", ".join(map(str, paths)) if isinstance(paths, list) else str(paths)
        samples = None if self.evaluation else data.get("samples", data.get("valid_samples"))
        first = f"the first {samples:,} samples of " if samples else ""
        length = f", sequences of {data['seq_length']:,}" if "seq_length" in data else ""
        return first + text + length


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories; one that is named twice is read once.

    Raises:
        MinitronError: a path is no run directory, or a file in it is damaged.
    """
    unique = list(dict.fromkeys(path.resolve() for path in paths))
    return [read_run(path, name) for path, name in _distinct_names(unique).items()]


def read_run(path: Path, name: str) -> Run:
    """Read one run directory and call it `name`.

    Raises:
        MinitronError: it is no run directory, or a file in it is damaged.
    """
    if not path.is_dir():
        raise MinitronError(f"{path} is not a directory; give the --out directories of stages")
    manifest = artifact.read_manifest(path)
    has_metrics = (path / METRICS).exists()
    if manifest is None and not has_metrics:
        raise MinitronError(
            f"{path} is not a run directory: it has neither {artifact.MANIFEST} nor {METRICS}; "
            "give the --out directories of stages"
        )
    finished = manifest is not None
    if manifest is None:
        manifest = {"recipe": _read_recipe(path / artifact.RECIPE)}
    recipe, results = manifest.get("recipe", {}), manifest.get("metrics", {})
    records = read_metrics(path / METRICS) if has_metrics else []
    return Run(
        path=path,
        name=name,
        # An unfinished run has no manifest yet; of those that train, distillations name a teacher.
        stage=manifest.get("stage") or ("distill" if "teacher" in recipe else "train"),
        finished=finished,
        recipe=recipe,
        parents=manifest.get("parents", {}),
        command=manifest.get("command", ()),
        ranks=manifest.get("ranks", 1),
        versions=manifest.get("versions", {}),
        created=manifest.get("created"),
        num_parameters=results.get("num_parameters"),
        training=_curve(records, "loss", "kl", "tokens_per_second"),
        validation=_curve(records, "val_loss"),
        evaluation=_read_evaluation(path / EVALUATION),
        losses=_losses(manifest.get("stage"), results),
        check_data=results.get("lm_loss_data"),
        scores=_read_scores(path / SCORES),
    )


def _distinct_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Call each of several absolute paths by the fewest last parts that no other ends in."""
    names = {}
    for path in paths:
        length = 1
        while sum(path.parts[-length:] == other.parts[-length:] for other in paths) > 1:
            length += 1
        names[path] = "/".join(path.parts[-length:])
    return names


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        recipe = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise MinitronError(f"{path} is not valid YAML ({reason})") from None
    return recipe if isinstance(recipe, dict) else {}


def _curve(records: Sequence[Mapping[str, Any]], key: str, *more: str) -> Curve | None:
    """Columns of the records that have `key`, or None where none has it."""
    rows = [record for record in records if key in record]
    if not rows:
        return None
    return {
        column: np.array([_number(row.get(column)) for row in rows])
        for column in ("step", "tokens", key, *more)
    }


def _losses(stage: str | None, results: Mapping[str, Any]) -> dict[str, float]:
    """What the manifest of a stage without curves says of losses."""
    found: dict[str, Any] = {}
    if stage == "prune":
        checked = results.get("lm_loss", {})
        found = {"before": checked.get("source"), "after": checked.get("student")}
    elif stage == "search":
        found = {"before": results.get("pruned_loss"), "after": results.get("val_loss")}
        found["tokens"] = results.get("tokens")
    return {name: _number(value) for name, value in found.items() if value is not None}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


def _read_evaluation(path: Path) -> dict[str, float] | None:
    if not path.exists():
        return None
    values = artifact.read_json(path)
    keys = ("lm_loss", "perplexity", "tokens")
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise MinitronError(f"{path} lacks {', '.join(missing)}; run eval.py again")
    return {key: _number(values[key]) for key in keys}


def _read_scores(path: Path) -> dict[str, NDArray[np.float32]] | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MinitronError(f"{path} is damaged ({error}); run importance.py again") from None
    names = ("hidden", "ffn", "heads", "block_influence")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise MinitronError(f"{path} lacks {', '.join(missing)}; run importance.py again")
    # Units are stored under all aggregations, [3, 3, L, c]; shown is what pruning takes by default,
    # the mean over the sequence and then L2 over samples.
    shown = {name: tensors[name][1, 0] for name in ("hidden", "ffn", "heads")}
    return {**shown, "block_influence": tensors["block_influence"]}
