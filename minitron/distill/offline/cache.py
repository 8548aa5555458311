"""Writing a store: a forward-only pass of the teacher over every sample that a student will see.

What is stored of a sample depends on the sample alone. Its draws come from a generator that is
seeded with the sample's name, and a shard holds the same samples whoever writes it: replicas share
out whole shards, and never wait for each other. So neither topology nor batch size changes a store
beyond the rounding of logits, and an attempt that was killed is continued, on any other topology,
with the shards that are missing. What an earlier store holds of a sample is as good as the teacher.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from minitron import artifact
from minitron.data.batches import Batch
from minitron.data.tokenizer import Tokenizer
from minitron.distill.offline.block import MAX_ID, encode_draws, encode_top_k
from minitron.distill.offline.files import (
    SAMPLES,
    SHARDS,
    StoreInfo,
    StreamInfo,
    shard_path,
    split_key,
    tokens_checksum,
    write_info,
    write_shard,
)
from minitron.distill.offline.samples import SampleSet, grouped
from minitron.distill.offline.store import LogitStore
from minitron.errors import MinitronError
from minitron.metrics import progress
from minitron.model.llama import LlamaModel
from minitron.model.schedule import run_schedule
from minitron.ops.sample_tokens import sample_tokens
from minitron.ops.top_tokens import top_tokens
from minitron.parallel import barrier, is_rank_zero, on_rank_zero
from minitron.sections.distill import CacheConfig

# A shard is what a killed run may lose of a replica's work, and what replicas share out.
_SHARD_TOKENS = 1 << 22
_LEAST_SHARDS = 64
_CHUNK_TOKENS = 2048  # whose logits exist at a time


def check_vocabulary(config: CacheConfig, vocab_size: int) -> None:
    """Refuse what a teacher with so many tokens cannot give.

    Raises:
        MinitronError: with the size.
    """
    if config.top_k is not None and config.top_k > vocab_size:
        raise MinitronError(
            f"cache.top_k={config.top_k} is more than the teacher's vocabulary of {vocab_size}; "
            "lower it"
        )
    if vocab_size > MAX_ID + 1:
        raise MinitronError(
            f"the teacher's vocabulary of {vocab_size} is above {MAX_ID + 1}, which the "
            "store's ids have room for"
        )


def describe(
    samples: SampleSet,
    config: CacheConfig,
    *,
    teacher: Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    precision: str,
    seed: int,
) -> StoreInfo:
    """What `store.json` will say of these samples."""
    seq_length = samples.streams[0].seq_length
    stored = np.bincount(split_key(samples.keys)[0], minlength=len(samples.streams))
    return StoreInfo(
        teacher=artifact.fingerprint(teacher),
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        vocab_size=vocab_size,
        tokenizer_vocab_size=tokenizer.vocab_size if tokenizer else None,
        seq_length=seq_length,
        top_k=config.top_k,
        draws=config.draws,
        temperature=config.temperature,
        floats=config.floats,
        precision=precision,
        seed=seed,
        samples_crc=zlib.crc32(samples.keys.tobytes()),
        shard_samples=max(
            1, min(_SHARD_TOKENS // seq_length, -(-len(samples.keys) // _LEAST_SHARDS))
        ),
        streams=tuple(
            StreamInfo(
                path=str(windows.stream.prefix),
                fingerprint=f"{windows.stream.fingerprint:016x}",
                num_samples=int(count),
                num_windows=len(windows),
            )
            for windows, count in zip(samples.streams, stored, strict=True)
        ),
    )


def open_store(out: Path, info: StoreInfo, samples: SampleSet) -> None:
    """Create a store, or take over what an earlier attempt left; one process calls this."""
    artifact.create_directory(out / SHARDS)
    (out / artifact.MANIFEST).unlink(missing_ok=True)
    np.save(out / SAMPLES, samples.keys)
    write_info(out, info)


def close_store(out: Path, info: StoreInfo) -> dict[str, float]:
    """Record the shards' sizes once all are written; one process calls this.

    Returns:
        What the manifest says: samples, tokens, bytes, and bytes a token.
    """
    sizes = tuple(shard_path(out, number).stat().st_size for number in range(info.num_shards))
    write_info(out, dataclasses.replace(info, shard_bytes=sizes))
    tokens = info.num_samples * info.seq_length
    return {
        "samples": info.num_samples,
        "tokens": tokens,
        "bytes": sum(sizes),
        "bytes_per_token": sum(sizes) / tokens,
    }


def write_missing_shards(
    model: LlamaModel,
    samples: SampleSet,
    info: StoreInfo,
    out: Path,
    *,
    micro_batch_size: int,
    earlier: LogitStore | None = None,
) -> None:
    """Run a frozen teacher over all samples whose shard is not there; call on all ranks.

    Args:
        model: the teacher.
        samples: of the store.
        info: what it says of itself.
        out: its directory.
        micro_batch_size: samples that one data-parallel rank takes through the model at a time.
        earlier: a store with the same of some samples, which are copied.

    Raises:
        MinitronError: a shard cannot be written.
    """
    topology = model.topology
    writes = topology.is_last_stage and topology.tp_rank == 0
    missing = on_rank_zero(
        lambda: [n for n in range(info.num_shards) if not shard_path(out, n).exists()]
    )
    recorder = _Recorder(model, info)
    per_shard = info.shard_samples
    total = info.num_samples * info.seq_length
    done = (info.num_shards - len(missing)) * per_shard * info.seq_length
    with progress(
        total=total, initial=done, desc="cache logits", unit="tokens", enabled=is_rank_zero()
    ) as bar:
        for number in missing[topology.dp_rank :: topology.dp_size]:
            keys = samples.keys[number * per_shard : (number + 1) * per_shard]
            held = np.array([earlier is not None and earlier.holds(samples.name(k)) for k in keys])
            for batches in grouped(samples, keys[~held], micro_batch_size, 4 * topology.pp_size):
                run_schedule(model, batches, recorder.record, forward_only=True)
            if writes:
                new = iter(recorder.take())
                blocks = [
                    earlier.read_block(samples.name(key)) if earlier and is_held else next(new)
                    for key, is_held in zip(keys, held, strict=True)
                ]
                write_shard(shard_path(out, number), blocks)
            step = len(keys) * info.seq_length * topology.dp_size  # replicas keep pace
            bar.update(min(step, total - done))
            done = min(done + step, total)
    barrier()


class _Recorder:
    """Turns a teacher's final hidden states into blocks, on one rank of the last stage."""

    def __init__(self, model: LlamaModel, info: StoreInfo) -> None:
        self._model, self._info = model, info
        self._tp_group = model.topology.groups.tp
        self._blocks: list[tuple[bytes, int]] = []

    def take(self) -> list[tuple[bytes, int]]:
        """Blocks and token checksums of the samples since the last call; empty on other ranks."""
        blocks, self._blocks = self._blocks, []
        return blocks

    def record(self, hidden: Tensor, batch: Batch, index: int) -> None:
        """Encode a micro-batch, from its final hidden states [s, b, h] or [s/t, b, h]."""
        if self._model.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self._tp_group)
        ids, numbers = self._condense(hidden, batch)
        if self._model.topology.tp_rank != 0:
            return
        encode = encode_top_k if self._info.draws is None else encode_draws
        for row in range(int(batch.valid.sum())):
            block = encode(ids[:, row], numbers[:, row], self._info.floats)
            self._blocks.append((block, tokens_checksum(batch.tokens[row].cpu().numpy())))

    def _condense(
        self, hidden: Tensor, batch: Batch
    ) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
        """Ids [s, b, k] and their log-probabilities, or draws [s, b, N] and the entropy [s, b]."""
        info, (s, b) = self._info, hidden.shape[:2]
        options: dict[str, Any] = {
            "valid_columns": self._model.valid_columns,
            "temperature": info.temperature,
            "tp_group": self._tp_group,
        }
        names = batch.sample_ids.tolist()
        uniform = np.stack([draw_uniform(info.seed, name, s) for name in names], axis=1)
        uniforms = torch.from_numpy(uniform).to(hidden.device).view(s * b, 1)
        rows = hidden.reshape(s * b, 1, -1)
        parts: list[tuple[Tensor, Tensor]] = []
        for first in range(0, s * b, _CHUNK_TOKENS):
            chunk = slice(first, first + _CHUNK_TOKENS)
            logits = rows[chunk] @ self._model.head.t()
            if info.draws is not None:
                parts.append(sample_tokens(logits, uniforms[chunk], info.draws, **options))
            else:
                parts.append(top_tokens(logits, info.top_k or 0, **options))
        ids, numbers = (
            torch.cat(part).squeeze(1).cpu().numpy() for part in zip(*parts, strict=True)
        )
        return ids.reshape(s, b, -1), numbers.reshape(s, b, *numbers.shape[1:])


def draw_uniform(seed: int, sample_id: Sequence[int], count: int) -> NDArray[np.floating]:
    """The uniform numbers [count] in [0, 1) that decide a sample's draws.

    Raw output of Philox, which is the same in every version of NumPy.
    """
    name = f"{seed}/{sample_id[0]}/{sample_id[1]}"
    key = hashlib.blake2b(name.encode(), digest_size=16).digest()
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    return (generator.random_raw(count) >> 11) * 2.0**-53
