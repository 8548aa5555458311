"""What tests of launch/search.py share."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from minitron import config

LAUNCH = Path(__file__).parents[3] / "launch"
AT_RUNGS = ("--train.checkpoint_interval", 0)  # none between them: saves time


def load_script(stage):
    spec = importlib.util.spec_from_file_location(f"launch_{stage}", LAUNCH / f"{stage}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(stage, *arguments):
    """Run a stage in this process, on its rank."""
    script = load_script(stage)
    in_pool = dist.is_initialized()  # whose group it is then
    try:
        script.main(config.parse(script.Recipe, list(map(str, arguments))))
    finally:
        if not in_pool and dist.is_initialized():
            dist.destroy_process_group()  # of no use to other tests in this process


def read(out):
    return json.loads((out / "search.json").read_text())


def agree(found, expected, steps):
    """Two searches measured the same, as far as both went."""
    assert found["name"] == expected["name"]
    assert found["pruned_loss"] == pytest.approx(expected["pruned_loss"], rel=1e-5)
    for step in steps:
        assert found["losses"][step] == pytest.approx(expected["losses"][step], rel=1e-5)
