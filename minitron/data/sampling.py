"""Which tokens make up sample i: windows of a stream, shuffled epochs, weighted blends.

Everything here is a function of the sample's index and a seed. There is no iterator to save: a
resumed run, or one on another number of ranks, asks for the same indices and gets the same tokens,
and no list of a billion shuffled indices is ever built.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError

# Four rounds make a large range look random; ranges of a few samples need more.
_ROUNDS = 8
# Weights that no shorter period can express are rounded to fractions of this many samples.
_MAX_PERIOD = 1 << 16


class Sample(NamedTuple):
    """Inputs and labels, before they are stacked into batches."""

    tokens: NDArray[np.int64]
    """[S + 1], or fewer at the end of a stream: each input's label is the token after it."""
    counted: NDArray[np.bool_]
    """[S] labels to learn; those of a prompt are not."""
    id: tuple[int, int]
    """Its stream's fingerprint and its number there, which name it wherever it is read."""


class TokenWindows:
    """A stream cut into samples of `seq_length` inputs and as many labels.

    Sample i is tokens [i S, i S + S + 1): its labels are its inputs one token later, so that
    consecutive samples share one token and n S + 1 tokens hold exactly n samples.
    """

    def __init__(self, stream: TokenStream, seq_length: int) -> None:
        self.stream = stream
        self.seq_length = seq_length

    def __len__(self) -> int:
        return (self.stream.num_tokens - 1) // self.seq_length

    def __getitem__(self, index: int) -> Sample:
        """A sample; the one after the last full one is the remainder, of 2 to S tokens."""
        if not 0 <= index < len(self) + self.has_remainder:
            raise IndexError(f"sample {index} of {len(self)}")
        start = index * self.seq_length
        stop = min(start + self.seq_length + 1, self.stream.num_tokens)
        tokens = self.stream.read(start, stop)
        counted = ~self.stream.is_prompt(start + 1, stop)
        return Sample(tokens, counted, self.sample_id(index))

    def sample_id(self, index: int) -> tuple[int, int]:
        """What names a sample wherever it is read: its stream's fingerprint and its number."""
        return self.stream.fingerprint, index

    @property
    def has_remainder(self) -> bool:
        """True where tokens are left to predict after the last full sample."""
        return (self.stream.num_tokens - 1) % self.seq_length > 0

    def check_not_empty(self) -> None:
        """Refuse a stream that is shorter than one sample."""
        if len(self) == 0:
            raise MinitronError(
                f"{self.stream.prefix}.bin{self.stream.origin} has {self.stream.num_tokens} "
                f"tokens, but a sample of data.seq_length={self.seq_length} takes "
                f"{self.seq_length} + 1; give more text or lower data.seq_length"
            )


class Blend:
    """An endless sequence of training samples drawn from several datasets.

    Without weights, an epoch is all samples of all datasets, each once, in a random order that
    differs between epochs. With weights, every run of samples from the start holds each dataset in
    proportion to its weight, to within one sample, and each dataset is shuffled by itself and
    starts over in another order when it is used up.

    Args:
        datasets: windows of at least one sample each.
        weights: relative share of each dataset, or None. Shares are exact where they repeat within
            65,536 samples (0.3 and 0.7, 1:2:5), else rounded to multiples of 1/65,536.
    """

    def __init__(
        self, datasets: Sequence[TokenWindows], weights: Sequence[Fraction] | None = None
    ) -> None:
        if weights is not None and len(weights) != len(datasets):
            raise ValueError(f"{len(weights)} weights for {len(datasets)} datasets")
        for dataset in datasets:
            dataset.check_not_empty()
        self.datasets = list(datasets)
        self._ends = np.cumsum([len(dataset) for dataset in datasets])
        self._shares: list[int] | None = None
        if weights is not None:
            self._shares = _integer_shares(weights)
            self._choices, self._ordinals = _interleave(self._shares)

    @property
    def epoch_samples(self) -> int:
        """Samples in all datasets together."""
        return int(self._ends[-1])

    @property
    def seq_length(self) -> int:
        """Inputs of a sample."""
        return self.datasets[0].seq_length

    def locate(self, index: int, *, seed: int) -> tuple[int, int]:
        """The dataset and the sample within it that stand at `index` of the sequence."""
        if self._shares is None:
            sample = _shuffled(index, self.epoch_samples, f"{seed}")
            dataset = int(np.searchsorted(self._ends, sample, side="right"))
            return dataset, sample - int(self._ends[dataset]) + len(self.datasets[dataset])
        period, position = divmod(index, len(self._choices))
        dataset = int(self._choices[position])
        drawn_before = period * self._shares[dataset] + int(self._ordinals[position])
        size = len(self.datasets[dataset])
        return dataset, _shuffled(drawn_before, size, f"{seed}/{dataset}")

    def sample_id(self, index: int, *, seed: int) -> tuple[int, int]:
        """What names the sample at `index`: its stream's fingerprint and its number there."""
        dataset, sample = self.locate(index, seed=seed)
        return self.datasets[dataset].sample_id(sample)

    def read(self, index: int, *, seed: int) -> Sample:
        """The sample at `index` of the sequence that `seed` shuffles."""
        dataset, sample = self.locate(index, seed=seed)
        return self.datasets[dataset][sample]


def _shuffled(index: int, size: int, key: str) -> int:
    """What stands at `index` of an endless sequence of shuffled epochs of range(size)."""
    epoch, position = divmod(index, size)
    return permute(position, size, f"{key}/{epoch}")


def permute(position: int, size: int, key: str) -> int:
    """Where the pseudorandom permutation of range(size) named `key` sends `position`.

    A Feistel network shuffles the smallest range of 4^k numbers that holds `size`; a result
    outside is sent through again until it falls inside, which keeps the map one to one. Needs no
    memory, and is the same on every machine and with every version of NumPy.

    Source: Luby and Rackoff, 1988; Black and Rogaway, "Ciphers with arbitrary finite domains".
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{number}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        position = left << half | right
        if position < size:
            return position


def _integer_shares(weights: Sequence[Fraction]) -> list[int]:
    """Samples of each dataset in one period of the blend."""
    total = sum(weights)
    common = math.lcm(*((weight / total).denominator for weight in weights))
    if common > _MAX_PERIOD:
        return [max(1, round(weight / total * _MAX_PERIOD)) for weight in weights]
    return [int(weight / total * common) for weight in weights]


def _interleave(shares: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """One period of a blend: the dataset at each position, and how often it came before.

    Of the datasets that another sample would not put ahead of their share, it takes the one that
    would fall behind first. At every position each dataset then has its share, rounded up or down;
    taking the one that is furthest behind, as Megatron does, can miss it by more than a sample.

    Source: Still, "A class of new methods for congressional apportionment", 1979.
    """
    period = sum(shares)
    counts = [0] * len(shares)
    choices, ordinals = np.empty(period, np.int32), np.empty(period, np.int32)
    for position in range(period):
        choice = min(
            (d for d, s in enumerate(shares) if counts[d] * period < s * (position + 1)),
            key=lambda d: (counts[d] + 1) / shares[d],
        )
        choices[position], ordinals[position] = choice, counts[choice]
        counts[choice] += 1
    return choices, ordinals
