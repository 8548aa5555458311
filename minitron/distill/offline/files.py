"""The files of a store of teacher outputs.

    store.json          what was stored, of which teacher, tokenizer and data; bytes of every shard
    samples.npy         [n] the samples' keys, ascending: number of the stream · 2⁴⁰ + of the sample
    shards/00000.bin    `shard_samples` consecutive samples: blocks, a table of them, a footer
    recipe.yaml  manifest.json

A sample is a window of a token stream, and its place follows from its key alone. So neither the
order of training, nor its batches, nor how many ranks wrote or read the store means anything here.
Nothing is taken on trust: blocks, tables and `samples.npy` have checksums, and with each block is
one of the tokens that the teacher saw. A shard appears when it is whole, the manifest last: what
was killed goes on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from minitron import artifact
from minitron.errors import MinitronError
from minitron.sections.distill import FloatType

STORE, SAMPLES, SHARDS = "store.json", "samples.npy", "shards"
_VERSION = 2
_STREAM_BITS = 40

MAGIC = b"MTLOGIT1"
FOOTER = struct.Struct("<8sII")  # magic, number of blocks, checksum of the table
BLOCK = np.dtype([("offset", "<u8"), ("bytes", "<u4"), ("crc", "<u4"), ("tokens_crc", "<u4")])

Key = TypeVar("Key", int, NDArray[np.int64])

# What of a description may differ between two attempts at one store.
_INFORMATIVE = ("path", "shard_bytes")


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """Tokens that samples are windows of."""

    path: str
    fingerprint: str
    """`TokenStream.fingerprint`, in hexadecimal."""
    num_samples: int
    """Samples of the stream in the store."""
    num_windows: int
    """Samples that the stream holds."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What `store.json` says."""

    teacher: str
    """Fingerprint of the model directory."""
    tokenizer: str | None
    """Fingerprint of its tokenizer."""
    vocab_size: int
    """Rows of the teacher's table."""
    tokenizer_vocab_size: int | None
    """Tokens of its tokenizer; rows beyond them are padding."""
    seq_length: int
    top_k: int | None
    """Successors of each token, the most probable ones; None for draws."""
    draws: int | None
    temperature: float
    floats: FloatType
    precision: str
    """Of the teacher's weights and activations."""
    seed: int
    """Of the draws, and of the order in which samples were chosen."""
    samples_crc: int
    """Checksum of the keys."""
    shard_samples: int
    streams: tuple[StreamInfo, ...]
    shard_bytes: tuple[int, ...] = ()
    """Sizes of the shards; empty while the store is being written."""

    @property
    def num_samples(self) -> int:
        """Samples of all streams together."""
        return sum(stream.num_samples for stream in self.streams)

    @property
    def num_shards(self) -> int:
        """Files that the samples are in."""
        return -(-self.num_samples // self.shard_samples)


def sample_key(stream: Key, number: Key) -> Key:
    """Where the sample `number` of the store's stream `stream` stands in the order of all."""
    return stream << _STREAM_BITS | number


def split_key(key: Key) -> tuple[Key, Key]:
    """Invert `sample_key`."""
    return key >> _STREAM_BITS, key & ((1 << _STREAM_BITS) - 1)


def tokens_checksum(tokens: NDArray[np.integer]) -> int:
    """Checksum of a sample's inputs [s], whatever their dtype."""
    return zlib.crc32(tokens.astype("<i4").tobytes())


def shard_path(store: Path, number: int) -> Path:
    """Where a shard is."""
    return store / SHARDS / f"{number:05d}.bin"


def write_shard(path: Path, blocks: Sequence[tuple[bytes, int]]) -> None:
    """Write blocks, each with the checksum of its tokens; the file appears when it is whole.

    Raises:
        MinitronError: the system refuses.
    """
    table = np.zeros(len(blocks), BLOCK)
    sizes = np.array([len(block) for block, _ in blocks])
    table["offset"] = np.cumsum(sizes) - sizes
    table["bytes"] = sizes
    table["crc"] = [zlib.crc32(block) for block, _ in blocks]
    table["tokens_crc"] = [checksum for _, checksum in blocks]
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines(block for block, _ in blocks)
            file.write(table.tobytes())
            file.write(FOOTER.pack(MAGIC, len(blocks), zlib.crc32(table.tobytes())))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise MinitronError(
            f"{path} cannot be written ({error.strerror}); mend that and go on with --resume"
        ) from None


def write_info(directory: Path, info: StoreInfo) -> None:
    """Write `store.json`."""
    artifact.write_json(directory / STORE, {"version": _VERSION, **dataclasses.asdict(info)})


def read_info(directory: Path) -> StoreInfo:
    """Read `store.json`.

    Raises:
        MinitronError: there is none, or another version wrote it.
    """
    path = directory / STORE
    if not path.exists():
        raise MinitronError(
            f"{directory} is no store of teacher logits (it has no {STORE}); "
            "give the --out of launch/cache_logits.py"
        )
    content = artifact.read_json(path)
    version = content.pop("version", None) if isinstance(content, dict) else None
    if version != _VERSION:
        raise MinitronError(
            f"{path} has version {version}, known is {_VERSION}; write the store again"
        )
    try:
        streams = tuple(StreamInfo(**stream) for stream in content.pop("streams"))
        return StoreInfo(streams=streams, **content)
    except (TypeError, KeyError) as error:
        raise MinitronError(
            f"{path} is not what minitron wrote ({error}); restore it or write the store again"
        ) from None


def differences(old: StoreInfo, new: StoreInfo) -> list[str]:
    """What tells two stores apart, as `key: old -> new`."""
    before, after = (dict(_flatten(dataclasses.asdict(info))) for info in (old, new))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.rpartition(".")[2] not in _INFORMATIVE
    ]


def _flatten(tree: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _flatten(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, tuple) and tree and isinstance(tree[0], dict):
        for number, value in enumerate(tree):
            yield from _flatten(value, f"{key}.{number}")
    else:
        yield key, tree
