"""Runs with a dynamic weight are those of plain PyTorch, and go on where they were killed."""

import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from minitron.metrics import read_metrics
from minitron.sections.distill import IntermediateConfig, TeacherConfig
from tests import reference, runs
from tests.distill.intermediate.one_step import (
    ALL_STATES,
    LAYERS,
    STEPS,
    load,
    relative_error,
    train,
)
from tests.runs import SEQ_LENGTH, Run, load_tensors, run_on, step_records, write_tokens

SIX_STEPS = replace(STEPS, steps=6)
TOLERANCE = 5e-6  # relative, so that any two topologies agree to 1e-5


@dataclass(frozen=True)
class Expected:
    """What plain PyTorch makes of a run with dynamic weight."""

    records: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    map: torch.Tensor


@pytest.fixture(scope="module")
def dynamic(root):
    """A run of ten steps with α = L_logits / L_is."""
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=root / "tokens",
        out=root,
        train=STEPS,
        intermediate=IntermediateConfig(states=ALL_STATES, layers=LAYERS),
    )


@pytest.fixture(scope="module")
def expected(dynamic):
    student, teacher = load(dynamic.model), load(dynamic.teacher.source)
    plain = reference.Intermediate(dynamic, student, teacher)
    records = reference.train(student, teacher, dynamic, intermediate=plain)
    return Expected(records, student.state_dict(), plain.map.detach())


def differences(expected, out, maps):
    """The largest relative differences in everything that is logged and learned."""
    records = read_metrics(out / "metrics.jsonl")
    assert len(records) == len(expected.records)
    found = {
        key: max(
            abs(ours[key] - plain[key]) / (plain[key] or 1.0)
            for ours, plain in zip(records, expected.records, strict=True)
        )
        for key in expected.records[0]
    }
    weights = load_tensors(out / "model")
    assert weights.keys() == expected.weights.keys()
    found["weights"] = max(
        relative_error(tensor, expected.weights[name]) for name, tensor in weights.items()
    )
    found["map"] = max(relative_error(weight, expected.map) for weight in maps)
    return found


@pytest.mark.parametrize("topology", ["tp1", "tp2", "tp2+sp", "pp2", "dp2", "tp2 pp2", "pp2 vpp2"])
def test_ten_steps_are_those_of_plain_pytorch(dynamic, expected, tmp_path, topology):
    maps = run_on(topology, train, replace(dynamic, out=tmp_path))
    assert all(torch.equal(weight, maps[0]) for weight in maps)  # the stages' copies stay one
    found = differences(expected, tmp_path, maps)
    assert max(found.values()) < TOLERANCE, found
    first, *later = read_metrics(tmp_path / "metrics.jsonl")
    assert first["alpha"] == 0.0
    assert first["loss"] == first["kl"]
    assert all(record["alpha"] > 0.01 for record in later)


# Resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dynamic):
    """Runs by topology: whole, or killed after four of six steps with a checkpoint of three."""
    directories = {}

    def finish(topology, precision="fp32", *, killed=False):
        key = topology, precision, killed
        if key not in directories:
            directories[key] = out = tmp_path_factory.mktemp("run")
            this = replace(dynamic, out=out, train=SIX_STEPS, precision=precision)
            if killed:
                this = replace(this, train=replace(SIX_STEPS, checkpoint_interval=3), crash_at=4)
            run_on(topology, runs.train, this)
        return directories[key]

    return finish


@pytest.mark.parametrize(("topology", "precision"), [("dp2", "bf16"), ("tp2 pp2", "fp32")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, dynamic, finished, topology, precision
):
    shutil.copytree(finished(topology, precision, killed=True), tmp_path, dirs_exist_ok=True)
    run = replace(dynamic, out=tmp_path, train=SIX_STEPS, precision=precision, resume=True)
    run_on(topology, runs.train, run)
    whole = finished(topology, precision)
    assert step_records(tmp_path) == step_records(whole)
    ours, theirs = load_tensors(tmp_path / "model"), load_tensors(whole / "model")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("saved", "resumed"), [("tp2 pp2", "dp2"), ("dp2", "tp2 pp2")])
def test_a_run_goes_on_with_other_ranks(tmp_path, dynamic, finished, saved, resumed):
    shutil.copytree(finished(saved, killed=True), tmp_path, dirs_exist_ok=True)
    run_on(resumed, runs.train, replace(dynamic, out=tmp_path, train=SIX_STEPS, resume=True))
    for ours, whole in zip(step_records(tmp_path), step_records(finished("dp2")), strict=True):
        assert ours == pytest.approx(whole, rel=1e-5)


def test_validation_neither_sees_nor_changes_them(tmp_path, dynamic, finished):
    write_tokens(tmp_path / "valid", 5 * SEQ_LENGTH + 1, seed=1)
    config = replace(SIX_STEPS, valid_interval=3)
    run = replace(dynamic, out=tmp_path, train=config, valid=tmp_path / "valid")
    run_on("dp2", runs.train, run)
    records = step_records(tmp_path)
    validated = [r for r in records if "val_loss" in r]
    losses = {"val_loss", "val_kl", "val_top1_agreement"}
    assert all(r.keys() == {"step", "tokens"} | losses for r in validated)
    assert [r for r in records if "loss" in r] == step_records(finished("dp2"))
