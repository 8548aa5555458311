"""The teacher of a run that distills from a store: targets instead of hidden states.

Ranks of the last stage read the samples of their own micro-batches. Two threads decompress ahead of
the student, which takes longer over a micro-batch than they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill.offline.store import LogitStore
from minitron.ops.objectives import KnownTokens

_AHEAD = 2

Targets = tuple[KnownTokens, Tensor]
"""Of a micro-batch: the teacher's known successors [s, b, k], and what is to be added to the
divergence from them, [s, b]; see `TokenTargets.entropy_excess`."""


class StoredTeacher:
    """The targets of the micro-batches at hand.

    Args:
        store: holds every sample that will be asked for.
        vocab_size: tokens that the student knows too.
        is_last_stage: whether this rank computes the loss; the others read nothing.
    """

    def __init__(self, store: LogitStore, *, vocab_size: int, is_last_stage: bool) -> None:
        self.store = store
        self.vocab_size = vocab_size
        self._is_last_stage = is_last_stage
        self._pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="targets")
        self._microbatches: Sequence[Batch] = ()
        self._read: dict[int, Future[Targets]] = {}

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """A step is one window: targets are read as they are needed."""
        return None

    def run(self, microbatches: Sequence[Batch]) -> None:
        """Begin to read the targets of micro-batches, which will be taken in this order."""
        self._microbatches = microbatches
        self._read.clear()
        for index in range(_AHEAD):
            self._begin(index)

    def take(self, index: int) -> Targets:
        """The targets of a micro-batch, which are let go.

        Raises:
            MinitronError: a sample is missing, damaged, or of other tokens.
        """
        self._begin(index + _AHEAD)
        known, excess = self._read.pop(index).result()
        device = platform.device()
        known = KnownTokens(*(tensor.to(device, non_blocking=True) for tensor in known))
        return known, excess.to(device, non_blocking=True)

    def _begin(self, index: int) -> None:
        if self._is_last_stage and index < len(self._microbatches):
            self._read[index] = self._pool.submit(self._load, self._microbatches[index])

    def _load(self, batch: Batch) -> Targets:
        """Read the rows of a batch; those that fill it up have no targets."""
        names = batch.sample_ids[batch.valid].tolist()
        rows = [
            self.store.read((stream, number), tokens)
            for (stream, number), tokens in zip(names, batch.tokens.numpy(), strict=False)
        ]
        width = max((row.ids.shape[1] for row in rows), default=1)
        b, s = batch.tokens.shape
        ids = np.full((s, b, width), -1)
        log_probs = np.full((s, b, width), -np.inf, np.float32)
        excess = np.zeros((s, b), np.float32)
        for column, row in enumerate(rows):
            ids[:, column, : row.ids.shape[1]] = row.ids
            log_probs[:, column, : row.ids.shape[1]] = row.log_probs
            excess[:, column] = row.entropy_excess
        if self.store.info.vocab_size > self.vocab_size:
            without_padding(ids, log_probs, self.vocab_size)
        known = KnownTokens(torch.from_numpy(ids), torch.from_numpy(log_probs))
        return known, torch.from_numpy(excess)


def without_padding(
    ids: NDArray[np.integer], log_probs: NDArray[np.floating], vocab_size: int
) -> None:
    """Give what a teacher's longer table left to its padding to the stored successors, in place.

    Args:
        ids: [..., k] successors, -1 for none.
        log_probs: [..., k] theirs.
        vocab_size: ids from here on are padding.
    """
    beyond = ids >= vocab_size
    lost = np.where(beyond, np.exp(log_probs), 0).sum(-1, keepdims=True)
    log_probs -= np.log1p(-lost.clip(max=1 - 1e-6))
    ids[beyond], log_probs[beyond] = -1, -np.inf
    # Where every token is known, what the others have is padding's, too.
    whole = (ids >= 0).sum(-1) == vocab_size
    log_probs[whole] -= np.logaddexp.reduce(log_probs[whole], axis=-1, keepdims=True)
