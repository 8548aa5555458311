"""Importance scores: what a few forward passes measured, kept on disk for any later target shape.

A score file holds full, topology-free tensors of a whole model under all nine ways to aggregate
activations, so one measurement serves every width, depth and aggregation, and pruning again needs
no forward pass. Its header names the model it was measured on, as does the manifest beside it;
scores of another model would prune at random and are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.sections.prune import Aggregation

SCORES_FILE = "scores.safetensors"
_MEASURED_ON = "measured_on"
"""The one entry of its header's metadata: safetensors writes several in no certain order."""

AGGREGATIONS: tuple[Aggregation, ...] = ("mean", "l2", "var")
"""How activations become one number, over the sequence and then over the samples: mean of absolute
values, root of the sum of squares, variance (divided by the count). Scores are stored in this
order."""


@dataclass(frozen=True, eq=False)
class Importance:
    """All that was measured of a model with L layers, fp32.

    The first dimension is the aggregation over samples, the second that over the sequence, both in
    the order of `AGGREGATIONS`.
    """

    hidden: Tensor
    """[3, 3, L, h] embedding channels, as each layer's norms see them."""
    ffn: Tensor
    """[3, 3, L, f] neurons of each MLP."""
    heads: Tensor
    """[3, 3, L, n] query heads of each attention."""
    query_groups: Tensor
    """[3, 3, L, g] key/value heads, by what the query heads that share them put out together."""
    block_influence: Tensor
    """[L] how far each layer turns the residual stream: 1 - cosine(input, output)."""

    @property
    def hidden_total(self) -> Tensor:
        """[3, 3, h] embedding channels in the whole network: the sum over its layers."""
        return self.hidden.double().sum(2).float()

    def scores(self, batch: Aggregation = "l2", sequence: Aggregation = "mean") -> ImportanceScores:
        """The scores under one aggregation over samples and one over the sequence."""
        at = AGGREGATIONS.index(batch), AGGREGATIONS.index(sequence)
        return ImportanceScores(
            hidden=self.hidden[at],
            ffn=self.ffn[at],
            heads=self.heads[at],
            query_groups=self.query_groups[at],
            block_influence=self.block_influence,
        )


@dataclass(frozen=True, eq=False)
class ImportanceScores:
    """Scores of a model with L layers, fp32; higher is more important."""

    hidden: Tensor
    """[L, h] embedding channels, as each layer's norms see them."""
    ffn: Tensor
    """[L, f] neurons of each MLP."""
    heads: Tensor
    """[L, n] query heads of each attention."""
    query_groups: Tensor
    """[L, g] key/value heads of each attention."""
    block_influence: Tensor
    """[L] how far each layer turns the residual stream: 1 - cosine(input, output)."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What scores were measured on, beside the model."""

    samples: int
    """Samples that went through the model."""
    tokenizer: str | None
    """Fingerprint of the model's tokenizer; None where it has none."""
    data: dict[str, str]
    """Fingerprint of each token file, by its path."""


def save_scores(
    directory: Path, importance: Importance, *, model_dir: Path, calibration: Calibration
) -> None:
    """Write `scores.safetensors` into an existing directory.

    Its tensors are the fields of `Importance`, and `hidden_total` for other readers of the file.
    Its header has the fingerprints of what was measured, and on what, but no path: equal scores of
    equal files are equal files, wherever these lie.
    """
    measured_on = {
        "model": artifact.fingerprint(model_dir),
        "tokenizer": calibration.tokenizer,
        "data": list(calibration.data.values()),
        "samples": calibration.samples,
    }
    tensors = {**vars(importance), "hidden_total": importance.hidden_total}
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(tensors, directory / SCORES_FILE, {_MEASURED_ON: json.dumps(measured_on)})


