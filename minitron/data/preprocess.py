"""Text to token files: parallel, in order, complete or absent.

Documents are tokenised by worker processes and written by this one, in the order of the files, so
that the result does not depend on the number of workers. Each ends with the tokenizer's EOD. One
with a prompt is two sequences of the index; the record then says that there are prompts.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from minitron import artifact
from minitron.data.indexed import as_prefix
from minitron.data.text import TEXT_FORMS, RawDocument, find_files, read_raw
from minitron.data.token_files import Document, write_token_files
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.metrics import BYTES, Progress, log, progress
from minitron.sections.data import DEFAULT_WORKERS

CACHE_VARIABLE = "MINITRON_CACHE"

# Part of a cache entry's name; changes whenever the same text would give other files.
_FORMAT = 1
_CHUNK_BYTES = 1 << 20
# A worker takes seconds to start; less text than this is tokenised sooner without it.
_MIN_BYTES_PER_WORKER = 16 << 20


def preprocess(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    prefix: Path,
    *,
    workers: int = DEFAULT_WORKERS,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tokenise text into `PREFIX.bin`, `PREFIX.idx` and the record `PREFIX.json`.

    Documents without text are left out.

    Args:
        paths: `.txt` and `.jsonl` files and directories of them, in the order of the result.
        tokenizer: encodes the documents; its EOD ends each.
        prefix: where the files go.
        workers: most processes to use; fewer where there are fewer cores or little text.
        overwrite: replace existing files.

    Returns:
        The record.

    Raises:
        MinitronError: there is no text, a document cannot be decoded, or the files exist.
    """
    check_free(prefix, overwrite=overwrite)
    files = [file for path in paths for file in find_files(path)]
    return _preprocess(files, _hashes(files), tokenizer, prefix, workers)


def check_free(prefix: Path, *, overwrite: bool) -> None:
    """Refuse a prefix that is a directory, or whose token files exist, unless `overwrite`."""
    if prefix.is_dir():
        raise MinitronError(
            f"--out {prefix} is a directory; give the common part of the files' paths, "
            f"such as {prefix / 'train'}"
        )
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if path.exists() and not overwrite:
            raise MinitronError(f"{path} exists; choose another --out or add --overwrite")


def tokenised_prefix(
    path: Path | str,
    tokenizer: Tokenizer | None,
    *,
    cache_dir: Path | None = None,
    workers: int = DEFAULT_WORKERS,
) -> Path:
    """The prefix of the token files that `path` names, or that its text is tokenised into, once.

    Text goes into a cache, whose entries are named by the content of the files and the tokenizer.
    One process calls this.

    Args:
        path: the prefix of a `.bin/.idx` pair, its `.bin`, or text as `preprocess` takes it.
        tokenizer: for text; None is enough for token files.
        cache_dir: the directory $MINITRON_CACHE, or ~/.cache/minitron/data, if None.
        workers: see `preprocess`.

    Raises:
        MinitronError: there is no data at `path`, or it cannot be tokenised.
    """
    path, prefix = Path(path), as_prefix(path)
    pair = [Path(f"{prefix}{suffix}").exists() for suffix in (".bin", ".idx")]
    if path != prefix or all(pair) or (any(pair) and not path.exists()):
        return prefix  # what is missing of the pair is for TokenStream to say
    if not path.exists():
        raise MinitronError(
            f"{path} does not exist; data is {TEXT_FORMS}, or the prefix of a .bin/.idx pair"
        )
    files = find_files(path)
    if tokenizer is None:
        raise MinitronError(
            f"{path} is text, but there is no tokenizer to encode it; give a model directory that "
            "holds its tokenizer, or data tokenised by launch/preprocess.py"
        )
    hashes = _hashes(files)
    key = hashlib.sha256(f"{_FORMAT}:{tokenizer.fingerprint}:{tokenizer.eod}".encode())
    for file, digest in zip(files, hashes, strict=True):
        key.update(f":{file.suffix}:{digest}".encode())
    cached = (cache_dir or _default_cache()) / key.hexdigest()[:24]
    if Path(f"{cached}.idx").exists():
        log(f"{path}: tokenised before, in {cached}.bin")
    else:
        _preprocess(files, hashes, tokenizer, cached, workers)
    return cached


