"""The samples that a store is written of, and their micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minitron.data.batches import Batch, collate, open_train, open_windows
from minitron.data.sampling import Sample, TokenWindows
from minitron.distill.offline.files import sample_key, split_key
from minitron.metrics import progress
from minitron.sections.data import DataConfig


@dataclass(frozen=True)
class SampleSet:
    """Samples of several token streams, each once."""

    streams: list[TokenWindows]
    """Of different content."""
    keys: NDArray[np.int64]
    """`sample_key`s, ascending; streams are counted as in `streams`."""

    def read(self, key: int) -> Sample:
        """The sample of a key."""
        stream, number = split_key(key)
        return self.streams[stream][number]

    def name(self, key: int) -> tuple[int, int]:
        """Fingerprint of a key's token stream and number of its sample in it."""
        stream, number = split_key(int(key))
        return self.streams[stream].sample_id(number)


def first_batch(samples: SampleSet, size: int) -> Batch:
    """The first samples as one micro-batch."""
    return next(grouped(samples, samples.keys[:size], size, 1))[0]


def choose_samples(data: DataConfig, *, max_samples: int | None, seed: int) -> SampleSet:
    """The training and validation samples of prepared data.

    Raises:
        MinitronError: a path has less than one sample.
    """
    train = open_train(data)
    valid = open_windows(data.valid_path, data.seq_length)
    by_content = {window.stream.fingerprint: window for window in [*valid, *train.datasets]}
    streams = sorted(by_content.values(), key=lambda window: window.stream.fingerprint)
    number = {window.stream.fingerprint: i for i, window in enumerate(streams)}
    parts: list[NDArray[np.int64]] = []

    def add(windows: TokenWindows, count: int) -> None:
        first = sample_key(number[windows.stream.fingerprint], 0)
        parts.append(np.arange(first, first + count))

    if max_samples is None:
        for windows in train.datasets:
            add(windows, len(windows))
    else:
        drawn = progress(range(max_samples), desc="choosing samples", unit="samples")
        located = (train.sample_id(index, seed=seed) for index in drawn)
        keys = (sample_key(number[fingerprint], sample) for fingerprint, sample in located)
        parts.append(np.fromiter(keys, np.int64))  # told a count, it would not end the progress
    left = data.valid_samples
    for windows in valid:
        windows.check_not_empty()
        count = len(windows) if left is None else min(left, len(windows))
        add(windows, count)
        left = None if left is None else left - count
    return SampleSet(streams, np.unique(np.concatenate(parts)))


def grouped(
    samples: SampleSet, keys: NDArray[np.int64], micro_batch_size: int, group_size: int
) -> Iterator[list[Batch]]:
    """Micro-batches of the samples, as many at a time as keep a pipeline busy."""
    group: list[Batch] = []
    for first in range(0, len(keys), micro_batch_size):
        read = [samples.read(int(key)) for key in keys[first : first + micro_batch_size]]
        seq_length = samples.streams[0].seq_length
        group.append(collate(read, size=micro_batch_size, seq_length=seq_length))
        if len(group) == group_size:
            yield group
            group = []
    if group:
        yield group
