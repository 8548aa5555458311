"""Intermediate states: where they live in a model, and how a teacher's reach the student's stage.

    embedding            the embedding after the first layer norm it meets, [s, b, h]
    block_output         a layer's output after the next layer norm or the final one, [s, b, h]
    mlp_input            the output of a layer's second layer norm, [s, b, h]
    attention_relation   query, key and value as attention takes them, [s, b, (n + 2g)·d]

All but the last are outputs of a norm, as the paper has them: the scale of the residual stream
grows with depth, and what the next matrix reads does not. A block's output therefore lives where
the *next* layer does, which may be another pipeline stage. Under tensor parallelism a rank holds
[s, b, h] whole or [s/t, b, h] and [s, b, (n + 2g)·d/t]: the same part of the teacher's state as of
the student's, so that only pipeline stages have anything to send each other.

Source: arXiv:2407.14679 §3.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.model.llama import LlamaModel
from minitron.sections.distill import StateName

See = Callable[[Tensor], "Tensor | None"]
"""Called with a state; what it returns, a loss, is attached to the model's backward pass."""

State = Tensor | platform.HostCopy
"""On the device, or waiting in host memory."""


@dataclass(frozen=True)
class Site:
    """One state of one layer."""

    state: StateName
    layer: int
    """Counted from 0 over the whole model; not used by `embedding`."""

    @property
    def is_relation(self) -> bool:
        """Whether the state is that of attention heads and not of the residual stream."""
        return self.state == "attention_relation"


