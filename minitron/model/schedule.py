"""Micro-batches through a pipeline: the one caller of megatron-core's schedules.

Training, validation, a teacher's forward pass and importance estimation all do the same: send
micro-batches through the stages and do something with the final hidden states on the last one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.parallel import Topology

OnOutput = Callable[[Tensor, Batch, int], "tuple[Tensor, Tensor] | None"]
"""Called on the last stage with the hidden states [s, b, h], the micro-batch and its number in the
window.

A training step returns the summed loss and the number of tokens in it; a forward pass, None.
"""


def run_schedule(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    microbatches: Sequence[Batch],
    on_output: OnOutput,
    *,
    forward_only: bool,
    window: int | None = None,
    prepare: Callable[[Sequence[Batch]], None] | None = None,
    caches: Sequence[StaticInferenceContext] | None = None,
) -> None:
    """Send micro-batches through the pipeline, forward and (unless `forward_only`) backward.

    The loss that reaches the parameters is the sum over the micro-batches of all data-parallel
    ranks divided by their number of tokens, whatever the topology and the window.

    Args:
        model: this rank's stage, or its chunks; wrapped for data parallelism or not.
        microbatches: the same on every rank of a pipeline.
        on_output: what to do with the output of the last stage.
        forward_only: no gradients.
        window: most micro-batches between two calls of `prepare`; the pipeline drains after each
            window. None sends all at once. Chunks take multiples of the pipeline's stages.
        prepare: called on every rank with the micro-batches of each window before they go.
        caches: keys and values of what each micro-batch has read before, while decoding.
    """
    if not microbatches:
        return
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    stages = get_model_config(chunks[0]).pipeline_model_parallel_size if len(chunks) > 1 else 1
    windows = split_windows(microbatches, window or len(microbatches), multiple_of=stages)
    num_tokens = torch.zeros((), dtype=torch.int, device=platform.device())
    for number, group in enumerate(windows, 1):
        if prepare is not None:
            prepare(group)
        if forward_only or len(windows) == 1:
            _run_window(chunks, group, on_output, forward_only=forward_only, caches=caches)
        else:
            with _accumulating(chunks, num_tokens, last=number == len(windows)):
                _run_window(chunks, group, on_output, forward_only=False)


def split_windows(
    microbatches: Sequence[Batch], window: int, *, multiple_of: int = 1
) -> list[Sequence[Batch]]:
    """Cut a step into as few windows as possible, about equally long: each drains the pipeline.

    All but the last have a multiple of `multiple_of` micro-batches, and at least so many.
    """
    groups = -(-len(microbatches) // multiple_of)
    count = -(-groups // max(window // multiple_of, 1))
    ends = [groups * number // count * multiple_of for number in range(count + 1)]
    return [microbatches[start:end] for start, end in itertools.pairwise(ends)]


@contextlib.contextmanager
def _accumulating(
    chunks: Sequence[torch.nn.Module], num_tokens: Tensor, *, last: bool
) -> Iterator[None]:
    """Let a window add to the gradients of a step, which the last one reduces and scales.

    megatron-core's schedules do both at the end of every call, by the tokens of that call.

    Args:
        chunks: wrapped for data parallelism.
        num_tokens: of the windows before on the last stage; this one's are added.
        last: reduce and scale.
    """
    config = get_model_config(chunks[0])
    no_sync, finalize = config.no_sync_func, config.finalize_model_grads_func

    def count(model: Any, tokens: Tensor, **options: Any) -> None:
        num_tokens.add_(tokens)
        if last:
            finalize(model, num_tokens, **options)

    with contextlib.ExitStack() as stack:
        stack.callback(setattr, config, "finalize_model_grads_func", finalize)
        stack.callback(setattr, config, "no_sync_func", no_sync)
        config.finalize_model_grads_func = count
        if not last:
            for chunk in chunks:
                stack.enter_context(chunk.no_sync())  # type: ignore[operator]
            config.no_sync_func = None  # the schedule would leave it for its last micro-batch
        yield


def _run_window(
    chunks: list[torch.nn.Module],
    microbatches: Sequence[Batch],
    on_output: OnOutput,
    *,
    forward_only: bool,
    caches: Sequence[StaticInferenceContext] | None = None,
) -> None:
    config = get_model_config(chunks[0])
    stages, count = config.pipeline_model_parallel_size, len(microbatches)
    if len(chunks) > 1 and forward_only:  # chunks take a micro-batch for every stage at a time
        microbatches = [*microbatches, *[microbatches[-1]] * (-count % stages)]

    def step(numbered: Iterator[tuple[int, Batch]], stage: torch.nn.Module) -> Any:
        index, batch = next(numbered)
        batch = batch.to(platform.device())
        cache = caches[index] if caches else None
        hidden = stage(batch.tokens, batch.position_ids, None, inference_context=cache)

        def loss(output: Tensor) -> tuple[Tensor, Tensor, None]:
            result = on_output(output, batch, index) if index < count else None
            if result is None:
                return output.new_zeros(()), output.new_zeros((), dtype=torch.int), None
            return (*result, None)

        return hidden, loss

    b, s = microbatches[0].tokens.shape
    with torch.set_grad_enabled(not forward_only):
        schedule = get_forward_backward_func(stages, len(chunks) if len(chunks) > 1 else None)
        schedule(
            forward_step_func=step,
            data_iterator=[iter(enumerate(microbatches)) for _ in chunks],
            model=chunks,
            num_microbatches=len(microbatches),
            seq_length=s,
            micro_batch_size=b,
            forward_only=forward_only,
        )


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
        self.votes = 0.0

    def add(self, values: Mapping[str, Tensor], loss_mask: Tensor) -> None:
        """Add a micro-batch's [s, b] values, weighted by its mask [b, s]."""
        mask = loss_mask.t()
        for i, name in enumerate(self._names):
            self._sums[i] += (values[name].detach() * mask).sum()
        self._sums[-1] += mask.sum()

    def reduce(self, *, vote: bool = False) -> dict[str, float]:
        """The means, with the number of `tokens`, the same on every rank; one collective.

        Args:
            vote: to be counted in the same collective; `votes` then says how many ranks did.
        """
        sums = self._sums
        if self._topology.tp_rank != 0:
            sums = torch.zeros_like(sums)  # tensor-parallel ranks hold the same tokens
        sums = torch.cat([sums, sums.new_tensor([vote])])
        dist.all_reduce(sums)
        *totals, tokens, self.votes = sums.tolist()
        means = {
            name: total / tokens if tokens else float("nan")
            for name, total in zip(self._names, totals, strict=True)
        }
        return {**means, "tokens": tokens}
