"""The commands of the docs are ones that the launchers take; pruning.md's reach legal shapes."""

import importlib.util
import re
import shlex
import sys
import typing

import pytest

from minitron import config
from minitron.prune.target import target_shape
from minitron.sections.prune import LayerRanking
from tests.launch.launcher import LAUNCH, ROOT
from tests.launch.test_published_recipes import LLAMA_8B


def commands(path):
    """The lines of a page's bash blocks, in words."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


COMMANDS = commands(ROOT / "docs" / "pruning.md")
README = [
    words
    for line in commands(ROOT / "README.md")
    if any("launch/" in word and word.endswith(".py") for word in line)
    for words in [[word.replace("$R/", "launch/recipes/") for word in line]]
]


def parse(stage, arguments):
    spec = importlib.util.spec_from_file_location(f"launch_{stage}", LAUNCH / f"{stage}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.parse(module.Recipe, arguments)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1].rpartition("/")[2])
def test_a_command_is_taken(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    python, script, *arguments = command
    assert (python, (ROOT / script).parent) == ("python", LAUNCH)
    stage = (ROOT / script).stem
    recipe = parse(stage, arguments)
    if stage == "prune":
        assert target_shape(recipe.prune, LLAMA_8B) != LLAMA_8B


@pytest.mark.parametrize("command", README, ids=lambda command: command[-1].rpartition("/")[2])
def test_a_command_of_the_readme_is_taken(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    place = next(n for n, word in enumerate(command) if word.startswith("launch/"))
    stage = (ROOT / command[place]).stem
    arguments = command[place + 1 :]
    if stage == "report":
        arguments = ["--runs", *arguments]  # as its script does for plain arguments
    assert parse(stage, arguments)


def test_every_ranking_has_its_command():
    words = {word for command in COMMANDS for word in command}
    assert words >= set(typing.get_args(LayerRanking)) - {"block_influence"}


def test_the_chain_of_the_page_can_be_planned(tmp_path):
    page = (ROOT / "docs" / "pruning.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "chain.yaml").write_text(text)
    recipe = parse("chain", ["--config", str(tmp_path / "chain.yaml")])
    steps = sys.modules["launch_chain"].plan(recipe, LLAMA_8B)
    assert [(step.name, step.arch.hidden_size) for step in steps] == [("6b", 3584), ("4b", 3072)]
