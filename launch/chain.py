"""Make a large model small in steps: score, prune, distill, and again from the result.

A chain is a recipe of recipes: each stage is a launch script, whose own recipe is built from the
chain's, and leaves an artifact of its own, as if it was started by hand. All is planned first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from minitron.config import Tree
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.stage import parse, run


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to begin with."""

    path: Path
    """Its Hugging Face directory. It teaches all students, unless the distill section names another
    teacher."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Make a large model small in steps: each scores the model of the step before, prunes it to the
    step's shape, and lets the result learn. What the launch scripts of these stages are to do say
    the sections with their names, for all steps; steps add their own. Paths of models and scores
    are filled in. A step whose shape has `prune.rounds: T` is taken in T equal parts. The stages
    leave OUT/STEP/scores, OUT/STEP/pruned and OUT/STEP/distilled.
    """

    model: ModelSource
    """The model to begin with, and the teacher."""
    steps: Tree
    """The smaller models, by name, in the order in which they are made: keys of `importance`,
    `prune` and `distill`, of which the shape is a must."""
    importance: Tree = field(default_factory=dict)
    """Keys of launch/importance.py for all steps, above all its data."""
    prune: Tree = field(default_factory=dict)
    """Keys of launch/prune.py for all steps."""
    distill: Tree = field(default_factory=dict)
    """Keys of launch/distill.py for all steps; without any, steps only score and prune. As flags,
    keys of these sections look like --distill.train.lr and --steps.STEP.distill.train.lr."""
    out: Path
    """Directory of the chain."""
    list_only: bool = False
    """Only check the recipe and print the steps' shapes; one process is enough."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work, where a stage's section does not say otherwise."""
    precision: Precision = "fp32"
    """Of weights and activations, likewise."""
    seed: int = 1234
    """Of all stages, likewise."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Go on behind the last stage that is complete; starts anew if there is none. What is not begun
    yet may have another recipe than before."""


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

import dataclasses
import functools
import importlib.util
import shutil
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from minitron import artifact, config, platform
from minitron.data.batches import TrainBatches, open_train, prepare_data
from minitron.data.tokenizer import Tokenizer, find_tokenizer
from minitron.errors import MinitronError, saying
from minitron.metrics import format_table, log
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.llama import check_parallel
from minitron.parallel import initialize, is_rank_zero, on_rank_zero, world
from minitron.prune.check import check_sizes
from minitron.prune.depth import missing_trials
from minitron.prune.target import arithmetic, target_shape
from minitron.report.table import count_text
from minitron.search.space import Shape
from minitron.sections.prune import PruneConfig
from minitron.train.made import count_complete

PARTS = ("scores", "pruned", "distilled")
"""What launch/importance.py, launch/prune.py and launch/distill.py leave of a step."""
_OWN_KEYS = ("model", "scores", "student", "out", "overwrite", "resume", "until_step")


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """A smaller model on the way; what it says goes before what the recipe says for all steps."""

    importance: Tree = field(default_factory=dict)
    """Keys of launch/importance.py."""
    prune: Tree
    """Keys of launch/prune.py, among them the shape."""
    distill: Tree | None = field(default_factory=dict)
    """Keys of launch/distill.py; null for no distillation after this step."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A launch script and its recipe."""

    step: str
    script: str
    recipe: Any

    @property
    def out(self) -> Path:
        """What it leaves."""
        return self.recipe.out


@dataclass(frozen=True, kw_only=True)
class Step:
    """A smaller model, and the stages that make it, of which the last one leaves it."""

    name: str
    arch: Architecture
    stages: list[Stage]


