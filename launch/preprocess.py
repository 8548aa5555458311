"""Tokenise text into the `.bin/.idx` files that training reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minitron.errors import MinitronError
from minitron.sections.data import SourceConfig
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class TokenizerSource:
    """The tokenizer to use, or the one to train."""

    path: Path | None = None
    """A directory that holds one, a Hugging Face tokenizer.json, or a sentencepiece .model."""
    train_vocab_size: int | None = None
    """Instead of a path: train a sentencepiece BPE of so many pieces on `data`, and write it to the
    directory `out`.tokenizer."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.train_vocab_size is None):
            given = "both were given" if self.path is not None else "neither was given"
            raise MinitronError(
                f"give either --tokenizer.path or --tokenizer.train_vocab_size; {given}"
            )
        if self.train_vocab_size is not None and self.train_vocab_size < 1:
            raise MinitronError(
                f"tokenizer.train_vocab_size={self.train_vocab_size} must be at least 1"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Tokenise text into a .bin/.idx pair, each document followed by the tokenizer's EOD.

    Every stage also takes text directly; this one is for text that is used often, or large.
    """

    data: SourceConfig
    """The text."""
    tokenizer: TokenizerSource
    """The tokenizer."""
    out: Path
    """Common path of the files to write: `out`.bin, `out`.idx, and their record `out`.json."""
    overwrite: bool = False
    """Replace the files, and the trained tokenizer, if they exist."""
    seed: int = 1234
    """Has no effect: nothing here is random. Every stage accepts it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Has no effect: tokens are integers. Every stage accepts it."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, config
from minitron.data.indexed import as_prefix
from minitron.data.preprocess import check_free, preprocess
from minitron.data.text import find_files, read_raw
from minitron.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from minitron.metrics import launch_rank, log


def main(recipe: Recipe) -> None:
    """Tokenise, after training the tokenizer if that is asked for."""
    if launch_rank() != 0:
        return  # one process writes; it starts its own workers
    prefix = as_prefix(recipe.out)
    check_free(prefix, overwrite=recipe.overwrite)
    paths = [Path(path) for path in recipe.data.path]
    record = preprocess(
        paths,
        _tokenizer(recipe, paths, prefix),
        prefix,
        workers=recipe.data.workers,
        overwrite=recipe.overwrite,
    )
    print(
        f"wrote {prefix}.bin and {prefix}.idx: {record['documents']} documents, "
        f"{record['tokens']} tokens"
    )


def _tokenizer(recipe: Recipe, paths: list[Path], prefix: Path) -> Tokenizer:
    if recipe.tokenizer.path is not None:
        return load_tokenizer(recipe.tokenizer.path)
    assert recipe.tokenizer.train_vocab_size is not None
    out = Path(f"{prefix}.tokenizer")
    files = [file for path in paths for file in find_files(path)]
    with artifact.publish(out, overwrite=recipe.overwrite) as directory:
        log(f"training a tokenizer of {recipe.tokenizer.train_vocab_size} pieces")
        texts = (text for document in read_raw(files) for text in document.parts())
        train_sentencepiece(texts, recipe.tokenizer.train_vocab_size, directory)
        artifact.write_manifest(
            directory, stage="preprocess", recipe=config.to_dict(recipe), parents={}
        )
    print(f"wrote {out}")
    return load_tokenizer(out)


if __name__ == "__main__":
    run(main, recipe)
