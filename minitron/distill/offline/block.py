"""What a store keeps of the teacher for one sample, and its bytes.

A token's known successors are written by ascending id, as gaps from one id to the next: the order
says nothing that is needed, and gaps are small numbers. Every quantity is split into planes, all
lowest bytes, then all second bytes and so on, and zstd then finds the high planes almost empty: an
id costs about as many bits as its gap needs, although there is room for a vocabulary of 2²⁴.

Probabilities are fp16 logarithms: wrong by |ln q|·2⁻¹² at most, so that a KL divergence is wrong by
about 2⁻¹² of the teacher's entropy, in either direction. What the top k leave to all others is kept
by itself, and reading rescales both to one: taken as 1 − Σ q it would be lost in those errors. Of
draws, the counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from minitron.sections.distill import FloatType

MAX_ID = (1 << 24) - 1

_FLOATS: dict[str, np.dtype[Any]] = {"fp16": np.dtype("<f2"), "fp32": np.dtype("<f4")}
_ID_BYTES = 3
_COUNT_BYTES = 2
_LEVEL = 3


@dataclass(frozen=True)
class TokenTargets:
    """What is known of the teacher at each token of a sample."""

    ids: NDArray[np.int64]
    """[s, k] successors, ascending; -1 fills a row up."""
    log_probs: NDArray[np.float32]
    """[s, k] in nats; what stands beside -1 has no meaning."""
    entropy_excess: NDArray[np.float32]
    """[s] entropy of `ids` and `log_probs` less that of the teacher; 0 for the top k. Added to a
    KL divergence from draws it makes its mean that from the teacher."""


def encode_top_k(
    ids: NDArray[np.int64], log_probs: NDArray[np.floating], floats: FloatType
) -> bytes:
    """Compress the top k of every token.

    Args:
        ids: [s, k], each at most once; -1 for none.
        log_probs: [s, k] in nats, over the whole vocabulary.
        floats: how to keep logarithms.
    """
    known = ids >= 0
    probs = np.where(known, np.exp(log_probs.astype(np.float64)), 0)
    with np.errstate(divide="ignore"):
        log_tail = np.log((1 - probs.sum(1)).clip(min=0))
    order = np.argsort(np.where(known, ids, MAX_ID + 1), axis=1)
    ids = np.take_along_axis(ids, order, 1)
    values = _float_bits(np.take_along_axis(log_probs, order, 1)[ids >= 0], floats)
    return _compress(ids, values, _float_bits(log_tail, floats), _FLOATS[floats].itemsize, floats)


def encode_draws(ids: NDArray[np.int64], entropy: NDArray[np.floating], floats: FloatType) -> bytes:
    """Compress draws of every token.

    Args:
        ids: [s, N] ascending, as often as they were drawn.
        entropy: [s] of the teacher, in nats.
        floats: how to keep the entropy.
    """
    starts = np.ones(ids.shape, bool)  # where another id than before begins
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    flat_starts = np.flatnonzero(starts)
    counts = np.diff(np.append(flat_starts, ids.size))
    lengths = starts.sum(1)
    distinct = np.full((len(ids), lengths.max()), -1)
    distinct[np.arange(distinct.shape[1]) < lengths[:, None]] = ids.ravel()[flat_starts]
    return _compress(distinct, counts, _float_bits(entropy, floats), _COUNT_BYTES, floats)


def decode_top_k(block: bytes, seq_length: int, floats: FloatType) -> TokenTargets:
    """Invert `encode_top_k`, up to the rounding of its logarithms."""
    ids, known, values, per_token = _decompress(block, seq_length, _FLOATS[floats].itemsize, floats)
    log_probs = np.full(ids.shape, -np.inf)
    log_probs[known] = _from_bits(values, floats)
    log_tail = _from_bits(per_token, floats)
    total = np.exp(log_probs).sum(1) + np.exp(log_tail)
    log_probs -= np.log(total)[:, None]
    return TokenTargets(ids, log_probs.astype(np.float32), np.zeros(len(ids), np.float32))


def decode_draws(block: bytes, seq_length: int, draws: int, floats: FloatType) -> TokenTargets:
    """Invert `encode_draws`: the log-probability of what was drawn n of N times is ln n/N."""
    ids, known, counts, per_token = _decompress(block, seq_length, _COUNT_BYTES, floats)
    probs = np.zeros(ids.shape)
    probs[known] = counts / draws
    log_probs = np.log(probs, where=known, out=np.full(ids.shape, -np.inf))
    entropy = -(probs * np.where(known, log_probs, 0)).sum(1)
    excess = entropy - _from_bits(per_token, floats)
    return TokenTargets(ids, log_probs.astype(np.float32), excess.astype(np.float32))


def _compress(
    ids: NDArray[np.int64],
    values: NDArray[np.integer],
    per_token: NDArray[np.integer],
    value_bytes: int,
    floats: FloatType,
) -> bytes:
    """Compress rows of ascending ids [s, k], filled up with -1, their values and one number each.

    `values` are those of all ids in turn.
    """
    known = ids >= 0
    gaps = np.diff(ids, axis=1, prepend=0)[known]
    parts = (
        _planes(known.sum(1), _ID_BYTES),
        _planes(per_token, _FLOATS[floats].itemsize),
        _planes(gaps, _ID_BYTES),
        _planes(values, value_bytes),
    )
    return zstandard.ZstdCompressor(level=_LEVEL).compress(b"".join(parts))


def _decompress(
    block: bytes, seq_length: int, value_bytes: int, floats: FloatType
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.uint32], NDArray[np.uint32]]:
    """Ids [s, k], where they are known, values of all known ids, and the number of each token."""
    content = memoryview(zstandard.ZstdDecompressor().decompress(block))
    at = 0

    def take(count: int, num_bytes: int) -> NDArray[np.uint32]:
        nonlocal at
        start, at = at, at + count * num_bytes
        return _from_planes(content[start:at], num_bytes)

    lengths = take(seq_length, _ID_BYTES)
    per_token = take(seq_length, _FLOATS[floats].itemsize)
    num_known = int(lengths.sum())
    gaps = take(num_known, _ID_BYTES)
    values = take(num_known, value_bytes)
    known = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.zeros(known.shape, np.int64)
    ids[known] = gaps
    ids = np.where(known, ids.cumsum(1), -1)
    return ids, known, values, per_token


def _planes(numbers: NDArray[np.integer], num_bytes: int) -> bytes:
    """The lowest `num_bytes` bytes of each number, plane by plane."""
    return numbers.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :num_bytes].T.tobytes()


def _from_planes(planes: memoryview, num_bytes: int) -> NDArray[np.uint32]:
    numbers = np.zeros((len(planes) // num_bytes, 4), np.uint8)
    numbers[:, :num_bytes] = np.frombuffer(planes, np.uint8).reshape(num_bytes, -1).T
    return numbers.view("<u4")[:, 0]


def _float_bits(values: NDArray[np.floating], floats: FloatType) -> NDArray[np.integer]:
    dtype = _FLOATS[floats]
    return values.astype(dtype).view(f"<u{dtype.itemsize}")


def _from_bits(bits: NDArray[np.uint32], floats: FloatType) -> NDArray[np.float64]:
    dtype = _FLOATS[floats]
    return bits.astype(f"<u{dtype.itemsize}").view(dtype).astype(np.float64)