def main(recipe: Recipe) -> None:
    """Plan, check, and run what is not complete."""
    initialize(ParallelConfig() if recipe.list_only else recipe.parallel, seed=recipe.seed)
    source = hf.read_architecture(recipe.model.path)
    steps = plan(recipe, source)
    stages = [stage for step in steps for stage in step.stages]
    if recipe.list_only:
        if is_rank_zero():
            print(table(source, steps), flush=True)
        return

    def prepare() -> int:
        modes = {"overwrite": recipe.overwrite, "resume": recipe.resume}
        artifact.check_out(recipe.out, **modes, inputs=[recipe.model.path])
        tokenizer, size = find_tokenizer(recipe.model.path), source.vocab_size
        recipes = [stage.recipe for stage in stages]
        complete = count_complete(recipes, tokenizer, vocab_size=size) if recipe.resume else 0
        _check_inputs(stages[complete:], tokenizer, vocab_size=size)
        if recipe.out.exists() and not recipe.resume:
            shutil.rmtree(recipe.out.resolve())
        artifact.create_directory(recipe.out.resolve())
        config.save(recipe, recipe.out / artifact.RECIPE)
        print(f"{table(source, steps)}\n", flush=True)
        log(f"complete: {complete} of {len(stages)} stages")
        return complete

    for stage in stages[on_rank_zero(prepare) :]:
        log(f"{stage.step}: launch/{stage.script}.py, which leaves {stage.out}")
        script(stage.script).main(stage.recipe)
        platform.release_memory()

    def finish() -> None:
        metrics = {"num_parameters": steps[-1].arch.num_parameters, "student": str(stages[-1].out)}
        artifact.write_manifest(
            recipe.out,
            stage="chain",
            recipe=config.to_dict(recipe),
            parents={"model": recipe.model.path},
            metrics=metrics,
        )
        print(f"{table(source, steps)}\n\nstudent: {metrics['student']}\nwrote {recipe.out}")

    on_rank_zero(finish)


@functools.cache
def script(name: str) -> ModuleType:
    """A launch script as a module, of which `Recipe` and `main` are what it promises."""
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"launch_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(recipe: Recipe, source: Architecture) -> list[Step]:
    """All steps with the recipes of their stages.

    Raises:
        MinitronError: a section has keys that its script does not take, or that are the chain's; or
            a shape cannot be reached from the one before.
    """
    if not recipe.steps:
        raise MinitronError("the chain has no steps; give one or more in the section steps")
    steps: list[Step] = []
    model, arch = recipe.model.path, source
    for name, tree in recipe.steps.items():
        if Path(name).name != name or name.startswith("."):
            raise MinitronError(f"steps.{name} names a directory below out; use another name")
        with saying(f"steps.{name}"):
            step = config.build(StepConfig, tree if isinstance(tree, Mapping) else {"prune": tree})
            pruning = _build(recipe, step, "prune", {"model": str(model), "out": name})
            rounds, start = pruning.prune.rounds, arch
            for left in range(rounds, 0, -1):
                title = name if rounds == 1 else f"{name}-{rounds - left + 1}"
                if title in (earlier.name for earlier in steps):
                    raise MinitronError(f"there is a step {title} before; use another name")
                if made := _step(recipe, step, title, model, arch, left):
                    steps.append(made)
                    model, arch = made.stages[-1].out, made.arch
                elif rounds > 1:
                    log(f"steps.{name}: round {rounds - left + 1} changes nothing, and is left out")
            if arch == start:
                sizes = "; ".join(arithmetic(pruning.prune, arch))
                raise MinitronError(
                    f"{_shape(arch)} is the shape of the model before"
                    f"{f' ({sizes})' if sizes else ''}; give another"
                )
    return steps


def _step(
    recipe: Recipe, step: StepConfig, name: str, model: Path, arch: Architecture, rounds: int
) -> Step | None:
    """A step, or a round of one, from the model of the step before; None if that has its shape."""
    scores, pruned, distilled = (str(recipe.out / name / part) for part in PARTS)
    scoring = _build(recipe, step, "importance", {"model": str(model), "out": scores})
    reads = {"model": str(model), "scores": scores, "prune.rounds": rounds}
    pruning = _build(recipe, step, "prune", {**reads, "out": pruned})
    stages = [("importance", scoring), ("prune", pruning)]
    target = target_shape(pruning.prune, arch)
    if target == arch:
        return None
    _check_trials(scoring, pruning.prune, arch.num_layers - target.num_layers)
    scoring.depth.check(arch.num_layers)
    check_parallel(arch, scoring.parallel.without_interleaving())
    arch.check_seq_length(scoring.data.seq_length)
    if pruning.check.samples:
        check_sizes(arch, target, pruning.data or scoring.data, pruning.parallel)
    if step.distill is not None and (recipe.distill or step.distill):
        reads = {"student": pruned, "resume": True}
        learning = _build(recipe, step, "distill", {**reads, "out": distilled})
        check_parallel(target, learning.parallel)
        target.check_seq_length(learning.data.seq_length)
        stages.append(("distill", learning))
    return Step(
        name=name,
        arch=target,
        stages=[Stage(step=name, script=script, recipe=each) for script, each in stages],
    )


