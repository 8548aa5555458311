"""Writing Megatron's `.bin/.idx` token files: complete or absent, with a record of their making.

`PREFIX.json` beside them tells which tokenizer made them, from what, and whether documents begin
with prompts. Files get their names when they are complete, the `.idx` last.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron import artifact
from minitron.data.tokenizer import Tokenizer

Document = Sequence[NDArray[np.int32]]
"""A document's tokens: of all of it, or of a prompt and of the response to it."""


def write_token_files(
    prefix: Path, documents: Iterable[Document], tokenizer: Tokenizer, **record: Any
) -> dict[str, Any]:
    """Write documents into `PREFIX.bin`, `PREFIX.idx` and the record `PREFIX.json`.

    Args:
        prefix: where the files go; older ones are replaced.
        documents: in the order of the files.
        tokenizer: of the tokens.
        record: what else the record is to hold.

    Returns:
        The record.
    """
    # Here and not above: processes that tokenise import this module and need nothing of these.
    from minitron import platform  # noqa: F401  before megatron.core

    # isort: split
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{prefix.name}.", suffix=".partial", dir=prefix.parent
    ) as directory:
        partial = Path(directory) / prefix.name
        dtype = DType.optimal_dtype(tokenizer.vocab_size)
        builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
        counts = {"documents": 0, "tokens": 0, "prompts": 0}
        try:
            for parts in documents:
                builder.add_document(np.concatenate(parts), [len(part) for part in parts])
                counts["documents"] += 1
                counts["tokens"] += sum(len(part) for part in parts)
                counts["prompts"] += len(parts) - 1
            builder.finalize(f"{partial}.idx")
        finally:
            builder.data_file.close()
        made = {"tokenizer": _description(tokenizer), **counts, **record}
        artifact.write_json(Path(f"{partial}.json"), made)
        # An old index must never stand beside new data.
        Path(f"{prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".json", ".idx"):
            os.replace(f"{partial}{suffix}", f"{prefix}{suffix}")
    return made


def _description(tokenizer: Tokenizer) -> Mapping[str, Any]:
    return {
        "path": str(tokenizer.path),
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }
