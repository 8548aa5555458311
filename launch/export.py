"""Write a training checkpoint as a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class CheckpointSource:
    """A checkpoint of a training run, finished or not."""

    path: Path
    """The run's --out directory."""
    step: int | None = None
    """Step of the checkpoint; null takes the newest."""

    def directory(self) -> Path:
        """The checkpoint's directory.

        Raises:
            MinitronError: the run has no such checkpoint.
        """
        if not self.path.is_dir():
            raise MinitronError(
                f"{self.path} is not a directory; give the --out of a training or distillation run"
            )
        directory = self.path / CHECKPOINTS
        if not directory.is_dir():
            raise MinitronError(
                f"{self.path} is no training run, or one without a checkpoint yet (it has no "
                f"directory {CHECKPOINTS}); give the --out of a training or distillation run"
            )
        steps = list_checkpoints(directory)
        if not steps or self.step not in (None, *steps):
            held = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
            wanted = "a checkpoint" if self.step is None else f"a checkpoint of step {self.step}"
            raise MinitronError(f"{directory} does not hold {wanted}; {held}")
        return checkpoint_path(directory, steps[-1] if self.step is None else self.step)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Write the model of a training checkpoint as a Hugging Face directory, at any step that was
    kept and under any parallelism.
    """

    checkpoint: CheckpointSource
    """The checkpoint to write."""
    out: Path
    """Directory of the model."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; it need not be the run's."""
    precision: Precision | None = None
    """Of the weights on disk; null keeps the run's."""
    seed: int = 1234
    """Has no effect. Every stage accepts it."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, config, platform
from minitron.model import hf
from minitron.model.llama import build_llama
from minitron.model.sharding import save_model
from minitron.parallel import initialize, is_rank_zero, on_rank_zero, publish
from minitron.train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from minitron.train.loop import CHECKPOINTS


def main(recipe: Recipe) -> None:
    """Load on all ranks, write from all ranks."""
    topology = initialize(recipe.parallel, seed=recipe.seed)
    inputs = [recipe.checkpoint.path]
    on_rank_zero(lambda: artifact.check_out(recipe.out, overwrite=recipe.overwrite, inputs=inputs))
    checkpoint = recipe.checkpoint.directory()
    arch = hf.read_architecture(checkpoint)
    stored = hf.read_dtype(checkpoint)
    dtype = stored if recipe.precision is None else platform.DTYPES[recipe.precision]
    model = build_llama(arch, topology, None, dtype=stored)
    position = load_checkpoint(checkpoint, [model])
    with publish(recipe.out, overwrite=recipe.overwrite) as directory:
        save_model([model], directory, dtype=dtype, base_dir=checkpoint)
        on_rank_zero(
            lambda: artifact.write_manifest(
                directory,
                stage="export",
                recipe=config.to_dict(recipe),
                parents={"run": recipe.checkpoint.path},
                metrics={"num_parameters": arch.num_parameters, "step": position.step},
            )
        )
    if is_rank_zero():
        print(f"wrote {recipe.out}", flush=True)


if __name__ == "__main__":
    run(main, recipe)
