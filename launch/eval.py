"""Measure a model's loss and perplexity on held-out data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from minitron import artifact, config, platform
from minitron.data.batches import DataConfig, EvalBatches, open_windows, prepare_data
from minitron.data.tokenizer import find_tokenizer
from minitron.errors import MinitronError
from minitron.eval.perplexity import evaluate
from minitron.model.llama import build_llama, freeze
from minitron.model.sharding import open_model
from minitron.parallel import ParallelConfig, initialize, is_rank_zero, on_rank_zero
from minitron.platform import Precision
from minitron.stage import run
from minitron.train.objective import LanguageModeling

EVAL_FILE = "eval.json"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to measure."""

    path: Path
    """Its Hugging Face directory."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The batches of an evaluation."""

    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1:
            raise MinitronError(f"eval.micro_batch_size={self.micro_batch_size} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Measure the language-model loss (nats per token) and the perplexity of a model. Every sample
    of the data is read once, in order, the shorter last one included.
    """

    model: ModelSource
    """The model to measure."""
    data: DataConfig
    """Held-out data, as `path`; `valid_path` is not read."""
    out: Path
    """Directory for eval.json."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Batches."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the result is the same for all."""
    precision: Precision = "fp32"
    """Of weights and activations; the loss is computed in fp32."""
    seed: int = 1234
    """Has no effect: the data is read in order. Every stage accepts it."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""


def main(recipe: Recipe) -> None:
    """Evaluate on all ranks, write on one."""
    recipe.parallel.check_seq_length(recipe.data.seq_length)
    topology = initialize(recipe.parallel, seed=recipe.seed)
    inputs = [recipe.model.path]
    on_rank_zero(lambda: artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=inputs))
    arch, weights = open_model(recipe.model.path)
    arch.check_seq_length(recipe.data.seq_length)
    tokenizer = find_tokenizer(recipe.model.path)
    data = on_rank_zero(lambda: prepare_data(recipe.data, tokenizer, vocab_size=arch.vocab_size))
    batches = EvalBatches(
        open_windows(data.path, data.seq_length),
        micro_batch_size=recipe.eval.micro_batch_size,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        include_remainder=True,
    )
    model = freeze(build_llama(arch, topology, weights, dtype=platform.DTYPES[recipe.precision]))
    objective = LanguageModeling()
    measured = evaluate(
        model, batches, objective.validation, objective.validation_losses, total=len(batches)
    )
    result = {
        "lm_loss": measured["val_loss"],
        "perplexity": math.exp(min(measured["val_loss"], 700.0)),
        "tokens": int(measured["tokens"]),
    }

    def write() -> None:
        with artifact.publish(recipe.out, overwrite=recipe.overwrite) as directory:
            artifact.write_json(directory / EVAL_FILE, result)
            artifact.write_manifest(
                directory,
                stage="eval",
                recipe=config.to_dict(recipe),
                parents={"model": recipe.model.path},
                metrics={**result, "num_parameters": arch.num_parameters},
            )

    on_rank_zero(write)
    if is_rank_zero():
        print(
            "lm_loss {lm_loss:.4f}, perplexity {perplexity:.2f}, {tokens:,} tokens".format(**result)
        )


if __name__ == "__main__":
    run(Recipe, main)
