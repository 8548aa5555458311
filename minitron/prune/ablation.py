"""Depth importance by trial: run the model without some of its layers and see what is lost.

A layer is bypassed in the loaded model, on whatever pipeline stage it lies, and costs nothing
then; no model is built or written. Every trial gives two numbers from one forward pass: the
language-model loss, and how far the logits have moved from those of the whole model. A few
micro-batches at a time go through all trials, so that the whole model's final hidden states, from
which its logits are made again, are all that has to be kept. A third number, accuracy on tasks,
takes passes of its own.

Source: arXiv:2407.14679 §2.2 (perplexity), arXiv:2408.11796 (contiguous layers, accuracy),
arXiv:2511.16664 (logit distance, layer by layer).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch, EvalBatches
from minitron.metrics import Progress, progress
from minitron.model.llama import LlamaModel
from minitron.model.schedule import run_schedule
from minitron.ops.vocab_parallel import token_chunks
from minitron.prune.depth import Ablation, DepthScores, by_cost
from minitron.sections.prune import AblationConfig
from minitron.train.objective import language_modeling_loss


def measure_depth(
    model: LlamaModel,
    batches: EvalBatches,
    config: AblationConfig,
    accuracy: Callable[[], float] | None = None,
) -> DepthScores:
    """Try what the config asks for on a frozen model; the same result on all ranks.

    Args:
        model: this rank's part.
        batches: this data-parallel rank's.
        config: what to try.
        accuracy: measures the model on tasks; called on all ranks, with the layers bypassed.

    Raises:
        MinitronError: the config asks for more layers than the model has.
    """
    num_layers = model.arch.num_layers
    config.check(num_layers)
    batches = copy.copy(batches)
    batches.num_samples = min(batches.num_samples, config.samples)
    all_layers = range(1, num_layers + 1)
    singles = [[layer] for layer in all_layers] if config.layers or config.greedy else []
    windows = [
        list(range(first, first + length))
        for length in sorted(set(config.windows))
        for first in range(1, num_layers - length + 2)
    ]
    # The whole model and every trial; the greedy search takes its first layer from the singles.
    passes = 1 + len(singles) + len(windows)
    passes += sum(1 + num_layers - gone for gone in range(1, config.greedy))
    whole = None if accuracy is None else accuracy()  # first: it may refuse the metric
    with progress(total=passes * len(batches), desc="depth", unit="passes") as bar:
        run = functools.partial(ablate, model, batches, bar=bar, accuracy=accuracy)
        lm_loss, found = run([*singles, *windows])
        layers = found[: len(singles)]
        greedy = [by_cost(layers, config.criterion)[0]] if config.greedy else []
        while len(greedy) < config.greedy:
            gone = greedy[-1].drop_layers
            _, tried = run([[*gone, layer] for layer in all_layers if layer not in gone])
            greedy.append(by_cost(tried, config.criterion)[0])
    return DepthScores(
        samples=batches.num_samples,
        lm_loss=lm_loss,
        accuracy=whole,
        layers=layers,
        windows=found[len(singles) :],
        greedy=greedy,
        criterion=config.criterion if greedy else None,
    )


def ablate(
    model: LlamaModel,
    batches: EvalBatches,
    removals: Sequence[list[int]],
    *,
    bar: Progress,
    accuracy: Callable[[], float] | None = None,
) -> tuple[float, list[Ablation]]:
    """The loss of the whole model, and what is measured without each of `removals`; collective.

    Args:
        model: this rank's part, frozen.
        batches: this data-parallel rank's.
        removals: layers to leave out, counted from 1.
        bar: advanced by one for every pass of a micro-batch.
        accuracy: see `measure_depth`.
    """
    trials = [[], *removals]
    # Loss, squared distance of logits, squares of the whole model's logits, tokens.
    sums = torch.zeros(len(trials), 4, dtype=torch.float64, device=platform.device())
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, 4 * model.topology.pp_size)):
        whole: list[Tensor] = []  # final hidden states of the group, on the last stage
        for removed, into in zip(trials, sums, strict=True):
            with bypass(model, removed):
                see = functools.partial(_add, model, into, whole, not removed)
                run_schedule(model, group, see, forward_only=True)
            bar.update(len(group))
    if model.topology.tp_rank != 0:
        sums[:, [0, 3]] = 0  # tensor-parallel ranks see the same tokens, but other columns
    dist.all_reduce(sums)
    loss, distance, squares, tokens = sums.unbind(1)
    losses, distances = (loss / tokens).tolist(), (distance / squares).tolist()
    accuracies: list[float | None] = [None] * len(removals)
    if accuracy is not None:
        for i, removed in enumerate(progress(removals, desc="depth: tasks", unit="trials")):
            with bypass(model, removed):
                accuracies[i] = accuracy()
    measured = zip(removals, losses[1:], distances[1:], accuracies, strict=True)
    return losses[0], [
        Ablation(drop_layers=removed, lm_loss=x, logit_distance=y, accuracy=z)
        for removed, x, y, z in measured
    ]


@contextlib.contextmanager
def bypass(model: LlamaModel, layers: Collection[int]) -> Iterator[None]:
    """Let the residual stream pass by these layers, counted from 1, wherever they are."""
    removed = [layer for layer in model.decoder.layers if layer.layer_number in layers]
    for layer in removed:
        layer.forward = _pass_on
    try:
        yield
    finally:
        for layer in removed:
            del layer.forward


def _pass_on(hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
    return hidden_states, None


def _add(
    model: LlamaModel,
    sums: Tensor,
    whole: list[Tensor],
    is_whole: bool,
    hidden: Tensor,
    batch: Batch,
    index: int,
) -> None:
    """Add a micro-batch to the four sums of a trial."""
    if is_whole:
        whole.append(hidden)
    logits = model.logits(hidden)
    mask = batch.loss_mask.t()  # [s, b]
    sums[0] += (language_modeling_loss(model, logits, batch) * mask).sum()
    reference = logits if is_whole else model.logits(whole[index])
    rows, reference_rows = (x.flatten(0, 1)[:, : model.valid_columns] for x in (logits, reference))
    weights = mask.flatten().double()
    for chunk in token_chunks(*rows.shape):
        expected = reference_rows[chunk].float()
        difference = (rows[chunk].float() - expected).square_().sum(1)
        sums[1] += difference.double() @ weights[chunk]
        sums[2] += expected.square_().sum(1).double() @ weights[chunk]
    sums[3] += mask.sum()
