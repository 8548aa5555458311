"""What every launcher has in common: --help, --print_config, and the recipes that it reads."""

import importlib.util
import re
import sys

import pytest
from torch.distributed.run import get_args_parser

from minitron.config.keys import keys_of
from tests.launch.launcher import LAUNCH, ROOT, STAGES

RECIPES = sorted((LAUNCH / "recipes").glob("*.yaml"))
# What the contract says that all stages share; the others have what they can use of it.
SHARED = ("out", "seed", "precision", "overwrite")
TRAINING = (
    *SHARED,
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.sequence_parallel",
    "data.path",
    "data.seq_length",
    "train.steps",
    "train.lr",
    "train.micro_batch_size",
    "train.global_batch_size",
)


def stage_of(recipe):
    """The launcher that a recipe is for, by the end of its name."""
    return next((stage for stage in STAGES if recipe.stem.endswith(f"_{stage}")), "train")


def keys(stage):
    spec = importlib.util.spec_from_file_location(f"launch_{stage}", LAUNCH / f"{stage}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return keys_of(module.Recipe)


def test_there_is_a_launcher_for_every_stage():
    assert set(STAGES) == {
        "preprocess", "train", "importance", "prune", "distill", "eval", "export", "convert",
        "report", "cache_logits", "search", "generate", "chain",
    }  # fmt: skip
    without = {"preprocess", "eval", "export", "convert", "report"}
    assert {stage_of(recipe) for recipe in RECIPES} == set(STAGES) - without


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_key(stage, forked, tmp_path):
    result = forked(stage, "--help", cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    text = " ".join(result.out.split())
    for name, key in keys(stage).items():
        if key.is_section:
            assert f" {name}: " in text
            continue
        explained = re.search(rf" --{re.escape(name)} \S+ (.+?) \(.*?(default: |required)", text)
        assert explained, f"{name} is not in --help"
        assert len(explained[1].split()) > 1, f"{name}: {explained[1]}"
    named = set(re.findall(r"^  --([\w.]+)", result.out, re.MULTILINE))
    assert named >= set(SHARED if stage != "report" else ("out",))
    if stage in ("train", "distill"):
        assert named >= set(TRAINING)


@pytest.mark.parametrize("stage", STAGES)
def test_torchrun_takes_no_key_for_an_option_of_its_own(stage):
    """argparse (that of Python 3.11) refuses ambiguous prefixes even behind the script's name."""
    flags = [text for name in keys(stage) for text in (f"--{name}", "x")]
    torchrun = get_args_parser().parse_args(["--nproc-per-node", "2", "stage.py", *flags])
    assert torchrun.training_script_args == flags


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_parses_and_prints_itself(recipe, forked, tmp_path):
    stage = stage_of(recipe)
    first = forked(stage, "--config", recipe, "--print_config", cwd=ROOT)
    assert (first.status, first.err) == (0, "")
    (tmp_path / "printed.yaml").write_text(first.out)
    second = forked(stage, "--config", "printed.yaml", "--print_config", cwd=tmp_path)
    assert second == first
    changed = forked(stage, "--config", "printed.yaml", "--seed", 7, "--print_config", cwd=tmp_path)
    assert changed.out == re.sub(r"^seed: \d+$", "seed: 7", first.out, flags=re.MULTILINE)
    assert changed.out != first.out