def load_scores(path: Path) -> Importance:
    """Read a score file, or the one in a directory.

    Raises:
        MinitronError: the file is missing or damaged, or is not a score file.
    """
    file = path / SCORES_FILE if path.is_dir() else path
    if not file.is_file():
        raise MinitronError(f"{file} does not exist; launch/importance.py writes it")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None
    tensors.pop("hidden_total", None)
    expected = [field.name for field in fields(Importance)]
    if sorted(tensors) != sorted(expected):
        raise MinitronError(
            f"{file} holds the tensors {', '.join(sorted(tensors)[:4])}, a score file holds "
            f"{', '.join(expected)}; give a file that launch/importance.py wrote"
        )
    for name, tensor in tensors.items():
        if name != "block_influence" and (tensor.dim() != 4 or tuple(tensor.shape[:2]) != (3, 3)):
            raise MinitronError(
                f"{file}: {name} has shape {list(tensor.shape)}, not [3, 3, layers, units]; "
                "measure the importance again"
            )
    return Importance(**{name: tensor.float() for name, tensor in tensors.items()})


def _unreadable(file: Path, error: Exception) -> MinitronError:
    return MinitronError(
        f"{file} is not a readable safetensors file ({error}); measure the scores again"
    )


def check_scores(scores: ImportanceScores, arch: Architecture) -> None:
    """Refuse scores that do not fit the model, or that say nothing about a part of it.

    Raises:
        MinitronError: a size differs from the model's, a score is NaN or infinite, or a layer's
            scores (or all block influences) are zero, as a hook that never fired leaves them.
    """
    layers = arch.num_layers
    shapes = {
        "hidden": (layers, arch.hidden_size),
        "ffn": (layers, arch.ffn_hidden_size),
        "heads": (layers, arch.num_attention_heads),
        "query_groups": (layers, arch.num_query_groups),
        "block_influence": (layers,),
    }
    for name, tensor in vars(scores).items():
        if tuple(tensor.shape) != shapes[name]:
            raise MinitronError(
                f"scores.{name} has shape {list(tensor.shape)}, the model needs "
                f"{list(shapes[name])}; measure the importance of this model"
            )
        rows = tensor if tensor.dim() == 2 else tensor[None]
        for problem, bad in (
            ("not finite", ~rows.isfinite().all(dim=1)),
            ("all zero", (rows == 0).all(dim=1)),
        ):
            if bad.any():
                where = f" of layer {int(bad.nonzero()[0]) + 1}" if tensor.dim() == 2 else ""
                raise MinitronError(
                    f"scores.{name}{where} are {problem}; the model or the calibration data is "
                    "broken: evaluate the model, then measure the importance again"
                )


def check_origin(scores_path: Path, model_dir: Path) -> None:
    """Refuse scores of another model: their manifest and the header of their file name theirs.

    Raises:
        MinitronError: a fingerprint differs, or there is none.
    """
    directory = scores_path if scores_path.is_dir() else scores_path.parent
    manifest = artifact.read_manifest(directory) or {}
    measured_on = []
    if parent := manifest.get("parents", {}).get("model"):
        measured_on.append((parent["path"], parent["fingerprint"]))
    if (named := _model_in_header(scores_path)) is not None:
        measured_on.append(("another", named))
    if not measured_on:
        raise MinitronError(
            f"{directory} does not say which model its scores are of; restore their "
            f"{artifact.MANIFEST}, or measure the importance of {model_dir}"
        )
    fingerprint = artifact.fingerprint(model_dir)
    for path, other in measured_on:
        if other != fingerprint:
            raise MinitronError(
                f"scores belong to another model: {scores_path} was measured on {path} "
                f"({other}), not on {model_dir} ({fingerprint}); measure the importance of this "
                "model"
            )


def _model_in_header(scores_path: Path) -> str | None:
    """Fingerprint of the model that a score file says it is of, if there is a file and it does."""
    file = scores_path / SCORES_FILE if scores_path.is_dir() else scores_path
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(file, error) from None
    return json.loads(metadata[_MEASURED_ON])["model"] if _MEASURED_ON in metadata else None


def top_indices(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row, in ascending order.

    A tie goes to the lower position, so the choice is the same everywhere. Ascending positions keep
    the order of the source: what is kept stays comparable with it, and a run of neighbours is one
    contiguous read.

    Args:
        scores: [..., n].
        count: at most n.

    Returns:
        [..., count] int64.
    """
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"cannot keep {count} of {scores.shape[-1]}")
    ranked = scores.sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., :count].sort(dim=-1).values
