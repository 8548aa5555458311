"""Whether what stages left is what they would make now, of what is there now.

For a sequence of stages of which each reads what those before it left, to go on behind the last one
that is complete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minitron import artifact
from minitron.data.batches import open_train, open_windows, prepare_data
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError, saying
from minitron.train.run import content, recipe_changes

# What may be another without another result. Paths are compared by what they hold.
_FREE_KEYS = ("model.path", "scores.path", "student.path", "teacher.path", "allow_change", "check")


def count_complete(recipes: Sequence[Any], tokenizer: Tokenizer | None, *, vocab_size: int) -> int:
    """How many stages are complete, each made as its recipe says, of what is there now.

    Args:
        recipes: of the stages, in order.
        tokenizer: of all their models; None is enough where all data is tokenised.
        vocab_size: rows of all their models' embedding tables.

    Raises:
        MinitronError: one was made otherwise, or of something else, or lacks those before it.
    """
    complete = 0
    for number, recipe in enumerate(recipes):
        if manifest := artifact.read_manifest(recipe.out):
            if complete < number:
                raise MinitronError(
                    f"{recipe.out} is complete, but {recipes[complete].out}, which it was made of, "
                    "is not; restore that, or delete what follows from it"
                )
            _check_made(recipe, manifest, tokenizer, vocab_size)
            complete += 1
    return complete


def _check_made(
    recipe: Any, manifest: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> None:
    remedy = f"delete {recipe.out} and what follows from it, or choose another --out"
    if differing := recipe_changes(manifest["recipe"], recipe, apart_from=_FREE_KEYS):
        raise MinitronError(
            f"{recipe.out} is complete, and was made with another recipe: {'; '.join(differing)}; "
            f"take the old values, {remedy}"
        )
    for role, parent in manifest["parents"].items():
        path = getattr(recipe, role).path
        if path is not None and artifact.fingerprint(path) != parent["fingerprint"]:
            raise MinitronError(
                f"{recipe.out} is complete, and was made of another {role} than {path} holds now; "
                f"{remedy}"
            )
    with saying(f"{recipe.out} is complete, but what it was made of cannot be compared"):
        read = list(_data_read(recipe, manifest, tokenizer, vocab_size))
    for role, before, now in read:
        if before != now:
            raise MinitronError(
                f"{recipe.out} is complete, and was made with another content of {role} than there "
                f"is now; {remedy}"
            )


def _data_read(
    recipe: Any, manifest: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int
) -> Iterator[tuple[str, Any, Any]]:
    """What a stage read beside models, with its fingerprint then and now."""
    calibration, inputs = manifest["metrics"].get("calibration"), recipe.out / artifact.INPUTS
    if calibration:
        yield "the tokenizer", calibration["tokenizer"], tokenizer and tokenizer.fingerprint
        data = prepare_data(recipe.data, tokenizer, vocab_size=vocab_size)
        now = {prefix: artifact.fingerprint(Path(f"{prefix}.bin")) for prefix in data.path}
        yield _named("path", recipe), [*calibration["data"].values()], [*now.values()]
    if inputs.exists():
        data = prepare_data(recipe.data, tokenizer, vocab_size=vocab_size)
        before = artifact.read_json(inputs)
        streams = {
            "path": open_train(data).datasets,
            "valid_path": open_windows(data.valid_path, data.seq_length),
        }
        for key, windows in streams.items():
            if windows:
                yield _named(key, recipe), before.get(f"data.{key}"), content(windows)


def _named(key: str, recipe: Any) -> str:
    return f"data.{key}={' '.join(getattr(recipe.data, key))}"
