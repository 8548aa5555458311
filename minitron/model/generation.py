"""Continuing prompts: batched decoding with a key/value cache, on any topology.

All rows stand at the same position. Decoding begins behind the shortest prompt, and while a longer
one has tokens of its own they are taken in place of sampled ones: nothing is padded, and causal
attention needs no mask. Several micro-batches go through together, so that a pipeline has work for
all its stages.

What is drawn follows from the seed, the prompt's number and the position, and from nothing else:
not from the batch it is in, the ranks, or where a run was resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.model.llama import LlamaModel
from minitron.model.schedule import run_schedule
from minitron.sections.generate import SamplingConfig


class Prompt(NamedTuple):
    """What to continue."""

    number: int
    """Names the prompt: draws depend on it."""
    tokens: list[int]
    """At least one, and fewer than the model's context holds."""


class Response(NamedTuple):
    """What the model said."""

    tokens: list[int]
    """Without the end-of-document token."""
    finished: bool
    """Whether the model ended it; otherwise it was cut."""


@torch.no_grad()
def generate(
    model: LlamaModel,
    prompts: Sequence[Prompt],
    config: SamplingConfig,
    *,
    eod: int,
    seed: int,
    micro_batch_size: int,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[Response]:
    """Continue prompts, each until the model ends it or a limit is reached; call on all ranks.

    Args:
        model: this rank's part, built without sequence parallelism.
        prompts: of this data-parallel rank.
        config: how to draw.
        eod: the token that ends a response.
        seed: of the draws.
        micro_batch_size: prompts that go through the model together.
        stop: tells from a response so far, on every rank, whether it need not go on.

    Returns:
        The response to each prompt, on all ranks that share the model.
    """
    if not prompts:
        return []
    model.eval()
    lengths = [len(prompt.tokens) for prompt in prompts]
    context = model.arch.max_position_embeddings
    ends = [min(length + config.max_new_tokens, context) for length in lengths]
    tokens = torch.full((len(prompts), max(ends)), eod)
    for row, prompt in enumerate(prompts):
        tokens[row, : lengths[row]] = torch.tensor(prompt.tokens)
    stage = _Stage(model, tokens, micro_batch_size)
    running = set(range(len(prompts)))
    finished = [False] * len(prompts)
    begin = 0
    for position in range(min(lengths), max(ends)):
        logits = stage.advance(begin, position)
        begin = position
        drawn = torch.full((len(prompts),), eod)
        if logits is not None:
            drawn = draw(logits, prompts, position, config, seed=seed).cpu()
        drawn = stage.share(drawn)
        for row in sorted(running):
            if position < lengths[row]:
                continue
            tokens[row, position] = token = drawn[row]
            finished[row] = bool(token == eod)
            cut = position + 1 == ends[row]
            if stop is not None and not (finished[row] or cut):
                cut = stop(tokens[row, lengths[row] : position + 1].tolist())
            if finished[row] or cut:
                ends[row] = position + (not finished[row])
                running.remove(row)
        if not running:
            break
    return [
        Response(tokens[row, lengths[row] : ends[row]].tolist(), finished[row])
        for row in range(len(prompts))
    ]


class _Stage:
    """This rank's part of the model, with the keys and values of what it has read.

    Args:
        model: the part.
        tokens: [rows, s]; those to come are filled in by the caller.
        micro_batch_size: rows of a micro-batch; the last one is filled up with row 0.
    """

    def __init__(self, model: LlamaModel, tokens: Tensor, micro_batch_size: int) -> None:
        self._model = model
        self._tokens = tokens
        rows = torch.arange(-(-tokens.size(0) // micro_batch_size) * micro_batch_size)
        rows[tokens.size(0) :] = 0
        self._rows = rows.split(micro_batch_size)
        self._caches = [
            StaticInferenceContext(micro_batch_size, tokens.size(1)) for _ in self._rows
        ]

    def advance(self, begin: int, end: int) -> Tensor | None:
        """Read the tokens [begin, end); logits [rows, v] of the next one, on the last stage."""
        positions = torch.arange(begin, end)
        hidden: dict[int, Tensor] = {}

        def keep(output: Tensor, batch: Batch, index: int) -> None:
            hidden[index] = output[-1:]

        run_schedule(
            self._model,
            [_unlabelled(self._tokens[rows, begin:end], positions) for rows in self._rows],
            keep,
            forward_only=True,
            caches=self._caches,
        )
        for cache in self._caches:
            cache.sequence_len_offset = end
        if not hidden:
            return None
        last = torch.cat([hidden[index] for index in range(len(hidden))], dim=1)
        return self._whole(self._model.logits(last)[0])[: self._tokens.size(0)]

    def _whole(self, logits: Tensor) -> Tensor:
        """All ranks' columns [rows, v/t] → [rows, v], without padding."""
        topology = self._model.topology
        parts = logits.new_empty(topology.tp_size, *logits.shape)
        dist.all_gather_into_tensor(
            parts.flatten(0, 1), logits.contiguous(), group=topology.groups.tp
        )
        return parts.transpose(0, 1).flatten(1)[:, : self._model.arch.vocab_size]

    def share(self, drawn: Tensor) -> Tensor:
        """What the last stage has drawn, on every stage."""
        topology = self._model.topology
        if topology.pp_size == 1:
            return drawn
        drawn = drawn.to(platform.device())
        dist.broadcast(drawn, src=topology.last_stage_rank, group=topology.groups.pp)
        return drawn.cpu()


def _unlabelled(tokens: Tensor, positions: Tensor) -> Batch:
    rows = tokens.size(0)
    return Batch(
        tokens=tokens,
        labels=tokens,
        loss_mask=torch.zeros(tokens.shape),
        position_ids=positions.expand(rows, -1),
        valid=torch.ones(rows, dtype=torch.bool),
        sample_ids=torch.full((rows, 2), -1),
    )


def draw(
    logits: Tensor, prompts: Sequence[Prompt], position: int, config: SamplingConfig, *, seed: int
) -> Tensor:
    """The next token of every row.

    Args:
        logits: [b, v] of the whole vocabulary.
        prompts: what the rows continue.
        position: of the tokens drawn.
        config: how to draw.
        seed: of the draws.

    Returns:
        [b] token ids.
    """
    if config.temperature == 0:
        return logits.argmax(1)
    probabilities = (logits.double() / config.temperature).softmax(1)
    if config.top_p < 1:
        ranked, order = probabilities.sort(dim=1, descending=True, stable=True)
        above = ranked.cumsum(1) - ranked  # of all tokens that are likelier
        ranked[above >= config.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(1, order, ranked)
    sums = probabilities.cumsum(1)
    points = torch.tensor(
        [_uniform(f"{seed}/{prompt.number}/{position}") for prompt in prompts],
        dtype=sums.dtype,
        device=sums.device,
    )
    return torch.searchsorted(sums, points[:, None] * sums[:, -1:], right=True)[:, 0]


def _uniform(key: str) -> float:
    """A number in [0, 1) that looks random and follows from `key`."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53
