"""Every loss of a distillation, and what one fp64 process makes of it.

That process runs transformers' models in fp64, the losses of `tests.ops.definitions` and the hooks
of `tests.reference`, which share no code with what they test.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron.distill.losses import AGREEMENT_STRIDE
from minitron.distill.offline.store import LogitStore
from minitron.sections.distill import DistillConfig, IntermediateConfig
from tests import reference
from tests.ops import definitions
from tests.runs import VOCAB, Run

TEMPERATURE = 1.3
VARIANTS: dict[str, dict[str, float]] = {
    "": {},
    ", labels": {"lm_weight": 0.3},
    ", warm": {"temperature": TEMPERATURE, "temperature_power": 2.0},
    ", warm, labels": {"temperature": TEMPERATURE, "temperature_power": 2.0, "lm_weight": 0.3},
}
STORED = {", warm": {"temperature": TEMPERATURE}, ", warm, labels": VARIANTS[", warm, labels"]}
# The last pair is that of the final norms, and on two stages the others' states travel both ways.
LAYERS = [(0, 1), (2, 0), (-1, -1)]
STATES = ("embedding", "block_output", "mlp_input", "attention_relation")


@dataclass(frozen=True)
class Case:
    """One loss."""

    distill: DistillConfig
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    store: str | None = None
    """Of the teacher's outputs, instead of the teacher."""

    @property
    def runs_kernels(self) -> bool:
        """Whether it asks something of the kernels that no simpler case does."""
        warm = self.distill.temperature != 1
        return warm == bool(self.distill.lm_weight) and not self.intermediate.states

    @property
    def steps(self) -> int:
        """Steps until the loss is whole: a dynamic weight is that of the step before."""
        return 2 if self.intermediate.states and self.intermediate.weight == "dynamic" else 1


def _in_fp32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _config(**options: Any) -> DistillConfig:
    return DistillConfig(
        jsd_beta=definitions.BETA,
        skew_alpha=definitions.ALPHA,
        top_k=definitions.K,
        top_p=definitions.P,
        **options,
    )


def _intermediate(**options: Any) -> IntermediateConfig:
    return IntermediateConfig(layers=LAYERS, **options)


def _cases() -> dict[str, Case]:
    of_logits = {
        loss + variant: Case(_config(loss=loss, **options))
        for loss in definitions.OBJECTIVES
        for variant, options in VARIANTS.items()
    }
    of_stores = {
        f"stored {store}{variant}": Case(_config(**options), store=store)
        for store in ("full", "top_k", "draws")
        for variant, options in STORED.items()
    }
    distances = {
        f"{state}, {distance}": {"states": [state], "loss": distance, "weight": 0.5}
        for state in STATES[:-1]
        for distance in ("cosine", "mse")
    }
    every = [*STATES]
    inside = distances | {
        STATES[-1]: {"states": [STATES[-1]], "weight": 0.5},
        "all states, dynamic": {"states": every},
        "all states, mse, dynamic": {"states": every, "loss": "mse"},
    }
    of_states = {
        name: Case(_config(), intermediate=_intermediate(**options))
        for name, options in inside.items()
    }
    # α weighs against the loss between logits, without the labels' part.
    of_states["all states, dynamic, labels"] = Case(
        _config(loss="jsd", **VARIANTS[", warm, labels"]), intermediate=_intermediate(states=every)
    )
    return of_logits | of_stores | of_states


CASES = _cases()


@dataclass(frozen=True)
class Expected:
    """A step's record and gradients, by Hugging Face's names and `map`."""

    record: dict[str, float]
    gradients: dict[str, Tensor]


class Oracle:
    """What the losses of a run's first global batch are."""

    def __init__(self, run: Run, stores: Path) -> None:
        assert run.teacher is not None
        self._run, self._stores = run, stores
        self._student = reference.load_fp64(run.model)
        self._teacher = reference.load_fp64(run.teacher.source)
        self._batch = reference.global_batch(run, 0)
        assert 0 < self._batch.loss_mask.mean() < 1
        self._output = self._student(self._batch.tokens).logits
        with torch.no_grad():
            self._target = self._teacher(self._batch.tokens).logits
        self._mean = functools.partial(reference.masked_mean, batch=self._batch)

    def expect(self, case: Case) -> Expected:
        """The last of a case's steps."""
        config = case.distill
        kl = self._objective("forward_kl", config.temperature)
        objective = self._objective(config.loss, config.temperature)
        if case.store is not None:
            kl = objective = self._stored(case.store, config.temperature)
        loss = config.temperature**config.temperature_power * objective
        parameters = dict(self._student.named_parameters())
        ce = self._cross_entropy
        record = {"kl": kl.item(), "ce": ce.item()}
        if case.store != "draws":
            record["top1_agreement"] = self._agreement.item()
        if case.intermediate.states:
            run = dataclasses.replace(self._run, intermediate=case.intermediate)
            plain = reference.Intermediate(run, self._student, self._teacher)
            for _ in range(case.steps):
                total, parts = plain.add(loss, self._batch)
                plain.alpha = _in_fp32(plain.alpha)  # as it is kept
            loss, record = total, record | parts
            if plain.map is not None:
                parameters["map"] = plain.map
        loss = loss + config.lm_weight * ce
        found = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
        count = self._batch.loss_mask.sum().item()  # by which megatron-core divides in fp32
        gradients = {
            name: gradient * count * _in_fp32(1 / count)
            for name, gradient in zip(parameters, found, strict=True)
        }
        return Expected(record | {"loss": loss.item()}, gradients)

    @functools.cached_property
    def _cross_entropy(self) -> Tensor:
        flat = self._output.transpose(1, 2)
        return self._mean(F.cross_entropy(flat, self._batch.labels, reduction="none"))

    @functools.cache  # noqa: B019 - the oracle lives as long as the tests
    def _objective(self, name: str, temperature: float) -> Tensor:
        return self._mean(definitions.objective(name, self._output, self._target, temperature))

    @functools.cache  # noqa: B019
    def _stored(self, name: str, temperature: float) -> Tensor:
        """What a store holds: everything, the most probable tokens and a tail, or draws."""
        if name != "draws":
            return self._objective({"full": "forward_kl"}.get(name, name), temperature)
        log_q = F.log_softmax(self._target / temperature, -1)
        log_p = F.log_softmax(self._output / temperature, -1)
        return self._mean((log_q.exp() * log_q).sum(-1) - (self._drawn * log_p).sum(-1))

    @functools.cached_property
    def _drawn(self) -> Tensor:
        """Shares [b, s, v] of the store's draws."""
        store = LogitStore(self._stores / "draws")
        drawn = torch.zeros(*self._batch.tokens.shape, VOCAB + 1, dtype=torch.float64)
        for row, sample in enumerate(self._batch.sample_ids.tolist()):
            targets = store.read(tuple(sample), self._batch.tokens[row].numpy())
            weights = torch.from_numpy(np.exp(targets.log_probs.astype(np.float64)))
            drawn[row].scatter_(-1, torch.from_numpy(targets.ids) % (VOCAB + 1), weights)
        return drawn[..., :VOCAB]

    @functools.cached_property
    def _agreement(self) -> Tensor:
        """How often the most probable tokens are the same, at the positions that are looked at."""
        agrees = self._output.argmax(-1) == self._target.argmax(-1)
        looked_at = self._batch.loss_mask * (torch.arange(agrees.size(1)) % AGREEMENT_STRIDE == 0)
        return (agrees * looked_at).sum() / looked_at.sum()
