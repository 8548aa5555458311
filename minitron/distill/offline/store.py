"""Reading a store of teacher outputs, in any order, by the names of samples."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minitron import artifact
from minitron.data.batches import EvalBatches, TrainBatches
from minitron.distill.offline.block import TokenTargets, decode_draws, decode_top_k
from minitron.distill.offline.files import (
    BLOCK,
    FOOTER,
    MAGIC,
    SAMPLES,
    STORE,
    read_info,
    sample_key,
    shard_path,
    tokens_checksum,
)
from minitron.errors import MinitronError
from minitron.metrics import progress


class LogitStore:
    """A complete store, for reading; safe to share between threads.

    Args:
        path: the `--out` of `launch/cache_logits.py`.

    Raises:
        MinitronError: it is no store, incomplete, or a file is missing or of another size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = read_info(path)
        if artifact.read_manifest(path) is None:
            raise MinitronError(
                f"{path} is not complete; finish it with launch/cache_logits.py --resume"
            )
        self.keys = self._read_keys()
        """Of the samples, ascending."""
        self._streams = {int(s.fingerprint, 16): i for i, s in enumerate(self.info.streams)}
        for number, size in enumerate(self.info.shard_bytes):
            shard = shard_path(path, number)
            found = shard.stat().st_size if shard.exists() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise MinitronError(
                    f"{shard} {state}, but {STORE} says {size} bytes; copy the store again, or "
                    "delete the shard and go on with launch/cache_logits.py --resume"
                )

    @property
    def has_tail(self) -> bool:
        """True where probability is left for successors that are not stored, as one bin."""
        return self.info.top_k is not None and self.info.top_k < self.info.vocab_size

    def check(self, *, tokenizer: str | None, seq_length: int, temperature: float) -> None:
        """Refuse to teach a student of another tokenizer, or from samples of another length.

        Raises:
            MinitronError: with both values.
        """
        info = self.info
        if None not in (tokenizer, info.tokenizer) and tokenizer != info.tokenizer:
            raise MinitronError(
                f"{self.path} was written with tokenizer {info.tokenizer}, the student's is "
                f"{tokenizer}; give a student with the teacher's tokenizer"
            )
        if seq_length != info.seq_length:
            raise MinitronError(
                f"{self.path} holds samples of {info.seq_length} tokens, but "
                f"data.seq_length={seq_length}; use {info.seq_length} or cache the logits again"
            )
        if temperature != info.temperature:
            raise MinitronError(
                f"{self.path} was written with cache.temperature={info.temperature}, but "
                f"distill.temperature={temperature}; use {info.temperature} or cache again"
            )

    def check_holds(
        self, batches: TrainBatches, validation: EvalBatches | None, *, num_samples: int
    ) -> None:
        """Refuse to begin a run that would miss a sample on the way.

        Args:
            batches: of the run.
            validation: of the run.
            num_samples: that training takes.

        Raises:
            MinitronError: a sample is not in the store.
        """
        for sample_id in validation.sample_ids() if validation else ():
            self._find(*sample_id)
        if all(self._holds_all(windows.stream.fingerprint) for windows in batches.source.datasets):
            return
        for index in progress(range(num_samples), desc=f"looking into {self.path}", unit="samples"):
            self._find(*batches.source.sample_id(index, seed=batches.seed))

    def read(self, sample_id: tuple[int, int], tokens: NDArray[np.integer]) -> TokenTargets:
        """What the teacher said of a sample.

        Args:
            sample_id: fingerprint of the token stream and number of the sample in it.
            tokens: [s] its inputs.

        Raises:
            MinitronError: the sample is not in the store, was made of other tokens, or is damaged.
        """
        block, tokens_crc = self.read_block(sample_id)
        name = f"sample {sample_id[1]} of {self._stream_path(sample_id[0])}"
        if tokens_checksum(tokens) != tokens_crc:
            raise MinitronError(
                f"{self.path} was made of other tokens than the data holds: those of {name} have "
                f"checksum {tokens_checksum(tokens):08x}, the teacher's {tokens_crc:08x}; give "
                "the same data or cache the logits again"
            )
        info = self.info
        if info.draws is not None:
            return decode_draws(block, info.seq_length, info.draws, info.floats)
        return decode_top_k(block, info.seq_length, info.floats)

    def holds(self, sample_id: tuple[int, int]) -> bool:
        """Whether a sample is in the store."""
        stream, number = sample_id
        if stream not in self._streams:
            return False
        key = sample_key(self._streams[stream], number)
        return bool(self.keys[np.searchsorted(self.keys, key) % len(self.keys)] == key)

    def _holds_all(self, stream: int) -> bool:
        """Whether the store holds every sample of a stream, so that none needs to be looked for."""
        if stream not in self._streams:
            return False
        info = self.info.streams[self._streams[stream]]
        return info.num_samples == info.num_windows

    def _find(self, stream: int, number: int) -> int:
        """The position of a sample in the order of all."""
        if stream not in self._streams:
            known = ", ".join(f"{s.path} ({s.fingerprint})" for s in self.info.streams)
            raise MinitronError(
                f"{self.path} holds nothing of the token stream {stream:016x} that the recipe's "
                f"data has; it was made of {known}: give the same data or cache the logits again"
            )
        key = sample_key(self._streams[stream], number)
        position = int(np.searchsorted(self.keys, key))
        if position == len(self.keys) or self.keys[position] != key:
            info = self.info.streams[self._streams[stream]]
            raise MinitronError(
                f"{self.path} lacks sample {number} of {info.path}, of whose {info.num_windows} "
                f"samples it holds {info.num_samples}; cache all that the run visits: raise "
                "cache.max_samples, or train with the same seed on no more samples"
            )
        return position

    def _stream_path(self, stream: int) -> str:
        return self.info.streams[self._streams[stream]].path

    def _read_keys(self) -> NDArray[np.int64]:
        path = self.path / SAMPLES
        try:
            keys = np.load(path)
        except (OSError, ValueError, EOFError):
            keys = np.zeros(0, np.int64)
        if zlib.crc32(keys.tobytes()) != self.info.samples_crc:
            raise MinitronError(
                f"{path} is missing or damaged: it does not match its checksum in {STORE}; "
                "copy the store again"
            )
        return keys

    def read_block(self, sample_id: tuple[int, int]) -> tuple[bytes, int]:
        """The compressed block of a sample and the checksum of its tokens.

        Raises:
            MinitronError: the sample is not in the store, or is damaged.
        """
        shard, row = divmod(self._find(*sample_id), self.info.shard_samples)
        path, size = shard_path(self.path, shard), self.info.shard_bytes[shard]
        count = min(
            self.info.shard_samples, self.info.num_samples - shard * self.info.shard_samples
        )
        try:
            with path.open("rb") as file:
                file.seek(size - FOOTER.size - count * BLOCK.itemsize)
                table = file.read(count * BLOCK.itemsize)
                footer = file.read()
                if footer != FOOTER.pack(MAGIC, count, zlib.crc32(table)):
                    raise _damaged(path, "its table of samples")
                entry = np.frombuffer(table, BLOCK)[row]
                file.seek(int(entry["offset"]))
                block = file.read(int(entry["bytes"]))
        except OSError as error:
            raise MinitronError(f"{path} cannot be read ({error.strerror})") from None
        if zlib.crc32(block) != entry["crc"]:
            raise _damaged(path, f"sample {row} in it (counted from 0)")
        return block, int(entry["tokens_crc"])


def _damaged(path: Path, what: str) -> MinitronError:
    return MinitronError(
        f"{path} is damaged: {what} does not match its checksum; copy the store again, or delete "
        "the shard and go on with launch/cache_logits.py --resume"
    )
