"""Intermediate losses: the student's states are drawn to the teacher's, on any pipeline stage.

    L = L_logits + α · L_is        L_is = Σ over pairs of states of the mean over tokens

A pair is a state of one layer of the student and of one of the teacher. Its loss is computed where
the student's state is, by a hook, and attached to that state's backward pass: it needs no way to
the last stage. Like the loss there it is a sum over the unmasked tokens of a micro-batch, and the
gradients of both are divided by the number of tokens in the global batch when all are done.

Where teacher and student differ in width, one linear map, shared by all pairs and learned with the
student, takes its states to the teacher's width. Every stage holds a copy, in its first chunk of
layers; the gradients of the copies are summed, as those of a tied embedding are.

α = L_logits / L_is, from the means of the step before: the logit loss of a micro-batch is not known
to the earlier stages while they can still use it, and a ratio for every micro-batch would make the
result depend on its size. The first step, which has none before it, learns from the logits alone.
α stays on the device and is part of the checkpoint.

Source: arXiv:2407.14679 §3, §4.2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill.companion import Companion
from minitron.distill.relations import relation_loss
from minitron.distill.states import (
    See,
    Site,
    State,
    TeacherStates,
    find_stages,
    heads_per_rank,
    watch,
)
from minitron.distill.teacher import Teacher
from minitron.errors import MinitronError
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel
from minitron.sections.distill import IntermediateConfig
from minitron.train.objective import Objective


@dataclass(frozen=True)
class Pair:
    """A state of the student and the teacher's that it is to become."""

    student: Site
    teacher: Site

    @property
    def name(self) -> str:
        """What its loss is called in `metrics.jsonl`."""
        student = self.student
        layer = "" if student.state == "embedding" else f"_{student.layer}"
        return f"intermediate/{student.state}{layer}"


def find_pairs(
    config: IntermediateConfig, student: Architecture, teacher: Architecture
) -> list[Pair]:
    """What is compared with what.

    Raises:
        MinitronError: a model has no such layer, a layer of the student is named twice, or its
            heads have no counterpart.
    """
    if "attention_relation" in config.states:
        _check_heads(student, teacher)
    of_layers = [state for state in config.states if state != "embedding"]
    layers = [
        (
            _layer(config, ours, student.num_layers, "student"),
            _layer(config, theirs, teacher.num_layers, "teacher"),
        )
        for ours, theirs in (config.layers if of_layers else ())
    ]
    if len({ours for ours, _ in layers}) < len(layers):
        raise MinitronError(
            f"distill.intermediate.layers={[list(pair) for pair in config.layers]} compares a "
            "layer of the student twice; leave one"
        )
    return [
        Pair(Site(state, ours), Site(state, theirs))
        for state in config.states
        for ours, theirs in ([(0, 0)] if state == "embedding" else layers)
    ]


def _layer(config: IntermediateConfig, layer: int, num_layers: int, model: str) -> int:
    if not -num_layers <= layer < num_layers:
        raise MinitronError(
            f"distill.intermediate.layers={[list(pair) for pair in config.layers]} names layer "
            f"{layer} of the {model}, which has {num_layers}; use {-num_layers} to {num_layers - 1}"
        )
    return layer % num_layers


