"""Reading Megatron's `.bin/.idx` token files, and believing nothing that they say.

A `.bin` is the tokens of all documents, one after the other; the `.idx` beside it tells their
dtype, the length and byte position of every sequence, and where documents start. megatron-core's
own reader takes the index at its word: a wrong pointer gives it other tokens, a truncated `.bin`
uninitialised memory, and an array that outlives its dataset a segmentation fault. Here opening a
file proves that index and data agree, and every array handed out is a copy.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron import artifact
from minitron.errors import MinitronError
from minitron.metrics import progress

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
# magic, version, dtype code, number of sequences, number of document boundaries
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 22
# A scan of more tokens than this takes long enough to show how far it is.
_LONG_SCAN = 1 << 30
# Pieces of a stream that its fingerprint reads, and tokens of each.
_PIECES, _PIECE = 64, 4096


def as_prefix(path: Path | str) -> Path:
    """The prefix of a pair of files, given as that, as the `.bin`, or as the `.idx`."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


class TokenStream:
    """All tokens of a `.bin/.idx` pair as one sequence, in file order.

    Args:
        prefix: the common path of the two files, without `.bin` or `.idx`.

    Raises:
        MinitronError: a file is missing, empty or damaged, or the two do not fit.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = as_prefix(prefix)
        self._bin, self._idx = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        for path, other in ((self._bin, self._idx), (self._idx, self._bin)):
            if not path.exists():
                raise MinitronError(
                    f"{path} does not exist; tokenised data is a pair of files, "
                    f"{path.name} and {other.name}"
                )
        self._read_index()
        self._check_sequences()
        self._check_documents()
        self._tokens = np.memmap(self._bin, self.dtype, "r", shape=(self.num_tokens,))

    @property
    def num_documents(self) -> int:
        """Documents in the file, empty ones included."""
        return len(self._documents) - 1

    @functools.cached_property
    def fingerprint(self) -> int:
        """A number below 2^63 that identifies the tokens, whatever their path, dtype and documents.

        Made of their number and of pieces spread evenly, so that it costs the same for any file:
        streams that agree in all pieces and differ between them are not told apart.
        """
        digest = hashlib.blake2b(f"{self.num_tokens}".encode(), digest_size=8)
        last = max(self.num_tokens - _PIECE, 0)
        for start in sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)}):
            tokens = self.read(start, min(start + _PIECE, self.num_tokens))
            digest.update(tokens.astype("<i8").tobytes())
        return int.from_bytes(digest.digest(), "little") >> 1

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """A copy of the tokens [start, stop)."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise ValueError(f"[{start}, {stop}) is not within {self.num_tokens} tokens")
        return self._tokens[start:stop].astype(np.int64)

    def is_prompt(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Which of the tokens [start, stop) belong to prompts, which are read but not learnt.

        Where `PREFIX.json` says that documents begin with prompts, the prompt is the first sequence
        of a document of several.
        """
        found = np.zeros(stop - start, bool)
        if not self._record.get("prompts"):
            return found
        size = self.dtype.itemsize
        first, last = np.searchsorted(self._pointers, [start * size, stop * size - 1], side="right")
        for sequence in range(int(first) - 1, int(last)):
            document = int(np.searchsorted(self._documents, sequence, side="right")) - 1
            boundaries = self._documents[document : document + 2]
            if sequence == boundaries[0] and boundaries[1] - boundaries[0] > 1:
                begin = int(self._pointers[sequence]) // size - start
                found[max(begin, 0) : max(begin + int(self._lengths[sequence]), 0)] = True
        return found

    @property
    def origin(self) -> str:
        """What to say of the text that the tokens were, which a name in the cache does not tell."""
        sources = [source["path"] for source in self._record.get("sources", ())]
        more = f" and {len(sources) - 1} more" if sources[1:] else ""
        return f" (of {sources[0]}{more})" if sources else ""

    @functools.cached_property
    def _record(self) -> dict[str, Any]:
        path = Path(f"{self.prefix}.json")
        record = artifact.read_json(path) if path.exists() else None
        return record if isinstance(record, dict) else {}

    def check_ids(self, vocab_size: int) -> None:
        """Refuse token ids that a model with `vocab_size` embeddings cannot look up.

        Reads the whole file, unless its dtype cannot hold such an id.

        Raises:
            MinitronError: an id is negative, or `vocab_size` or above.
        """
        limits = np.iinfo(self.dtype)
        if limits.min == 0 and limits.max < vocab_size:
            return
        starts = range(0, self.num_tokens, _CHUNK)
        is_long = self.num_tokens > _LONG_SCAN
        for start in progress(starts, desc=f"checking {self._bin}", unit="chunks", enabled=is_long):
            chunk = self._tokens[start : start + _CHUNK]
            if chunk.max() >= vocab_size or chunk.min() < 0:
                self._refuse_id(start, chunk, vocab_size)

    def _refuse_id(self, start: int, chunk: NDArray[np.integer], vocab_size: int) -> None:
        offset = int(np.flatnonzero((chunk >= vocab_size) | (chunk < 0))[0])
        position = start + offset
        byte = position * self.dtype.itemsize
        sequence = int(np.searchsorted(self._pointers, byte, side="right")) - 1
        document = int(np.searchsorted(self._documents, sequence, side="right")) - 1
        raise MinitronError(
            f"{self._bin}: token {position}, in document {document} (counted from 0), has id "
            f"{int(chunk[offset])}, but the vocabulary has {vocab_size}; "
            "tokenise the data with the tokenizer of this model"
        )

    def _read_index(self) -> None:
        """Parse the index; its arrays stay on disk, for they can be larger than memory."""
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
            raise self._damaged("it does not start as a Megatron index does")
        _, version, code, num_sequences, num_boundaries = _HEADER.unpack(header)
        if version != _VERSION:
            raise self._damaged(f"its version is {version}, known is {_VERSION}")
        if code not in _DTYPES:
            raise self._damaged(f"its dtype code is {code}; tokens are {sorted(_DTYPES)}")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
        # Multimodal data has one more byte a sequence, which says nothing about the tokens.
        if size not in (expected, expected + num_sequences):
            raise self._damaged(
                f"it has {size} bytes, {num_sequences} sequences and {num_boundaries} document "
                f"boundaries take {expected}"
            )
        if num_sequences == 0:
            raise MinitronError(f"{self._idx} lists no documents; give data that is not empty")
        self.dtype = np.dtype(_DTYPES[code])
        self._lengths = self._map("<i4", _HEADER.size, num_sequences)
        self._pointers = self._map("<i8", _HEADER.size + 4 * num_sequences, num_sequences)
        self._documents = self._map("<i8", _HEADER.size + 12 * num_sequences, num_boundaries)

    def _map(self, dtype: str, offset: int, count: int) -> NDArray[np.integer]:
        if count == 0:
            raise self._damaged("it has no document boundaries")
        return np.memmap(self._idx, dtype, "r", offset=offset, shape=(count,))

    def _check_sequences(self) -> None:
        """Prove that sequences lie end to end and fill the `.bin` exactly."""
        self.num_tokens = 0
        for start in range(0, len(self._lengths), _CHUNK):
            lengths = self._lengths[start : start + _CHUNK].astype(np.int64)
            if (wrong := np.flatnonzero(lengths < 0)).size:
                at = wrong[0]
                raise self._damaged(f"sequence {start + at} has length {lengths[at]}")
            ends = self.num_tokens + np.cumsum(lengths)
            expected = (ends - lengths) * self.dtype.itemsize
            pointers = self._pointers[start : start + _CHUNK]
            if (wrong := np.flatnonzero(pointers != expected)).size:
                at = wrong[0]
                raise self._damaged(
                    f"sequence {start + at} starts at byte {pointers[at]}, "
                    f"the sequences before it end at {expected[at]}"
                )
            self.num_tokens = int(ends[-1])
        size, expected_size = self._bin.stat().st_size, self.num_tokens * self.dtype.itemsize
        if size != expected_size:
            raise MinitronError(
                f"{self._bin} has {size} bytes, but {self._idx.name} describes {self.num_tokens} "
                f"tokens of {self.dtype.itemsize} bytes = {expected_size}; the files do not "
                "belong together or are cut short: copy or tokenise them again"
            )
        if self.num_tokens == 0:
            raise MinitronError(f"{self._bin} holds no tokens; give data that is not empty")

    def _check_documents(self) -> None:
        """Prove that document boundaries run from the first sequence to the last."""
        first, last = int(self._documents[0]), int(self._documents[-1])
        if first != 0 or last != len(self._lengths):
            raise self._damaged(
                f"its documents span sequences {first} to {last} of {len(self._lengths)}"
            )
        for start in range(0, len(self._documents), _CHUNK):
            # One more than the chunk, so that chunks overlap and no step is missed.
            steps = np.diff(self._documents[start : start + _CHUNK + 1])
            if (wrong := np.flatnonzero(steps < 0)).size:
                raise self._damaged(f"document {start + wrong[0]} ends before it starts")

    def _damaged(self, reason: str) -> MinitronError:
        return MinitronError(
            f"{self._idx} is not a usable index: {reason}; copy or tokenise the data again"
        )
