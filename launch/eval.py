"""Measure a model's loss on held-out data and its accuracy on tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.eval import TaskConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run

EVAL_FILE = "eval.json"
TASKS_FILE = "tasks.json"


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
    """Measure a model: its language-model loss (nats per token) and perplexity on held-out data,
    every sample of which is read once, in order, the shorter last one included; its accuracy on
    tasks of the lm-evaluation-harness; or both.
    """

    model: ModelSource
    """The model to measure."""
    data: DataConfig | None = None
    """Held-out data, as `path`; `valid_path` is not read."""
    tasks: TaskConfig = field(default_factory=TaskConfig)
    """Tasks to measure accuracy on."""
    out: Path
    """Directory for eval.json (of data) and tasks.json."""
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

    def __post_init__(self) -> None:
        if self.data is None and not self.tasks.names:
            raise MinitronError("there is nothing to measure; give --data.path or --tasks.names")


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import


from minitron import artifact, config, platform
from minitron.data.batches import EvalBatches, open_windows, prepare_data
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.eval.perplexity import evaluate
from minitron.eval.tasks import Tasks, task_table
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.sharding import open_model
from minitron.parallel import Topology, initialize, is_rank_zero, on_rank_zero
from minitron.train.objective import LanguageModeling


def main(recipe: Recipe) -> None:
    """Evaluate on all ranks, write on one."""
    if recipe.data is not None:
        recipe.parallel.check_seq_length(recipe.data.seq_length)
    topology = initialize(recipe.parallel, seed=recipe.seed)
    inputs = [recipe.model.path]
    on_rank_zero(lambda: artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=inputs))
    arch, weights = open_model(recipe.model.path)
    tokenizer = find_tokenizer(recipe.model.path)
    batches = (
        None if recipe.data is None else _batches(recipe, recipe.data, arch, topology, tokenizer)
    )
    tasks = None  # or opened before the model is loaded: a misspelt name shows at once
    if recipe.tasks.names:
        tasks = Tasks(recipe.tasks, tokenizer, recipe.parallel)
    model = freeze(
        build_llama(
            arch,
            topology,
            weights,
            dtype=platform.DTYPES[recipe.precision],
            transformer_impl="local" if tasks and tasks.generate_text else "auto",
        )
    )
    files: dict[str, Any] = {}
    if tasks:
        size = recipe.eval.micro_batch_size
        files[TASKS_FILE] = tasks.evaluate(model, micro_batch_size=size)
    if batches is not None:
        files[EVAL_FILE] = _loss(model, batches)

    def write() -> None:
        with artifact.publish(recipe.out, overwrite=recipe.overwrite) as directory:
            for name, content in files.items():
                artifact.write_json(directory / name, content)
            artifact.write_manifest(
                directory,
                stage="eval",
                recipe=config.to_dict(recipe),
                parents={"model": recipe.model.path},
                metrics={
                    **files.get(EVAL_FILE, {}),
                    "tasks": files.get(TASKS_FILE, {}),
                    "num_parameters": arch.num_parameters,
                },
            )

    on_rank_zero(write)
    if is_rank_zero():
        if batches is not None:
            line = "lm_loss {lm_loss:.4f}, perplexity {perplexity:.2f}, {tokens:,} tokens"
            print(line.format(**files[EVAL_FILE]))
        if tasks:
            print(task_table(files[TASKS_FILE]))
        print(f"wrote {recipe.out}", flush=True)


def _batches(
    recipe: Recipe,
    data: DataConfig,
    arch: Architecture,
    topology: Topology,
    tokenizer: Tokenizer | None,
) -> EvalBatches:
    """This rank's share of the held-out data."""
    arch.check_seq_length(data.seq_length)
    prepared = on_rank_zero(lambda: prepare_data(data, tokenizer, vocab_size=arch.vocab_size))
    return EvalBatches(
        open_windows(prepared.path, prepared.seq_length),
        micro_batch_size=recipe.eval.micro_batch_size,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        include_remainder=True,
    )


def _loss(model: LlamaModel, batches: EvalBatches) -> dict[str, float]:
    """The content of eval.json."""
    objective = LanguageModeling()
    measured = evaluate(
        [model], batches, objective.validation, objective.validation_losses, total=len(batches)
    )
    return {
        "lm_loss": measured["val_loss"],
        "perplexity": math.exp(min(measured["val_loss"], 700.0)),
        "tokens": int(measured["tokens"]),
    }


if __name__ == "__main__":
    run(main, recipe)
