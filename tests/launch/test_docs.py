"""The commands of docs/pruning.md are ones that the launchers take, and reach legal shapes."""

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

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "pruning.md").read_text(), re.DOTALL)
LINES = "".join(BLOCKS).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(line) for line in LINES]


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


def test_every_ranking_has_its_command():
    words = {word for command in COMMANDS for word in command}
    assert words >= set(typing.get_args(LayerRanking)) - {"block_influence"}
