"""Intermediate losses on every pipeline stage, against hooks on transformers' models."""

from dataclasses import replace
from unittest import mock

import pytest

from minitron import platform
from minitron.distill import intermediate, states
from minitron.sections.distill import IntermediateConfig, TeacherConfig
from tests.distill.intermediate.one_step import ALL_STATES, gradient_errors, gradients
from tests.runs import run_on


@pytest.mark.parametrize(
    ("topology", "loss"), [("pp2 uneven", "mse"), ("pp4", "cosine"), ("tp2+sp pp2", "mse")]
)
def test_losses_and_gradients(run, topology, loss):
    """Each state by itself, and other topologies, are in test_every_loss."""
    run = replace(run, intermediate=replace(run.intermediate, loss=loss))
    maps = run_on(topology, gradients, run)
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


def test_models_of_one_width_need_no_map(run, root):
    layers = IntermediateConfig(states=ALL_STATES[:2], layers=[(-1, -3), (0, 0)], weight=2.0)
    run = replace(
        run,
        model=root / "shallow",
        teacher=TeacherConfig(path=root / "student"),
        intermediate=layers,
    )
    maps = run_on("pp2", gradients, run)
    assert maps == [None, None]
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(run, recompute):
    """The hooks then run in the backward pass, when later micro-batches have gone forward."""
    run = replace(run, train=replace(run.train, recompute=recompute))
    maps = run_on("pp2", gradients, run)
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


def test_windows_change_nothing(run):
    """The teacher sees one micro-batch at a time, with layers of its own on every stage."""
    teacher = replace(run.teacher, window=1, layers_per_stage=[4, 2])
    maps = run_on("pp2", gradients, replace(run, teacher=teacher))
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("topology", ["tp1", "pp2", "tp2+sp pp2"])
def test_states_in_host_memory_change_nothing(run, topology):
    offloaded = replace(run, teacher=replace(run.teacher, offload_states=True))
    maps = run_on(topology, _with_distant_host, offloaded)
    errors = gradient_errors(offloaded, maps)
    assert max(errors.values()) < 1e-5, errors


def _with_distant_host(parallel, run):
    """Where host and device are two, what waits there is another tensor."""

    class FarHost(platform.HostCopy):
        def __init__(self, tensor):
            super().__init__(tensor.clone())

        def fetch(self):
            return self._host.clone()

    with mock.patch.object(platform, "HostCopy", FarHost):
        return gradients(parallel, run)


def _divided_by_microbatches(output, loss):
    """What megatron-core does with auxiliary losses where losses are means over micro-batches."""
    return states._AttachLoss.apply(output, loss / 2)


def _with_divided_losses(parallel, run):
    with mock.patch.object(states, "attach_loss", _divided_by_microbatches):
        return gradients(parallel, run)


def test_a_loss_that_is_scaled_for_micro_batches_is_seen(run):
    errors = gradient_errors(run, run_on("pp2", _with_divided_losses, run))
    assert errors["d map"] == pytest.approx(0.5, abs=1e-3)
    assert all(error < 1e-5 for name, error in errors.items() if "intermediate" in name)


class _UnsharedCompanion(intermediate.Companion):
    def __init__(self, student, *args, **options):
        super().__init__(student, *args, **options)
        student.config.has_cond_embedder = False


def _with_unshared_map(parallel, run):
    with mock.patch.object(intermediate, "Companion", _UnsharedCompanion):
        return gradients(parallel, run)


def test_copies_of_the_map_that_are_not_summed_are_seen(run):
    assert gradient_errors(run, run_on("pp2", _with_unshared_map, run))["d map"] > 0.1
