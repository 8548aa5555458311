"""Search the best smaller shape of a model under budgets: count, prune, race."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.distill import DistillConfig
from minitron.sections.parallel import ParallelConfig, Precision
from minitron.sections.prune import SelectionConfig
from minitron.sections.search import BudgetConfig, DeploymentConfig, GridConfig, RaceConfig
from minitron.sections.train import TrainConfig
from minitron.stage import parse, run

BEST_DIR = "best"


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The model to make smaller; it is the teacher too."""

    path: Path
    """Its Hugging Face directory."""
    allow_untrained: bool = False
    """Search even with a model that predicts the validation data no better than chance."""


@dataclass(frozen=True, kw_only=True)
class ScoresSource:
    """Importance scores of that model."""

    path: Path | None = None
    """Directory that launch/importance.py wrote. Not read where prune.method needs no scores and
    prune.layer_ranking no trials."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Search the best smaller shape of a model: count what every shape of a grid costs, prune the
    model to those that fit the budgets and measure their loss, then distill the best of them for a
    while, the worse part dropping out at every rung. The winner is written as a model, in the
    directory `best`, and its shape is what a full distillation should start from. A shape whose
    training diverges drops out of the race.
    """

    model: ModelSource
    """The model to make smaller; it is the teacher too."""
    scores: ScoresSource = field(default_factory=ScoresSource)
    """Its importance scores."""
    prune: SelectionConfig = field(default_factory=SelectionConfig)
    """How what stays is chosen, for every shape; as in launch/prune.py."""
    grid: GridConfig = field(default_factory=GridConfig)
    """The shapes to look at: each size with all of the others; an axis without any stays."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """The limits that they must keep: one number is the most, two are the least and the most."""
    deployment: DeploymentConfig = field(default_factory=DeploymentConfig)
    """What memory and latency are counted for."""
    list_only: bool = False
    """Only print the shapes that fit and what they cost. Needs one process and no data, and scores
    only where a layer_ranking reads trials; `--scores null` leaves out those of a recipe."""
    data: DataConfig | None = None
    """Data of the race, and of validation, which decides; not needed with `list_only`."""
    out: Path
    """Directory of the search."""
    race: RaceConfig = field(default_factory=RaceConfig)
    """Who is distilled for how long."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The loss of the race."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=400))
    """Steps, batches, optimizer of the race."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How ranks share the work; the result is the same."""
    precision: Precision = "fp32"
    """Of weights and activations; the optimizer keeps fp32 main weights."""
    seed: int = 1234
    """Of the order of the samples, which is the same for all shapes."""
    overwrite: bool = False
    """Replace `out` if minitron wrote it."""
    resume: bool = False
    """Go on with the search in `out`, from what was measured and from its newest checkpoints;
    starts anew if there is none."""

    def __post_init__(self) -> None:
        self.race.all_rungs(self.train.steps)
        if self.grid == GridConfig():
            axes = ", ".join(f"grid.{axis.name}" for axis in dataclasses.fields(GridConfig))
            raise MinitronError(f"the grid has no sizes to search; give at least one of {axes}")
        if self.scores.path is None and self.prune.method == "activation" and not self.list_only:
            raise MinitronError(
                "pruning needs importance scores; give --scores.path, a directory that "
                "launch/importance.py wrote, or another prune.method"
            )
        if self.data is None and not self.list_only:
            raise MinitronError(
                "a race needs data; give --data.path and --data.valid_path, or --list_only to "
                "count shapes without a race"
            )
        if self.data is not None and not self.data.valid_path and not self.list_only:
            raise MinitronError("shapes are compared by validation loss; give --data.valid_path")
        if self.distill.intermediate.states:
            raise MinitronError(
                f"distill.intermediate.states={self.distill.intermediate.states} pairs layers, "
                "which differ from shape to shape; race on the logits alone"
            )
        if self.parallel.layers_per_stage is not None:
            raise MinitronError(
                f"parallel.layers_per_stage={self.parallel.layers_per_stage} suits one depth only; "
                "leave it out, and the layers of every shape are spread evenly"
            )


if __name__ == "__main__":
    recipe = parse(Recipe)  # before what takes seconds to import