def _check_heads(student: Architecture, teacher: Architecture) -> None:
    for name in ("num_attention_heads", "num_query_groups"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise MinitronError(
                f"attention_relation compares head with head, but the student has {name}={ours} "
                f"and the teacher {theirs}; leave it out of distill.intermediate.states"
            )


class IntermediateDistillation:
    """An objective for the logits with intermediate losses added.

    Args:
        logits: the objective on the last stage.
        student: this rank's chunks, of plain layers; made before their optimizer.
        teacher: of plain layers; its window counts the states too.
        config: what is compared.
        lm_weight: what the cross-entropy counts in the loss of `logits`; α is of the rest.
        seed: of the map between the widths.

    Raises:
        MinitronError: the models have no such layers or heads.
    """

    def __init__(
        self,
        logits: Objective,
        student: Sequence[LlamaModel],
        teacher: Teacher,
        config: IntermediateConfig,
        *,
        lm_weight: float = 0.0,
        seed: int,
    ) -> None:
        self.training_losses = logits.training_losses
        self.validation_losses = logits.validation_losses
        self._logits = logits
        first = self._student = student[0]  # what is asked of it is the same of all chunks
        self._config = config
        self._lm_weight = lm_weight
        self._pairs = find_pairs(config, first.arch, teacher.model.arch)
        widths = teacher.model.arch.hidden_size, first.arch.hidden_size
        needs_map = widths[0] != widths[1] and not all(p.student.is_relation for p in self._pairs)
        self._companion = Companion(
            first,
            widths if needs_map else None,
            alpha=0.0 if config.weight == "dynamic" else config.weight,
            seed=seed,
        )
        present = [
            any(watch(chunk, pair.student, self._observer(i)) for chunk in student)
            for i, pair in enumerate(self._pairs)
        ]
        self._teacher_states = TeacherStates(
            teacher.model,
            [pair.teacher for pair in self._pairs],
            find_stages(present, first.topology.groups.pp),
            offload=teacher.config.offload_states,
        )
        teacher.share_window(self._teacher_states)
        # For every pair, what each coming micro-batch is compared with, and its mask [s, b].
        self._expected: list[deque[tuple[State, Tensor]]] = [deque() for _ in self._pairs]
        # This rank's sums over tokens: of every pair's loss, the logits' loss and 1.
        self._sums = torch.zeros(
            len(self._pairs) + 2, dtype=torch.float64, device=platform.device()
        )

    def window(self, microbatches: Sequence[Batch]) -> int | None:
        """As long as that of the logits."""
        return self._logits.window(microbatches)

    def prepare(self, microbatches: Sequence[Batch]) -> None:
        """Run the teacher; in training its states come to where the student's will be."""
        if not self._student.training:
            self._logits.prepare(microbatches)
            return
        with self._teacher_states.recording():
            self._logits.prepare(microbatches)
        masks = [
            batch.loss_mask.t().to(platform.device(), non_blocking=True) for batch in microbatches
        ]
        for i, states in enumerate(self._teacher_states.deliver(microbatches)):
            self._expected[i] = deque(zip(states, masks, strict=False))

    def training(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """Losses [s, b] of the logits."""
        losses = self._logits.training(model, hidden, batch, index)
        if self._student.topology.tp_rank == 0:
            mask = batch.loss_mask.t()
            of_logits = losses[self.training_losses[0]].detach()
            if self._lm_weight:
                of_logits = of_logits - self._lm_weight * losses["ce"]
            self._sums[-2] += (of_logits * mask).sum()
            self._sums[-1] += mask.sum()
        return losses

    def validation(
        self, model: LlamaModel, hidden: Tensor, batch: Batch, index: int
    ) -> dict[str, Tensor]:
        """Losses [s, b] of the logits of a held-out micro-batch."""
        return self._logits.validation(model, hidden, batch, index)

    def finish(self, losses: dict[str, float]) -> dict[str, float]:
        """Add each pair's mean loss, `alpha` and their part of the loss; sets the next step's α."""
        losses = self._logits.finish(losses)
        dist.all_reduce(self._sums)
        *pairs, logits = (self._sums[:-1] / self._sums[-1]).unbind()
        alpha = self._companion.alpha
        used = alpha.clone()
        total = torch.stack(pairs).sum()
        if self._config.weight == "dynamic":
            alpha.copy_(torch.where(total > 0, logits.clamp_min(0) / total, 0.0))
        self._sums.zero_()
        minimised = self.training_losses[0]
        *values, weight, whole = torch.stack([*pairs, used[0].double(), total * used[0]]).tolist()
        names = [pair.name for pair in self._pairs]
        return {
            **losses,
            minimised: losses[minimised] + whole,
            **dict(zip(names, values, strict=True)),
            "alpha": weight,
        }

    def _observer(self, index: int) -> See:
        site = self._pairs[index].student
        topology = self._student.topology
        is_split = self._student.config.sequence_parallel
        heads, groups = heads_per_rank(self._student)
        # A rank has its own tokens or heads, or else the same as all tensor-parallel ranks.
        share = 1.0 if is_split or site.is_relation else 1 / topology.tp_size

        def observe(state: Tensor) -> Tensor | None:
            # Held-out data; or the first pass over activations that are to be recomputed: the
            # second one has the gradients. Each layer meets its micro-batches in order in both.
            if not torch.is_grad_enabled():
                return None
            target, mask = self._take(index)
            if site.is_relation:
                losses = relation_loss(state, target, heads, groups) / topology.tp_size
            else:
                losses = self._state_loss(self._companion(state), target)
                if is_split:
                    mask = mask.chunk(topology.tp_size)[topology.tp_rank]
            value = (losses * mask).sum()
            self._sums[index] += value.detach() * share
            scale = self._student.config.grad_scale_func
            return scale(self._companion.alpha[0] * value)

        return observe

    def _take(self, index: int) -> tuple[Tensor, Tensor]:
        """What the next micro-batch is compared with, and its mask."""
        expected = self._expected[index]
        target, mask = expected.popleft()
        if expected and isinstance(expected[0][0], platform.HostCopy):
            expected[0][0].begin()  # it comes while the student computes
        return platform.fetched(target), mask

    def _state_loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Per-token loss [s, b] of two states [s, b, h]."""
        dtype = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        if self._config.loss == "mse":
            return (ours - theirs).square().mean(-1)
        return 1 - F.cosine_similarity(ours, theirs, dim=-1)
