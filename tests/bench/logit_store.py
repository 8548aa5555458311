"""What a store of the teacher's outputs costs, and how near it comes to the teacher.

    python -m tests.bench.logit_store [--demo demo]

On the models of `make demo`: bytes a token, and the KL divergence and gradient that the student
pruned in width finds with what was stored, beside those that the teacher itself gives. The table is
in docs/results/logit_store.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minitron import metrics
from minitron.data.batches import EvalBatches, open_windows
from minitron.distill.offline.block import (
    TokenTargets,
    decode_draws,
    decode_top_k,
    encode_draws,
    encode_top_k,
)
from minitron.model.llama import build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.model.sharding import open_model
from minitron.ops.logit_loss import logit_loss
from minitron.ops.objectives import KL, KnownTokens
from minitron.ops.sample_tokens import sample_tokens
from minitron.ops.sparse_kl import SparseKL
from minitron.ops.top_tokens import top_tokens
from minitron.parallel import Topology, initialize
from minitron.sections.distill import FloatType
from minitron.sections.parallel import ParallelConfig

DATA = "data/docstrings.train"
SAMPLES, SEQ_LENGTH = 64, 128  # whose divergence and gradient are compared
SEEDS = 3  # of draws

Targets = list[tuple[bytes, TokenTargets]]
"""Of each sample, the block and what is read from it."""


@dataclass(frozen=True)
class Stored:
    """One way to keep a teacher's distribution [s, b, v]."""

    name: str
    keep: Callable[[Tensor, int], Targets]
    """Logits and a seed; samples along the second dimension."""
    tail: bool
    seeds: int = 1


def top(k: int, floats: FloatType = "fp16", *, tail: bool = True) -> Stored:
    """The k most probable successors and the rest of the probability, or these alone, made 1."""

    def keep(logits: Tensor, _: int) -> Targets:
        ids, log_q = top_tokens(logits, k, valid_columns=logits.size(-1))
        if not tail:
            log_q = log_q.log_softmax(-1)
        stored = []
        for sample in range(ids.size(1)):
            block = encode_top_k(ids[:, sample].numpy(), log_q[:, sample].numpy(), floats)
            stored.append((block, decode_top_k(block, len(ids), floats)))
        return stored

    note = ("" if floats == "fp16" else f" in {floats}") + ("" if tail else ", without the tail")
    return Stored(f"top {k}{note}", keep, tail)


def draws(number: int, *, independent: bool = False) -> Stored:
    """Systematic draws, or independent ones."""

    def keep(logits: Tensor, seed: int) -> Targets:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(logits.shape[:2], generator=generator, dtype=torch.float64)
        ids, entropy = sample_tokens(logits, uniform, number, valid_columns=logits.size(-1))
        if independent:
            p = logits.flatten(0, 1).softmax(-1)
            rows = torch.multinomial(p, number, replacement=True, generator=generator)
            ids = rows.sort(-1).values.view_as(ids)
        stored = []
        for sample in range(ids.size(1)):
            block = encode_draws(ids[:, sample].numpy(), entropy[:, sample].numpy(), "fp16")
            stored.append((block, decode_draws(block, len(ids), number, "fp16")))
        return stored

    return Stored(f"{number} {'independent ' * independent}draws", keep, False, SEEDS)


STORES = [
    *map(top, (16, 32, 64, 128)),
    top(64, "fp32"),
    top(64, tail=False),
    *map(draws, (12, 25, 50, 100)),
    *(draws(number, independent=True) for number in (12, 50, 100)),
]


def run_model(path: Path, data: Path, topology: Topology) -> tuple[Tensor, Tensor]:
    """Final hidden states [s, b, h] and logits [s, b, v]."""
    arch, weights = open_model(path)
    model = freeze(build_llama(arch, topology, weights, dtype=torch.float32))
    batches = EvalBatches(
        open_windows([str(data)], SEQ_LENGTH),
        micro_batch_size=SAMPLES,
        data_parallel_rank=0,
        data_parallel_size=1,
        include_remainder=False,
        max_samples=SAMPLES,
    )
    found: list[Tensor] = []
    run_schedule(model, list(batches), lambda hidden, *_: found.append(hidden), forward_only=True)
    return found[0], model.logits(found[0])


def measure(
    stored: Stored, hidden: Tensor, student: Tensor, teacher: Tensor, exact: Tensor
) -> tuple[str | float | None, ...]:
    """Bytes a token, in samples of two lengths, and how far divergence and gradient are off."""
    whole = teacher.transpose(0, 1).flatten(0, 1).unsqueeze(1)  # all samples as one
    divergences, errors, cosines, sizes = [], [], [], []
    for seed in range(stored.seeds):
        samples = stored.keep(teacher, seed)
        sizes.append(sum(len(block) for block, _ in samples))
        known, excess = _joined([targets for _, targets in samples])

        def loss(x: Tensor, known: KnownTokens = known, excess: Tensor = excess) -> Tensor:
            return logit_loss(x, known, SparseKL(tail=stored.tail), **_all(x)) + excess

        kl, gradient = _gradient(hidden, student, loss)
        divergences.append(kl)
        errors.append((gradient - exact).norm().item() / exact.norm().item())
        cosines.append(torch.cosine_similarity(gradient, exact, dim=0).item())
    tokens = SAMPLES * SEQ_LENGTH
    return (
        stored.name,
        float(np.mean(sizes)) / tokens,
        len(stored.keep(whole, 0)[0][0]) / tokens,
        float(np.mean(divergences)),
        float(np.std(divergences)) if stored.seeds > 1 else None,
        float(np.mean(errors)),
        float(np.mean(cosines)),
    )


def _all(logits: Tensor) -> dict[str, int]:
    return {"valid_columns": logits.size(-1)}


def _gradient(
    hidden: Tensor, logits: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """The mean loss, and its gradient by the output head, flat."""
    x = logits.clone().requires_grad_()
    mean = loss(x).mean()
    mean.backward()
    by_head = x.grad.flatten(0, 1).t() @ hidden.flatten(0, 1)
    return mean.item(), by_head.flatten()


def _joined(samples: list[TokenTargets]) -> tuple[KnownTokens, Tensor]:
    """Of all samples [s, b, k], filled up, and the excess of their entropy [s, b]."""
    width = max(sample.ids.shape[1] for sample in samples)

    def fill(rows: np.ndarray) -> Tensor:
        missing = ((0, 0), (0, width - rows.shape[1]))
        return torch.from_numpy(np.pad(rows, missing, constant_values=-1))

    ids = torch.stack([fill(sample.ids) for sample in samples], 1)
    log_probs = torch.stack([fill(sample.log_probs) for sample in samples], 1)
    excess = torch.stack([torch.from_numpy(sample.entropy_excess) for sample in samples], 1)
    return KnownTokens(ids, log_probs), excess


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `make demo` wrote")
    options = parser.parse_args()
    topology = initialize(ParallelConfig())
    data = options.demo / DATA
    with torch.no_grad():
        _, teacher = run_model(options.demo / "teacher", data, topology)
        hidden, student = run_model(options.demo / "width_pruned", data, topology)
    kl, exact = _gradient(hidden, student, lambda x: logit_loss(x, teacher, KL(), **_all(x)))
    rows = [measure(stored, hidden, student, teacher, exact) for stored in STORES]
    print(f"divergence {kl:.4f}, samples of {SEQ_LENGTH} tokens, long: {SEQ_LENGTH * SAMPLES}")
    headers = ("stored", "bytes", "bytes, long", "KL found", "±", "gradient error", "cosine")
    print(metrics.format_table(headers, rows))


if __name__ == "__main__":
    main()