from minitron import artifact, config, platform
from minitron.data.tokenizer import find_tokenizer
from minitron.distill.gates import check_trained, check_weights
from minitron.distill.losses import LogitDistillation
from minitron.distill.teacher import Teacher, teacher_topology
from minitron.metrics import log, progress
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.llama import build_llama
from minitron.model.sharding import open_model
from minitron.parallel import initialize, is_rank_zero, on_rank_zero, publish
from minitron.prune.pruning import PruningPlan
from minitron.prune.selection import LayerChoice, plan_selected, prune_flags, stored_scores
from minitron.search.cost import LatencyMeter, memory_gb
from minitron.search.plot import plot_race
from minitron.search.race import run_race
from minitron.search.results import Candidate, Results, load_results
from minitron.search.space import find_shapes
from minitron.search.trials import Trials, check_candidate
from minitron.sections.distill import TeacherConfig
from minitron.train.checkpoint import ModelFiles
from minitron.train.lock import unlock
from minitron.train.run import fingerprints, has_more_to_do, open_batches, open_run


def main(recipe: Recipe) -> None:
    """Count, prune, race, and write the winner."""
    source = hf.read_architecture(recipe.model.path)
    rungs = recipe.race.all_rungs(recipe.train.steps)
    if recipe.list_only:
        initialize(ParallelConfig(), seed=recipe.seed)  # counting needs no ranks
        layers = LayerChoice(recipe.prune, recipe.model.path, recipe.scores.path)
        results = on_rank_zero(lambda: _count(recipe, source, layers))
        if is_rank_zero():
            print(results.table(()), flush=True)
        return
    assert recipe.data is not None, "the recipe has checked"
    topology = initialize(recipe.parallel, seed=recipe.seed)
    sources = [recipe.model.path, recipe.scores.path]
    on_rank_zero(
        lambda: artifact.check_out(
            recipe.out, overwrite=recipe.overwrite, resume=recipe.resume, inputs=sources
        )
    )
    source, weights = open_model(recipe.model.path)
    source.check_seq_length(recipe.data.seq_length)
    scores = stored_scores(recipe.prune, recipe.model.path, recipe.scores.path, seed=recipe.seed)
    assert scores is not None, "the recipe has checked"
    layers = LayerChoice(recipe.prune, recipe.model.path, recipe.scores.path)
    tokenizer = find_tokenizer(recipe.model.path)
    batches, validation = open_batches(
        recipe.data,
        recipe.train,
        topology,
        tokenizer=tokenizer,
        vocab_size=source.vocab_size,
        seed=recipe.seed,
    )
    assert validation is not None, "the recipe has checked"
    read = {"model": recipe.model.path, "scores": recipe.scores.path}
    inputs = fingerprints(read, batches, validation)
    if not has_more_to_do(recipe, inputs):
        return
    results = on_rank_zero(
        lambda: (
            (recipe.resume and load_results(recipe.out, source)) or _count(recipe, source, layers)
        )
    )
    open_run(recipe, inputs)  # nothing is left behind by a grid of which nothing fits
    dtype = platform.DTYPES[recipe.precision]
    files = ModelFiles(dtype=dtype, base_dir=recipe.model.path, tokenizer=tokenizer)
    layers.announce()

    def plan(arch: Architecture) -> PruningPlan:
        drop_layers = layers.drop_layers(source.num_layers - arch.num_layers)
        return plan_selected(recipe.prune, source, arch, scores, drop_layers)

    trials = Trials(plan, weights, topology, batches, validation, recipe.train, files, recipe.out)
    teaching = TeacherConfig(path=recipe.model.path)
    stages = teacher_topology(teaching, topology, source.num_layers)
    teacher = Teacher(build_llama(source, stages, weights, dtype=dtype), teaching)
    check_weights(teacher.model, recipe.model.path)

    def save() -> None:
        def write() -> None:
            plot_race(recipe.out, results.ranked())
            results.save(recipe.out, rungs)

        on_rank_zero(write)

    if results.source_loss is None:
        results.source_loss = trials.loss([teacher.model])
        if not recipe.model.allow_untrained:
            check_trained(results.source_loss, source, "--model.allow_untrained")
    save()
    _measure_pruned(results, trials, save)
    best = _race(recipe, results, trials, LogitDistillation(teacher, recipe.distill), save)
    _write_best(recipe, results, trials, best, save)
    if is_rank_zero():
        print(results.table(rungs), flush=True)
        print(f"\n{_advice(recipe, source, best)}\nwrote {recipe.out}", flush=True)


