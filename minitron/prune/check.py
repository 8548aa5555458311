"""Does the pruned model still know something? Its loss beside the source's and beside chance.

A slice in the wrong place gives a model that loads, runs, and is worthless. One forward pass over a
few samples shows it: the student must be a model of language, better than the same shape cut out at
random, which is sliced from the source as it is loaded and never written. Where there is no data, a
pass over random tokens shows at least that what comes out is finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from minitron import artifact, metrics, platform
from minitron.data.batches import Batch, EvalBatches, collate, open_windows, prepare_data
from minitron.data.indexed import as_prefix
from minitron.data.sampling import Sample
from minitron.data.tokenizer import find_tokenizer
from minitron.errors import MinitronError
from minitron.eval.perplexity import evaluate
from minitron.model.arch import Architecture
from minitron.model.llama import build_llama, check_parallel, freeze
from minitron.model.sharding import open_model
from minitron.model.weights import WeightSource
from minitron.parallel import Topology, initialize, on_rank_zero
from minitron.prune.pruning import PrunedWeights, PruningPlan
from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.prune import CheckConfig
from minitron.train.objective import LanguageModeling

_RANDOM_TOKENS = 8
"""Of the pass without data, for each tensor-parallel rank, so that these can split them."""


def calibration_data(scores_path: Path) -> DataConfig | None:
    """What scores were measured on, if their manifest names it and all of it is still there."""
    directory = scores_path if scores_path.is_dir() else scores_path.parent
    manifest = artifact.read_manifest(directory) or {}
    data = manifest.get("recipe", {}).get("data")
    if not data:
        return None
    for path in data["path"]:
        if not (Path(path).exists() or Path(f"{as_prefix(path)}.idx").exists()):
            return None
    return DataConfig(path=data["path"], seq_length=data["seq_length"])


def check_sizes(
    source: Architecture, target: Architecture, data: DataConfig | None, parallel: ParallelConfig
) -> None:
    """Refuse what `compare_losses`, or without data `check_finite`, could not run; loads nothing.

    Raises:
        MinitronError: the ranks cannot share a model or a sample, or that is too long.
    """
    parallel = parallel.without_interleaving()
    check_parallel(target, parallel)
    if data is not None:
        check_parallel(source, parallel)
        parallel.check_seq_length(data.seq_length)
        source.check_seq_length(data.seq_length)


def compare_losses(
    source_dir: Path,
    student_dir: Path,
    random_plan: PruningPlan,
    *,
    data: DataConfig,
    check: CheckConfig,
    parallel: ParallelConfig,
    precision: Precision,
) -> dict[str, float]:
    """Language-model loss of the source, of the student, and of the source pruned at random.

    All ranks call this and get the same.

    Raises:
        MinitronError: the data cannot be read, the sizes do not divide, or the student's loss is
            not finite.
    """
    arch, weights = open_model(source_dir)
    student_arch, student_weights = open_model(student_dir)
    tokenizer = find_tokenizer(source_dir)
    topology = initialize(parallel)
    prepared = on_rank_zero(lambda: prepare_data(data, tokenizer, vocab_size=arch.vocab_size))
    batches = EvalBatches(
        open_windows(prepared.path, prepared.seq_length),
        micro_batch_size=check.micro_batch_size,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        include_remainder=False,
        max_samples=check.samples,
    )

    def loss(arch: Architecture, weights: WeightSource) -> float:
        return _loss(arch, weights, batches, topology, precision)

    losses = {
        "source": loss(arch, weights),
        "student": loss(student_arch, student_weights),
        "random": loss(random_plan.target, PrunedWeights(weights, random_plan)),
    }
    if not math.isfinite(losses["student"]):
        raise MinitronError(
            f"the pruned model's loss is {losses['student']}, the source's {losses['source']:.4f}; "
            "evaluate the source, and keep more of it"
        )
    return losses


def check_finite(
    student_dir: Path, *, parallel: ParallelConfig, precision: Precision, seed: int
) -> None:
    """Run the student once on random tokens; all ranks call this.

    Raises:
        MinitronError: the sizes do not divide, or the loss is not finite.
    """
    arch, weights = open_model(student_dir)
    topology = initialize(parallel)
    length = _RANDOM_TOKENS * topology.tp_size
    tokens = np.random.default_rng(seed).integers(arch.vocab_size, size=length + 1)
    sample = Sample(tokens, np.ones(length, np.bool_), (-1, -1))
    loss = _loss(arch, weights, [collate([sample], size=1, seq_length=length)], topology, precision)
    if not math.isfinite(loss):
        raise MinitronError(
            f"the pruned model's loss on random tokens is {loss}; evaluate the source, and keep "
            "more of it"
        )


def _loss(
    arch: Architecture,
    weights: WeightSource,
    batches: Iterable[Batch],
    topology: Topology,
    precision: Precision,
) -> float:
    """Language-model loss of a model that is loaded for this and dropped again."""
    model = build_llama(arch, topology, weights, dtype=platform.DTYPES[precision])
    objective = LanguageModeling()
    names = objective.validation_losses
    return evaluate([freeze(model)], batches, objective.validation, names)["val_loss"]


def losses_table(losses: dict[str, float], source: Architecture, target: Architecture) -> str:
    """The three losses with the parameters that they took."""
    rows = [
        ("source", source.num_parameters, losses["source"]),
        ("pruned", target.num_parameters, losses["student"]),
        ("pruned at random", target.num_parameters, losses["random"]),
    ]
    return metrics.format_table(("", "parameters", "lm loss"), rows)
