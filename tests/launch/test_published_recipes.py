"""The recipes of the published Llama-3.1 students say what the papers say."""

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from minitron import config
from minitron.model.arch import Architecture
from minitron.prune.target import target_shape

ROOT = Path(__file__).parents[2]
STAGES = {
    "llama3.1_8b_teacher_correction": "train",
    "llama3.1_8b_importance": "importance",
    "llama3.1_8b_cache_logits": "cache_logits",
    "llama3.1_4b_width_prune": "prune",
    "llama3.1_4b_depth_prune": "prune",
    "llama3.1_4b_search": "search",
    "llama3.1_4b_width_distill": "distill",
    "llama3.1_4b_depth_distill": "distill",
    "llama3.1_8b_6b_4b_chain": "chain",
    "llama3.1_4b_rounds_chain": "chain",
}
LLAMA_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)


def load_script(stage):
    script = ROOT / "launch" / f"{stage}.py"
    spec = importlib.util.spec_from_file_location(f"launch_{script.stem}", script)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(name, stage=None):
    recipe_class = load_script(stage or STAGES[name]).Recipe
    return config.parse(recipe_class, ["--config", str(ROOT / f"launch/recipes/{name}.yaml")])


def test_every_published_recipe_is_listed_here():
    files = (ROOT / "launch/recipes").glob("llama3.1_*.yaml")
    assert {file.stem for file in files} == set(STAGES)


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [("llama3.1_4b_width_prune", 4_512_746_496), ("llama3.1_4b_depth_prune", 4_540_469_248)],
)
def test_pruned_shapes(name, num_parameters):
    recipe = parse(name)
    dropped = recipe.prune.drop_layers or []
    assert target_shape(recipe.prune, LLAMA_8B).num_parameters == num_parameters
    assert set(range(1, 33)) - set(dropped) in ({*range(1, 33)}, {*range(1, 16), 32})


def test_importance():
    recipe = parse("llama3.1_8b_importance")
    assert recipe.importance.samples == 1024


@pytest.mark.parametrize(
    ("name", "lr", "min_lr", "warmup_steps"),
    [
        ("llama3.1_4b_width_distill", 1e-4, 1e-5, 40),
        ("llama3.1_4b_depth_distill", 1e-4, 1e-5, 40),
        ("llama3.1_8b_teacher_correction", 3e-4 / 5, 3e-6, 120),
    ],
)
def test_training(name, lr, min_lr, warmup_steps):
    recipe = parse(name)
    train = recipe.train
    tokens = train.steps * train.global_batch_size * recipe.data.seq_length
    assert tokens == pytest.approx(94e9, rel=1e-3)
    assert (train.global_batch_size, recipe.data.seq_length) == (1152, 8192)
    assert (train.lr, train.min_lr) == (pytest.approx(lr), pytest.approx(min_lr))
    assert train.warmup_steps == warmup_steps
    for nodes in (1, 4, 16, 32):  # the batch divides on what it is likely to run on
        ranks = recipe.parallel.data_parallel_size(8 * nodes)
        assert train.global_batch_size % (ranks * train.micro_batch_size) == 0


@pytest.mark.parametrize("student", ["width", "depth"])
def test_stored_logits_are_those_that_a_student_needs(student):
    recipe, run = parse("llama3.1_8b_cache_logits"), parse(f"llama3.1_4b_{student}_distill")
    assert recipe.cache.max_samples == run.train.steps * run.train.global_batch_size
    assert recipe.cache.temperature == run.distill.temperature
    assert (recipe.data, recipe.seed) == (run.data, run.seed)


def test_search():
    recipe = parse("llama3.1_4b_search")
    train = recipe.train
    assert train.steps == 400
    assert train.steps * train.global_batch_size * recipe.data.seq_length == pytest.approx(
        1.8e9, rel=0.05
    )
    sizes = [4_512_746_496, 4_540_469_248]
    assert all(recipe.budget.allows("params", size) for size in sizes)
    assert recipe.race.entrants == 18


