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
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch, EvalBatches
from minitron.errors import MinitronError
from minitron.metrics import Progress, progress
from minitron.model.llama import LlamaModel
from minitron.model.schedule import run_schedule
from minitron.ops.vocab_parallel import token_chunks
from minitron.parallel import is_rank_zero
from minitron.prune.depth import Ablation, DepthCriterion, DepthScores
from minitron.train.objective import language_modeling_loss


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Layers to leave out on trial; each trial is a forward pass."""

    layers: bool = False
    """Every layer by itself: L + 1 passes."""
    windows: list[int] = field(default_factory=list)
    """Every run of so many neighbouring layers; several lengths may be given."""
    greedy: int = 0
    """Layers to take out one after the other, each time the one that costs least then: about L
    passes for each."""
    criterion: DepthCriterion = "lm_loss"
    """What the greedy search minds: lm_loss, logit_distance, or accuracy on tasks."""
    metric: str = "acc"
    """What tasks call their accuracy, such as acc or acc_norm; the mean over tasks counts."""
    samples: int = 128
    """Samples of each pass: the first of the calibration data."""

    def __post_init__(self) -> None:
        for name, lowest in (("greedy", 0), ("samples", 1)):
            if getattr(self, name) < lowest:
                raise MinitronError(f"depth.{name}={getattr(self, name)} must be at least {lowest}")

    @property
    def is_empty(self) -> bool:
        """True where nothing is tried."""
        return not (self.layers or self.windows or self.greedy)

    def check(self, num_layers: int) -> None:
        """Refuse to leave out what the model does not have.

        Raises:
            MinitronError: a window or the greedy search would leave no layer.
        """
        for length in self.windows:
            if not 1 <= length < num_layers:
                raise MinitronError(
                    f"depth.windows={length}, but the model has {num_layers} layers; choose 1 to "
                    f"{num_layers - 1}"
                )
        if self.greedy >= num_layers:
            raise MinitronError(
                f"depth.greedy={self.greedy} leaves none of the model's {num_layers} layers; "
                f"choose at most {num_layers - 1}"
            )


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
    singles = [[layer] for layer in range(1, num_layers + 1)] if config.layers else []
    windows = [
        list(range(first, first + length))
        for length in config.windows
        for first in range(1, num_layers - length + 2)
    ]
    trials = len(singles) + len(windows) + 1
    rounds = sum(num_layers - done + 1 for done in range(config.greedy))
    total = (trials + rounds) * len(batches)
    with progress(total=total, desc="depth", unit="passes", enabled=is_rank_zero()) as bar:
        whole, *found = ablate(model, batches, [*singles, *windows], bar, accuracy)
        greedy: list[Ablation] = []
        for _ in range(config.greedy):
            gone = greedy[-1].drop_layers if greedy else []
            rest = [layer for layer in range(1, num_layers + 1) if layer not in gone]
            _, *tried = ablate(model, batches, [[*gone, layer] for layer in rest], bar, accuracy)
            # Of equals the later layer goes, as for block influence.
            greedy.append(min(reversed(tried), key=lambda trial: trial.cost(config.criterion)))
    return DepthScores(
        samples=batches.num_samples,
        lm_loss=whole.lm_loss,
        accuracy=whole.accuracy,
        layers=found[: len(singles)],
        windows=found[len(singles) :],
        greedy=greedy,
    )


def ablate(
    model: LlamaModel,
    batches: EvalBatches,
    removals: Sequence[list[int]],
    bar: Progress | None = None,
    accuracy: Callable[[], float] | None = None,
) -> list[Ablation]:
    """Loss and logit distance of the whole model and without each of `removals`; collective.

    Args:
        model: this rank's part, frozen.
        batches: this data-parallel rank's.
        removals: layers to leave out, counted from 1.
        bar: advanced by one for every pass of a micro-batch.
        accuracy: see `measure_depth`.

    Returns:
        One more than `removals`; the whole model comes first.
    """
    trials = [[], *removals]
    # Loss, squared distance of logits, squares of the whole model's logits, tokens.
    sums = torch.zeros(len(trials), 4, dtype=torch.float64, device=platform.device())
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, 4 * model.topology.pp_size)):
        whole: list[Tensor] = []  # final hidden states of the group, on the last stage
        for trial, removed in enumerate(trials):
            with bypass(model, removed):
                see = functools.partial(_add, model, sums[trial], whole, not removed)
                run_schedule(model, group, see, forward_only=True)
            if bar is not None:
                bar.update(len(group))
    if model.topology.tp_rank != 0:
        sums[:, [0, 3]] = 0  # tensor-parallel ranks see the same tokens, but other columns
    dist.all_reduce(sums)
    accuracies: list[float | None] = []
    for removed in trials:
        with bypass(model, removed):
            accuracies.append(None if accuracy is None else accuracy())
    return [
        Ablation(
            drop_layers=removed,
            lm_loss=loss / tokens,
            logit_distance=distance / squares,
            accuracy=correct,
        )
        for removed, (loss, distance, squares, tokens), correct in zip(
            trials, sums.tolist(), accuracies, strict=True
        )
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