def _count(recipe: Recipe, source: Architecture, layers: LayerChoice) -> Results:
    """All shapes that fit, with what they cost."""
    use = recipe.deployment
    costs: dict[str, Callable[[Architecture], float]] = {
        "params": lambda arch: arch.num_parameters,
        "non_embedding_params": lambda arch: arch.num_non_embedding_parameters,
        "memory_gb": lambda arch: memory_gb(arch, use),
    }
    if recipe.budget.latency is not None:
        costs["latency"] = LatencyMeter(use).seconds

    def check(arch: Architecture) -> None:
        check_candidate(source, arch, recipe.parallel, recipe.prune)
        layers.drop_layers(source.num_layers - arch.num_layers)

    shapes, refused = find_shapes(
        source, recipe.grid, recipe.budget, costs, check, reduction=recipe.prune.group_reduction
    )
    if refused:
        log(f"left out of the grid: {len(refused)}, the first because {refused[0]}")
    log(f"shapes that fit the budgets: {len(shapes)}")
    return Results(source=source, candidates=[Candidate(shape=shape) for shape in shapes])


def _measure_pruned(results: Results, trials: Trials, save: Callable[[], None]) -> None:
    """The loss of every shape right after pruning, where it is not known yet."""
    waiting = [c for c in results.candidates if c.pruned_loss is None]
    if not waiting:
        return
    total, done = len(results.candidates), len(results.candidates) - len(waiting)
    with progress(total=total, initial=done, desc="pruned", unit="shapes") as bar:
        for candidate in waiting:
            candidate.pruned_loss = trials.pruned_loss(candidate.shape.arch)
            save()
            log(f"{candidate.name}: loss {candidate.pruned_loss:.4f} right after pruning")
            bar.update(1, loss=candidate.pruned_loss)


def _race(
    recipe: Recipe,
    results: Results,
    trials: Trials,
    objective: LogitDistillation,
    save: Callable[[], None],
) -> Candidate:
    """The winner of the race, from where it was left."""
    entrants = sorted(results.candidates, key=lambda candidate: candidate.pruned_loss)
    entrants = entrants[: recipe.race.entrants]

    def loss_at(name: str, step: int) -> float:
        candidate = results.candidate(name)
        if step not in candidate.losses and candidate.diverged is None:
            log(f"{name}: to step {step}")
            candidate.losses = trials.train(name, candidate.shape.arch, objective, step)
            if step not in candidate.losses:
                candidate.diverged = step
            save()
        return candidate.losses.get(step, math.inf)

    name = run_race(
        [candidate.name for candidate in entrants],
        recipe.race.all_rungs(recipe.train.steps),
        recipe.race.keep,
        loss_at,
        trials.drop_checkpoints,
    )
    return results.candidate(name)


def _write_best(
    recipe: Recipe, results: Results, trials: Trials, best: Candidate, save: Callable[[], None]
) -> None:
    """Write the winner's model, its name, and last the manifest."""
    steps, arch, loss = recipe.train.steps, best.shape.arch, best.losses[recipe.train.steps]
    parents = {"model": recipe.model.path, "scores": recipe.scores.path}
    assert recipe.data is not None, "the recipe has checked"
    metrics = {
        "num_parameters": arch.num_parameters,
        "source_loss": results.source_loss,
        "pruned_loss": best.pruned_loss,
        "val_loss": loss,
        "tokens": steps * recipe.train.global_batch_size * recipe.data.seq_length,
    }
    directory = recipe.out / BEST_DIR

    def manifest(directory: Path) -> None:
        artifact.write_manifest(
            directory,
            stage="search",
            recipe=config.to_dict(recipe),
            parents={role: path for role, path in parents.items() if path is not None},
            metrics={**metrics, "best": best.name, "shapes": len(results.candidates)},
        )

    if results.best is None:
        with publish(directory, overwrite=True) as partial:
            trials.save(best.name, arch, steps, partial)
            on_rank_zero(lambda: manifest(partial))
        results.best = best.name
        save()
    trials.drop_checkpoints(best.name)

    def finish() -> None:
        manifest(recipe.out)
        unlock(recipe.out)

    on_rank_zero(finish)


def _advice(recipe: Recipe, source: Architecture, best: Candidate) -> str:
    """How to go on from here."""
    read = {"model": recipe.model.path, "scores": recipe.scores.path}
    flags = [text for role, path in read.items() if path for text in (f"--{role}", str(path))]
    flags += prune_flags(recipe.prune, source, best.shape.arch)
    if recipe.prune.method == "random":
        flags += ["--seed", str(recipe.seed)]
    return (
        f"best: {best.name}, distilled for {recipe.train.steps} steps in "
        f"{recipe.out / BEST_DIR}; for a full distillation prune to it with\n"
        f"  python launch/prune.py {shlex.join(flags)} --out DIR"
    )


if __name__ == "__main__":
    run(main, recipe)
