"""Mean losses over held-out data, token-weighted over all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from minitron.data.batches import Batch
from minitron.metrics import progress
from minitron.model.llama import LlamaModel
from minitron.model.schedule import TokenMeans, run_schedule
from minitron.parallel import is_rank_zero

Losses = Callable[[LlamaModel, Tensor, Batch, int], dict[str, Tensor]]


def evaluate(
    model: Sequence[LlamaModel],
    batches: Iterable[Batch],
    losses: Losses,
    names: Sequence[str],
    *,
    window: Callable[[Sequence[Batch]], int | None] = lambda _: None,
    prepare: Callable[[Sequence[Batch]], None] | None = None,
    total: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Run a model over held-out batches.

    Args:
        model: this rank's chunks; their training mode is kept.
        batches: this data-parallel rank's; as many on every rank.
        losses: final hidden states → named per-token losses [s, b], on the last stage.
        names: of those losses.
        window: most micro-batches to prepare at a time; None for all at hand.
        prepare: called with each window of batches before it goes through the model.
        total: batches in all, for the progress bar; None shows no bar.
        check: called on all ranks before some batches go through the model; may raise.

    Returns:
        The mean of every loss in nats per token, and `tokens`, the same on all ranks.
    """
    means = TokenMeans(names, model[-1].topology)

    def on_output(hidden: Tensor, batch: Batch, index: int) -> None:
        means.add(losses(model[-1], hidden, batch, index), batch.loss_mask)

    # A pipeline is kept busy by several micro-batches at once; each needs little memory.
    group_size = 4 * model[-1].topology.pp_size
    iterator = iter(batches)
    training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    with progress(
        total=total, desc="eval", unit="batches", enabled=total is not None and is_rank_zero()
    ) as bar:
        while group := list(itertools.islice(iterator, group_size)):
            check()
            run_schedule(
                model, group, on_output, forward_only=True, window=window(group), prepare=prepare
            )
            bar.update(len(group))
    for chunk, mode in zip(model, training, strict=True):
        chunk.train(mode)
    return means.reduce()