class _AttachLoss(torch.autograd.Function):
    """Passes `output` on; in backward, `loss` gets the gradient 1, as if it were minimised too.

    This is megatron-core's `MoEAuxLossAutoScaler` without its global scale.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(loss)


def attach_loss(output: Tensor, loss: Tensor) -> Tensor:
    """`output`, whose backward pass is also that of the scalar `loss`."""
    return _AttachLoss.apply(output, loss)


def watch(model: LlamaModel, site: Site, see: See) -> bool:
    """Show `see` every state of a site on this stage; False if the site is on another.

    The model is built of plain layers (`transformer_impl="local"`), whose norms can be hooked.
    """
    layers = {layer.layer_number - 1: layer for layer in model.decoder.layers}

    def see_output(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor | None:
        loss = see(output)
        return None if loss is None else attach_loss(output, loss)

    def see_attention(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        query, *rest = inputs
        packed = torch.cat([x.flatten(2) for x in (query, *rest[:2])], -1)
        loss = see(packed)
        return None if loss is None else (attach_loss(query, loss), *rest)

    if site.is_relation:
        if site.layer in layers:
            layers[site.layer].self_attention.core_attention.register_forward_pre_hook(
                see_attention
            )
        return site.layer in layers
    norm: torch.nn.Module | None = None
    if site.state == "mlp_input":
        norm = layers[site.layer].pre_mlp_layernorm if site.layer in layers else None
    else:
        reader = 0 if site.state == "embedding" else site.layer + 1
        if reader in layers:
            norm = layers[reader].input_layernorm
        elif reader == model.arch.num_layers:
            norm = model.decoder.final_layernorm  # None but on the last stage
    if norm is not None:
        norm.register_forward_hook(see_output)
    return norm is not None


def find_stages(present: Sequence[bool], group: dist.ProcessGroup) -> list[int]:
    """The pipeline stage of every site, from what each stage says of its own; collective."""
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, list(present), group=group)
    return [stages.index(True) for stages in zip(*found, strict=True)]


def heads_per_rank(model: LlamaModel) -> tuple[int, int]:
    """Query heads and key/value heads that attention works with on this rank.

    A key/value head whose query heads lie on several ranks is on each of them.
    """
    arch, tp_size = model.arch, model.topology.tp_size
    return arch.num_attention_heads // tp_size, max(arch.num_query_groups // tp_size, 1)


class TeacherStates:
    """Keeps the teacher's states of the micro-batches at hand where the student wants them.

    Args:
        teacher: this rank's part, frozen, of plain layers.
        sites: of the teacher; the same on every rank.
        destinations: the pipeline stage that wants each of them.
        offload: keep them in host memory.
    """

    def __init__(
        self,
        teacher: LlamaModel,
        sites: Sequence[Site],
        destinations: Sequence[int],
        *,
        offload: bool = False,
    ) -> None:
        self._teacher = teacher
        self._sites = sites
        self._destinations = destinations
        self._offload = offload
        self._is_recording = False
        self._states: list[deque[State]] = [deque() for _ in sites]
        present = [watch(teacher, site, self._recorder(i)) for i, site in enumerate(sites)]
        self._sources = find_stages(present, teacher.topology.groups.pp)

    def _recorder(self, index: int) -> See:
        def record(state: Tensor) -> None:
            if self._is_recording:
                self._states[index].append(self._put(state))

        return record

    def _put(self, state: Tensor) -> State:
        return platform.HostCopy(state) if self._offload else state

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the states of the micro-batches that go through the teacher meanwhile."""
        self._states = [deque() for _ in self._sites]
        self._is_recording = True
        try:
            yield
        finally:
            self._is_recording = False

    def deliver(self, microbatches: Sequence[Batch]) -> list[list[State]]:
        """The states of each site, by micro-batch, on the stage that wants them; collective.

        Elsewhere a site's list is empty. States of another stage are sent now, point to point.
        """
        delivered: list[list[State]] = [[] for _ in self._sites]
        for batch in microbatches:
            for into, state in zip(delivered, self._exchange(batch), strict=True):
                if state is not None:
                    into.append(state)
        return delivered

    def _exchange(self, batch: Batch) -> list[State | None]:
        """What this stage wants of the next micro-batch, by site."""
        topology = self._teacher.topology
        group, stage = topology.groups.pp, topology.pp_rank
        operations = []
        wanted: list[State | None] = [None] * len(self._sites)
        arriving: dict[int, Tensor] = {}
        for i, (source, destination) in enumerate(
            zip(self._sources, self._destinations, strict=True)
        ):
            if source == destination == stage:
                wanted[i] = self._states[i].popleft()
            elif source == stage:
                peer = dist.get_global_rank(group, destination)
                state = platform.fetched(self._states[i].popleft()).contiguous()
                operations.append(dist.P2POp(dist.isend, state, peer, group))
            elif destination == stage:
                peer = dist.get_global_rank(group, source)
                arriving[i] = torch.empty(
                    self._shape(self._sites[i], batch),
                    dtype=self._teacher.config.params_dtype,
                    device=platform.device(),
                )
                operations.append(dist.P2POp(dist.irecv, arriving[i], peer, group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        for i, state in arriving.items():
            wanted[i] = self._put(state)
        return wanted

    def bytes_by_stage(self, batch: Batch) -> list[int]:
        """What a micro-batch's states take on a rank of every stage, where they arise and where
        they are wanted; the same on all ranks."""
        sizes = [0] * self._teacher.topology.pp_size
        itemsize = self._teacher.config.params_dtype.itemsize
        for site, *stages in zip(self._sites, self._sources, self._destinations, strict=True):
            for stage in set(stages):
                sizes[stage] += math.prod(self._shape(site, batch)) * itemsize
        return sizes

    def _shape(self, site: Site, batch: Batch) -> tuple[int, int, int]:
        """[s, b, h] of a state on this rank."""
        teacher = self._teacher
        b, s = batch.tokens.shape
        width = teacher.arch.hidden_size
        if site.is_relation:
            heads, groups = heads_per_rank(teacher)
            width = (heads + 2 * groups) * teacher.arch.kv_channels
        elif teacher.config.sequence_parallel:
            s //= teacher.topology.tp_size
        return s, b, width
