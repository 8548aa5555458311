"""How likely a model finds given continuations: what multiple-choice tasks are made of.

Requests of similar length share a micro-batch, padded on the right, where a causal model does not
see it. Data-parallel ranks share the micro-batches; every rank gets all results.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch, collate
from minitron.data.sampling import Sample
from minitron.metrics import progress
from minitron.model.llama import LlamaModel
from minitron.model.schedule import run_schedule
from minitron.ops.cross_entropy import cross_entropy
from minitron.ops.vocab_parallel import vocab_parallel_argmax

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of what follows it."""


def score_continuations(
    model: LlamaModel, requests: Sequence[Request], *, micro_batch_size: int
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation, and whether greedy decoding would give it; collective.

    A context that does not fit in front of its continuation is cut from the left.

    Args:
        model: this rank's part, frozen.
        requests: the same on all ranks; continuations that fit into the model's context.
        micro_batch_size: requests that one data-parallel rank takes through the model at a time.

    Returns:
        In the order of the requests, the same on all ranks.
    """
    topology = model.topology
    longest = model.arch.max_position_embeddings + 1  # the last token is no input
    samples = [_sample(i, *request, longest) for i, request in enumerate(requests)]
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens))
    chunks = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    mine = chunks[topology.dp_rank :: topology.dp_size]
    # Of each request, the log-probability and the number of tokens that are not the likeliest.
    results = torch.zeros(len(requests), 2, dtype=torch.float64, device=platform.device())
    unit = topology.tp_size if topology.config.sequence_parallel else 1
    group_size = 4 * topology.pp_size  # micro-batches that keep a pipeline busy
    groups = [mine[first : first + group_size] for first in range(0, len(mine), group_size)]
    bar = progress(total=len(requests), desc="tasks", unit="requests", transient=True)
    for group in groups:
        length = -(-len(samples[group[0][0]].counted) // unit) * unit
        batches = []
        for chunk in group:
            rows = [samples[i] for i in chunk]
            batches.append(collate(rows, size=micro_batch_size, seq_length=length))

        def see(hidden: Tensor, batch: Batch, index: int, group: list[list[int]] = group) -> None:
            chunk = group[index]
            results[chunk] = _score(model, hidden, batch)[: len(chunk)]

        run_schedule(model, batches, see, forward_only=True)
        bar.update(topology.dp_size * sum(map(len, group)))  # the others are about as far
    bar.close()
    if topology.tp_rank != 0:
        results.zero_()  # tensor-parallel ranks hold the same
    dist.all_reduce(results)
    return [(score, misses == 0) for score, misses in results.tolist()]


def _sample(number: int, context: Sequence[int], after: Sequence[int], longest: int) -> Sample:
    """The request as a sample, of whose labels the continuation counts."""
    tokens = np.array([*context, *after])[-longest:]
    labels = np.arange(len(tokens) - 1)
    return Sample(tokens, labels >= len(labels) - len(after), (0, number))


def _score(model: LlamaModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Sums over the unmasked tokens of each row, [b, 2]: log-probability, and misses."""
    logits = model.logits(hidden)
    labels, tp_group = batch.labels.t(), model.topology.groups.tp
    columns = model.valid_columns
    loss = cross_entropy(logits, labels, valid_columns=columns, tp_group=tp_group)  # [s, b]
    misses = labels != vocab_parallel_argmax(logits, valid_columns=columns, tp_group=tp_group)
    parts = torch.stack([-loss.double(), misses.double()], -1)  # [s, b, 2]
    return (parts * batch.loss_mask.t()[..., None]).sum(0)
