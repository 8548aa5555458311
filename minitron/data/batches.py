"""The data section of a recipe, and the micro-batches that a rank computes with.

Batches are functions of a position in the data and of the rank's place in the data-parallel group:
nothing is iterated over, so that there is no state to lose when a run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitron.data.indexed import TokenStream
from minitron.data.preprocess import check_tokenizer, tokenised_prefix
from minitron.data.sampling import Blend, Sample, TokenWindows
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.sections.data import DataConfig, refuse_weights, split_weight


def prepare_data(config: DataConfig, tokenizer: Tokenizer | None, *, vocab_size: int) -> DataConfig:
    """Tokenise what is text, and refuse what the model cannot read.

    One process calls this, before any other opens the data.

    Args:
        config: the data section of the recipe.
        tokenizer: the model's; None is enough where all data is tokenised.
        vocab_size: rows of the model's embedding table.

    Returns:
        The config with every path replaced by its token files' prefix.

    Raises:
        MinitronError: data is missing or damaged, of another tokenizer, or has an id that is not
            in the vocabulary.
    """

    def prepare(entry: str) -> str:
        _, path = split_weight(entry)
        prefix = tokenised_prefix(path, tokenizer, workers=config.workers)
        if tokenizer is not None:
            check_tokenizer(prefix, tokenizer)
        TokenStream(prefix).check_ids(vocab_size)
        return f"{entry.removesuffix(path)}{prefix}"

    return dataclasses.replace(
        config,
        path=[prepare(entry) for entry in config.path],
        valid_path=[prepare(entry) for entry in config.valid_path],
    )


def open_train(config: DataConfig) -> Blend:
    """Open prepared training data.

    Raises:
        MinitronError: a path has less than one sample.
    """
    weights, paths = zip(*map(split_weight, config.path), strict=True)
    windows = [TokenWindows(TokenStream(path), config.seq_length) for path in paths]
    return Blend(windows, None if None in weights else weights)


def open_windows(paths: Sequence[str], seq_length: int) -> list[TokenWindows]:
    """Open prepared data that is read in order, once: to validate, evaluate or measure importance.

    Raises:
        MinitronError: a path has a weight.
    """
    refuse_weights("data.path", paths)
    return [TokenWindows(TokenStream(path), seq_length) for path in paths]


@dataclass(frozen=True)
class Batch:
    """A micro-batch of b samples."""

    tokens: Tensor
    """[b, s] int64 inputs."""
    labels: Tensor
    """[b, s] int64, the token that follows each input."""
    loss_mask: Tensor
    """[b, s] float32, 1 where the label counts, 0 on padding and where it belongs to a prompt."""
    position_ids: Tensor
    """[b, s] int64, 0 to s - 1."""
    valid: Tensor
    """[b] bool, False for a row that only fills up the batch."""
    sample_ids: Tensor
    """[b, 2] int64, fingerprint of the token stream and number of the sample in it, which name a
    sample in any order and any batch; -1 where a row is no such sample."""

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(
            *(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self))
        )


def collate(samples: Sequence[Sample], *, size: int, seq_length: int) -> Batch:
    """Stack samples of up to S + 1 tokens into a batch, filling rows and batch with padding."""
    ids = np.full((size, 2), -1, np.int64)
    tokens, labels = np.zeros((2, size, seq_length), np.int64)
    loss_mask = np.zeros((size, seq_length), np.float32)
    for row, sample in enumerate(samples):
        length = len(sample.counted)
        ids[row] = sample.id
        tokens[row, :length] = sample.tokens[:-1]
        labels[row, :length] = sample.tokens[1:]
        loss_mask[row, :length] = sample.counted
    return Batch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        position_ids=torch.arange(seq_length).repeat(size, 1),
        valid=torch.arange(size) < len(samples),
        sample_ids=torch.from_numpy(ids),
    )


class TrainBatches:
    """The training samples of one data-parallel rank, step by step.

    A global batch is G consecutive samples of the source. Its micro-batch m takes b samples for
    each rank in turn, so that together the ranks read it from left to right.

    Args:
        source: the sequence of samples.
        global_batch_size: samples of a step, over all ranks.
        micro_batch_size: samples of one rank's micro-batch.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share a step's samples.
        seed: of the shuffling.

    Raises:
        MinitronError: the global batch does not divide into micro-batches.
    """

    def __init__(
        self,
        source: Blend,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
    ) -> None:
        share = micro_batch_size * data_parallel_size
        if global_batch_size % share:
            below = global_batch_size // share * share
            choices = f"{below} or {below + share}" if below else f"{share}"
            raise MinitronError(
                f"train.global_batch_size={global_batch_size} is not a multiple of "
                f"train.micro_batch_size x data-parallel ranks = {micro_batch_size} x "
                f"{data_parallel_size} = {share}; use {choices}"
            )
        self.num_microbatches = global_batch_size // share
        self.seq_length = source.seq_length
        self.source = source
        self.global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._stride = share
        self._offset = data_parallel_rank * micro_batch_size
        self.seed = seed

    def microbatches(self, first: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch that begins with sample `first`."""
        for number in range(self.num_microbatches):
            start = first + number * self._stride + self._offset
            indices = range(start, start + self._micro_batch_size)
            yield collate(
                [self.source.read(index, seed=self.seed) for index in indices],
                size=self._micro_batch_size,
                seq_length=self.seq_length,
            )


class EvalBatches:
    """Every sample once, in order, shared out among the data-parallel ranks.

    Samples are dealt to ranks as in training. Every rank gets the same number of micro-batches;
    those past the end are padding.

    Args:
        windows: the data; its samples follow each other.
        micro_batch_size: samples of one rank's micro-batch.
        data_parallel_rank: this rank.
        data_parallel_size: ranks that share the samples.
        include_remainder: add the shorter last sample of each path.
        max_samples: stop after so many samples, over all ranks.

    Raises:
        MinitronError: a path has no sample.
    """

    def __init__(
        self,
        windows: Sequence[TokenWindows],
        *,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        include_remainder: bool,
        max_samples: int | None = None,
    ) -> None:
        counts = []
        for window in windows:
            with_remainder = include_remainder and window.has_remainder
            if not with_remainder:
                window.check_not_empty()
            counts.append(len(window) + with_remainder)
        self.windows = windows
        self._ends = np.cumsum(counts)
        self._counts = counts
        self._micro_batch_size = micro_batch_size
        self.samples_per_microbatch = micro_batch_size * data_parallel_size
        """Samples that all ranks' micro-batches of one number hold together."""
        self._offset = data_parallel_rank * micro_batch_size
        self.num_samples = sum(counts) if max_samples is None else min(sum(counts), max_samples)
        """Samples of all ranks together."""

    def __len__(self) -> int:
        """Micro-batches of each rank."""
        return -(-self.num_samples // self.samples_per_microbatch)

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = number * self.samples_per_microbatch + self._offset
            last = min(first + self._micro_batch_size, self.num_samples)
            yield collate(
                [self._read(index) for index in range(first, last)],
                size=self._micro_batch_size,
                seq_length=self.windows[0].seq_length,
            )

    def sample_ids(self) -> Iterator[tuple[int, int]]:
        """Names of all ranks' samples."""
        for index in range(self.num_samples):
            window, position = self._locate(index)
            yield window.sample_id(position)

    def _read(self, index: int) -> Sample:
        window, position = self._locate(index)
        return window[position]

    def _locate(self, index: int) -> tuple[TokenWindows, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.windows[number], index - int(self._ends[number]) + self._counts[number]