def _check_trials(scoring: Any, pruning: PruneConfig, count: int) -> None:
    """Refuse a ranking of layers for which nothing will be tried."""
    if not count or pruning.drop_layers:
        return
    missing = missing_trials(
        pruning.layer_ranking,
        count,
        layers=scoring.depth.layers or scoring.depth.greedy > 0,
        windows=scoring.depth.windows,
        greedy=scoring.depth.greedy,
        tasks=bool(scoring.tasks.names),
    )
    if missing:
        raise MinitronError(
            f"prune.prune.layer_ranking={pruning.layer_ranking} needs trials; give "
            f"--importance.{missing}"
        )


def _build(recipe: Recipe, step: StepConfig, name: str, filled: Mapping[str, Any]) -> Any:
    """A stage's recipe, from what the chain says, the sections for all steps and for this one, and
    what is filled in.
    """
    shared = {
        "parallel": dataclasses.asdict(recipe.parallel),
        "precision": recipe.precision,
        "seed": recipe.seed,
    }
    if name == "distill":
        shared["teacher"] = str(recipe.model.path)
    sections = (getattr(recipe, name), getattr(step, name))
    own = {str(key).partition(".")[0] for section in sections for key in section} & {*_OWN_KEYS}
    if own:
        raise MinitronError(f"{name}.{min(own)} is for the chain to fill in; leave it out")
    with saying(f"launch/{name}.py"):
        return config.build(script(name).Recipe, shared, *sections, filled)


def _check_inputs(stages: list[Stage], tokenizer: Tokenizer | None, *, vocab_size: int) -> None:
    """Refuse what a later stage would refuse; data that is text is tokenised now."""
    _, ranks = world()
    earlier: set[Path] = set()
    for stage in stages:
        recipe = stage.recipe
        with saying(f"steps.{stage.step}: launch/{stage.script}.py"):
            if data := recipe.data:
                data = prepare_data(data, tokenizer, vocab_size=vocab_size)
            if stage.script == "distill":
                if recipe.teacher.path not in earlier:
                    config.check_paths(recipe.teacher, "teacher.")
                TrainBatches(
                    open_train(data),
                    global_batch_size=recipe.train.global_batch_size,
                    micro_batch_size=recipe.train.micro_batch_size,
                    data_parallel_rank=0,
                    data_parallel_size=recipe.parallel.data_parallel_size(ranks),
                    seed=recipe.seed,
                )
            if stage.script != "importance":
                earlier.add(stage.out)


def table(source: Architecture, steps: list[Step]) -> str:
    """The models with their shapes, and what is known of their losses."""
    rows = []
    for name, arch, stages in [("", source, []), *((s.name, s.arch, s.stages) for s in steps)]:
        manifests = {stage.script: artifact.read_manifest(stage.out) or {} for stage in stages}
        found = {script: manifest.get("metrics", {}) for script, manifest in manifests.items()}
        rows.append(
            (
                name,
                _shape(arch),
                count_text(arch.num_parameters),
                count_text(arch.num_non_embedding_parameters),
                f"{arch.num_parameters / source.num_parameters:.1%}",
                found.get("prune", {}).get("lm_loss", {}).get("student"),
                found.get("distill", {}).get("val_loss"),
            )
        )
    headers = ("step", "shape", "params", "non-emb.", "of the first", "pruned", "distilled")
    return (
        f"{format_table(headers, rows)}\n\nLayers (L), hidden size (h), MLP neurons (f), query "
        "heads (n), key/value heads (g). Losses in nats per token: right after pruning on the data "
        "of its check, after distillation on validation data."
    )


def _shape(arch: Architecture) -> str:
    return Shape(arch=arch, costs={}).name


if __name__ == "__main__":
    run(main, recipe)