def check_tokenizer(prefix: Path, tokenizer: Tokenizer) -> None:
    """Refuse token files whose record names another tokenizer; files without a record pass.

    Raises:
        MinitronError: the tokenizers differ.
    """
    path = Path(f"{prefix}.json")
    if not path.exists():
        return
    record = artifact.read_json(path)
    made_by = record.get("tokenizer") if isinstance(record, dict) else None
    if not isinstance(made_by, dict) or "fingerprint" not in made_by:
        return  # somebody else's file
    if made_by["fingerprint"] != tokenizer.fingerprint:
        raise MinitronError(
            f"{prefix}.bin was tokenised with {made_by.get('path')} ({made_by['fingerprint']}), "
            f"but the model's tokenizer is {tokenizer.path} ({tokenizer.fingerprint}); "
            "tokenise the text again with the model's tokenizer"
        )


def _default_cache() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "minitron" / "data"


def _hashes(files: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(artifact.sha256, files))


def _preprocess(
    files: Sequence[Path], hashes: Sequence[str], tokenizer: Tokenizer, prefix: Path, workers: int
) -> dict[str, Any]:
    sizes = [file.stat().st_size for file in files]
    workers = min(workers, os.cpu_count() or 1, sum(sizes) // _MIN_BYTES_PER_WORKER)
    sources = [
        {"path": str(file), "bytes": size, "sha256": digest}
        for file, size, digest in zip(files, sizes, hashes, strict=True)
    ]
    documents = _documents(files, sum(sizes), tokenizer, workers)
    try:
        return write_token_files(prefix, documents, tokenizer, sources=sources)
    except OSError as error:
        raise MinitronError(
            f"tokenising into {prefix}.bin failed ({error}); check free space and permissions there"
        ) from None
    except BrokenProcessPool:
        raise MinitronError(
            f"one of {workers} tokenising processes was killed, most often for want of memory; "
            "lower data.workers"
        ) from None


def _documents(
    files: Sequence[Path], num_bytes: int, tokenizer: Tokenizer, workers: int
) -> Iterator[Document]:
    bar: Progress
    empty = True
    with progress(total=num_bytes, desc="tokenising", unit=BYTES) as bar:
        for documents, done_bytes in _encode_all(files, tokenizer, workers):
            yield from documents
            empty = empty and not documents
            bar.update(done_bytes)
    if empty:
        raise MinitronError(
            f"{files[0]}{' and the other files hold' if files[1:] else ' holds'} no text; "
            f"give {TEXT_FORMS}"
        )


Encoded = tuple[list[Document], int]
"""The tokens of some documents, and the bytes that they took in their files."""


def _encode_all(files: Sequence[Path], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Tokenise all documents, in order, a chunk of them at a time."""
    chunks = _chunks(read_raw(files))
    if workers <= 1:
        for chunk in chunks:
            yield _encode(tokenizer, chunk)
        return
    # Spawned, for a fork of a process that runs threads (torch, gloo) may deadlock.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer,),
    ) as pool:
        pending: deque[Future[Encoded]] = deque()
        for chunk in chunks:
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) == 4 * workers:  # bounds what is read ahead
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _chunks(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    """Group consecutive documents into about 1 MiB, enough to outweigh sending them."""
    chunk: list[RawDocument] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.data)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    yield chunk


def _encode(tokenizer: Tokenizer, chunk: Sequence[RawDocument]) -> Encoded:
    documents: list[Document] = []
    for parts in (document.parts() for document in chunk):
        if any(parts):
            tokens = [tokenizer.encode(part) for part in parts]
            tokens[-1].append(tokenizer.eod)
            documents.append([np.array(part, dtype=np.int32) for part in tokens])
    return documents, sum(len(document.data) for document in chunk)


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(chunk: Sequence[RawDocument]) -> Encoded:
    return _encode(_worker_tokenizer, chunk)
