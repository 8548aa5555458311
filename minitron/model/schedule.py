"""Micro-batches through a pipeline: the one caller of megatron-core's schedules.

Training, validation, a teacher's forward pass and importance estimation all do the same: send
micro-batches through the stages and do something with the final hidden states on the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.parallel import Topology

OnOutput = Callable[[Tensor, Batch, int], "tuple[Tensor, Tensor] | None"]
"""Called on the last stage with the hidden states [s, b, h], the micro-batch and its number.

A training step returns the summed loss and the number of tokens in it; a forward pass, None.
"""


def run_schedule(
    model: torch.nn.Module,
    microbatches: Sequence[Batch],
    on_output: OnOutput,
    *,
    forward_only: bool,
) -> None:
    """Send micro-batches through the pipeline, forward and (unless `forward_only`) backward.

    The loss that reaches the parameters is the sum over the micro-batches of all data-parallel
    ranks divided by their number of tokens, whatever the topology.

    Args:
        model: this rank's stage, wrapped for data parallelism or not.
        microbatches: the same on every rank of a pipeline.
        on_output: what to do with the output of the last stage.
        forward_only: no gradients.
    """
    if not microbatches:
        return

    def step(numbered: Iterator[tuple[int, Batch]], stage: torch.nn.Module) -> Any:
        index, batch = next(numbered)
        batch = batch.to(platform.device())
        hidden = stage(batch.tokens, batch.position_ids, None)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
            result = on_output(output, batch, index)
            if result is None:
                return output.new_zeros(()), _NO_TOKENS.to(output.device), None
            return (*result, None)

        return hidden, loss

    b, s = microbatches[0].tokens.shape
    with torch.set_grad_enabled(not forward_only):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(enumerate(microbatches)),
            model=[model],
            num_microbatches=len(microbatches),
            seq_length=s,
            micro_batch_size=b,
            forward_only=forward_only,
        )


_NO_TOKENS = torch.zeros((), dtype=torch.int)


class TokenMeans:
    """Means over all unmasked tokens of every rank's micro-batches.

    Args:
        names: of the quantities; every rank gives the same, although only last stages add values.
        topology: this rank's place.
    """

    def __init__(self, names: Sequence[str], topology: Topology) -> None:
        self._names = tuple(names)
        self._topology = topology
        self._sums = torch.zeros(
            len(self._names) + 1, dtype=torch.float64, device=platform.device()
        )

    def add(self, values: Mapping[str, Tensor], loss_mask: Tensor) -> None:
        """Add a micro-batch's [s, b] values, weighted by its mask [b, s]."""
        mask = loss_mask.t()
        for i, name in enumerate(self._names):
            self._sums[i] += (values[name].detach() * mask).sum()
        self._sums[-1] += mask.sum()

    def reduce(self) -> dict[str, float]:
        """The means, with the number of `tokens`, the same on every rank; one collective."""
        sums = self._sums
        if self._topology.tp_rank != 0:
            sums = torch.zeros_like(sums)  # tensor-parallel ranks hold the same tokens
        dist.all_reduce(sums)
        *totals, tokens = sums.tolist()
        means = {
            name: total / tokens if tokens else float("nan")
            for name, total in zip(self._names, totals, strict=True)
        }
        return {**means, "tokens": tokens}