def test_chain_of_three_models():
    """6b and 4b, by what the recipes of the single steps say."""
    steps = load_script("chain").plan(parse("llama3.1_8b_6b_4b_chain"), LLAMA_8B)
    assert [step.name for step in steps] == ["6b", "4b"]
    assert [step.arch.num_parameters for step in steps] == [6_145_674_752, 4_512_746_496]
    # Untied tables, 32 layers of attention (32 heads, 8 groups of 128), three matrices and norms.
    h, f = 3584, 11776
    layer = h * 6144 + 4096 * h + 3 * h * f + 2 * h
    assert steps[0].arch.num_parameters == 2 * 128256 * h + 32 * layer + h
    scoring, distilling = parse("llama3.1_8b_importance"), parse("llama3.1_4b_width_distill")
    tokens = []
    for step in steps:
        scored, pruned, distilled = (stage.recipe for stage in step.stages)
        for name in ("data", "importance", "parallel", "precision"):
            assert getattr(scored, name) == getattr(scoring, name)
        for name in ("data", "distill", "parallel", "precision"):
            assert getattr(distilled, name) == getattr(distilling, name)
        train = distilled.train
        assert dataclasses.replace(train, steps=9960) == distilling.train
        tokens.append(train.steps * train.global_batch_size * distilled.data.seq_length)
        assert distilled.teacher.path == scoring.model.path
        assert (pruned.scores.path, distilled.student.path) == (scored.out, pruned.out)
    assert tokens == pytest.approx([47e9, 94e9], rel=1e-3)
    assert steps[0].stages[0].recipe.model.path == scoring.model.path
    assert steps[1].stages[0].recipe.model.path == steps[0].stages[-1].out


def test_rounds_of_the_same_training_in_all():
    """Each round's scores, shape and half of the tokens; else what the chain by way of 6b says."""
    script = load_script("chain")
    rounds = script.plan(parse("llama3.1_4b_rounds_chain"), LLAMA_8B)
    stepwise = script.plan(parse("llama3.1_8b_6b_4b_chain"), LLAMA_8B)
    assert [step.name for step in rounds] == ["4b-1", "4b-2"]
    assert [step.arch for step in rounds] == [step.arch for step in stepwise]
    steps = parse("llama3.1_4b_width_distill").train.steps
    assert sum(step.stages[-1].recipe.train.steps for step in rounds) == steps
    for ours, theirs in zip(rounds, stepwise, strict=True):
        scored, _, distilled = (stage.recipe for stage in ours.stages)
        for name in ("data", "importance", "parallel", "precision"):
            assert getattr(scored, name) == getattr(theirs.stages[0].recipe, name)
        for name in ("data", "distill", "parallel", "precision"):
            assert getattr(distilled, name) == getattr(theirs.stages[-1].recipe, name)
        train = dataclasses.replace(theirs.stages[-1].recipe.train, steps=4980)
        assert distilled.train == train


def test_the_demos_chain_ends_at_the_demos_student():
    teacher = parse("demo_teacher", "train").model.init
    names = {field.name for field in dataclasses.fields(Architecture)} & vars(teacher).keys()
    sizes = {name: vars(teacher)[name] for name in names if vars(teacher)[name] is not None}
    source = Architecture(**(sizes | {"vocab_size": 2048}))
    steps = load_script("chain").plan(parse("demo_chain", "chain"), source)
    assert steps[-1].arch == target_shape(parse("demo_width_prune", "prune").prune, source)
    learnt = sum(step.stages[-1].recipe.train.steps for step in steps)
    assert learnt == parse("demo_distill", "distill").train.steps


@pytest.mark.parametrize(
    ("earlier", "later", "role"),
    [
        ("llama3.1_8b_teacher_correction", "llama3.1_8b_importance", "model"),
        ("llama3.1_8b_importance", "llama3.1_4b_width_prune", "scores"),
        ("llama3.1_8b_importance", "llama3.1_4b_search", "scores"),
        ("llama3.1_8b_teacher_correction", "llama3.1_4b_depth_prune", "model"),
        ("llama3.1_8b_teacher_correction", "llama3.1_4b_width_distill", "teacher"),
        ("llama3.1_8b_teacher_correction", "llama3.1_8b_cache_logits", "teacher"),
        ("llama3.1_4b_width_prune", "llama3.1_4b_width_distill", "student"),
        ("llama3.1_4b_depth_prune", "llama3.1_4b_depth_distill", "student"),
    ],
)
def test_one_recipe_reads_what_another_writes(earlier, later, role):
    assert getattr(parse(later), role).path == parse(earlier).out
