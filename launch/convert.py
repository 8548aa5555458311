"""Convert between a Hugging Face directory and a Megatron `torch_dist` checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The Hugging Face side."""

    path: Path
    """A model directory: its weights are converted to Megatron's format or, with
    `checkpoint.path`, its config and tokenizer say what the checkpoint is a model of."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """The Megatron side."""

    path: Path | None = None
    """A torch_dist checkpoint to convert to Hugging Face's format: an iter_* directory, or one
    that holds some, of which the newest is taken."""

    def directory(self) -> Path | None:
        """The iter_* directory itself."""
        if self.path is None:
            return None
        steps = list_checkpoints(self.path)
        return checkpoint_path(self.path, steps[-1]) if steps else self.path


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Convert weights: from Hugging Face to a Megatron torch_dist checkpoint, or back when
    `checkpoint.path` is given. No other stage needs this; it is for people who come from, or go
    to, Megatron-LM. A checkpoint is a pickle in part: convert only what you trust.
    """

    model: ModelSource
    """The Hugging Face directory."""
    checkpoint: CheckpointSource = field(default_factory=CheckpointSource)
    """The Megatron checkpoint; without a path, the output is one."""
    out: Path
    """Directory of the result."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the result can be read under any other."""
    precision: Precision | None = None
    """Of the weights on disk; null keeps the model's."""
    seed: int = 1234
    """Has no effect. Every stage accepts it."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import


from minitron import artifact, config, platform
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.llama import build_llama
from minitron.model.sharding import open_model, save_model
from minitron.parallel import initialize, is_rank_zero, on_rank_zero, publish
from minitron.train.checkpoint import (
    ModelFiles,
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def main(recipe: Recipe) -> None:
    """Load on all ranks, write from all ranks."""
    topology = initialize(recipe.parallel, seed=recipe.seed)
    inputs = [recipe.model.path, recipe.checkpoint.path]
    on_rank_zero(lambda: artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=inputs))
    path = recipe.model.path
    checkpoint = recipe.checkpoint.directory()
    stored = hf.read_dtype(path)
    dtype = stored if recipe.precision is None else platform.DTYPES[recipe.precision]
    parents = {"model": path}
    if checkpoint is None:
        arch, weights = open_model(path)
        model = build_llama(arch, topology, weights, dtype=dtype)
    else:
        parents["checkpoint"] = checkpoint
        arch = hf.read_architecture(path)
        _check_same_model(path, arch, checkpoint)
        model = build_llama(arch, topology, None, dtype=dtype)
        load_checkpoint(checkpoint, [model])
    with publish(recipe.out, overwrite=recipe.overwrite) as directory:
        if checkpoint is None:
            files = ModelFiles(dtype=dtype, base_dir=path, tokenizer=None)
            save_checkpoint(directory, Position(), [model], files=files)
        else:
            save_model([model], directory, dtype=dtype, base_dir=path)
        on_rank_zero(
            lambda: artifact.write_manifest(
                directory,
                stage="convert",
                recipe=config.to_dict(recipe),
                parents=parents,
                metrics={"num_parameters": arch.num_parameters},
            )
        )
    if is_rank_zero():
        print(f"wrote {recipe.out}", flush=True)


def _check_same_model(path: Path, arch: Architecture, checkpoint: Path) -> None:
    """Refuse a model whose shape is not the one that minitron wrote beside the checkpoint.

    Padding hides another vocabulary from Megatron's own check.

    Raises:
        MinitronError: the shapes differ.
    """
    if not (checkpoint / hf.CONFIG_FILE).exists():
        return
    stored = dataclasses.asdict(hf.read_architecture(checkpoint))
    for name, value in dataclasses.asdict(arch).items():
        if stored[name] != value:
            raise MinitronError(
                f"{checkpoint} is of another model than {path}: {name} is {stored[name]} there "
                f"and {value} here; give --model the model that was trained"
            )


if __name__ == "__main__":
    run(main, recipe)
