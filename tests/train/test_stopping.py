"""A run that a signal stops, in a step or in a validation, goes on bit for bit."""

import itertools
import signal
from dataclasses import replace

import pytest
import torch

from minitron.sections.train import TrainConfig
from minitron.train.checkpoint import list_checkpoints
from tests import runs
from tests.runs import SEQ_LENGTH, VOCAB, Run, load_tensors, run_on, step_records, write_tokens
from tests.tiny import save_llama

CONFIG = TrainConfig(
    steps=4,
    lr=3e-3,
    warmup_steps=2,
    global_batch_size=4,
    micro_batch_size=1,
    valid_interval=2,
    checkpoint_interval=0,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of four steps with a validation before, amid and after them, by topology."""
    root = tmp_path_factory.mktemp("root")
    save_llama(root / "model", vocab_size=VOCAB)
    tokens = write_tokens(root / "tokens", 13 * SEQ_LENGTH + 1)
    valid = write_tokens(root / "valid", 18 * SEQ_LENGTH + 1, seed=1)
    run = Run(model=root / "model", tokens=tokens, valid=valid, out=root, train=CONFIG)
    finished = {}

    def finish(topology):
        if topology not in finished:
            out = tmp_path_factory.mktemp("whole")
            finished[topology] = replace(run, out=out)
            run_on(topology, runs.train, finished[topology])
        return finished[topology]

    return finish


def assert_same(found, expected):
    """Same records, same models."""
    assert step_records(found) == step_records(expected)
    ours, theirs = load_tensors(found / "model"), load_tensors(expected / "model")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("topology", "step", "rank", "number"),
    [
        ("tp1", 0, 0, signal.SIGTERM),
        ("dp2", 1, 1, signal.SIGUSR1),  # whose validation waits for the resumed run
        ("tp2 pp2", 2, 2, signal.SIGTERM),
    ],
)
def test_a_signal_stops_all_ranks_after_the_step(tmp_path, whole, topology, step, rank, number):
    """It comes to one rank, and all finish the step under way."""
    stopped = replace(whole(topology), out=tmp_path, stop_at=(step, rank, number))
    results = run_on(topology, runs.train, stopped)
    assert results == [{}] * len(results)  # no rank came to the end
    assert list_checkpoints(tmp_path / "checkpoints") == [step + 1]
    last = step_records(tmp_path)[-1]
    assert last["step"] == step + 1
    assert "lr" in last
    run_on(topology, runs.train, replace(stopped, stop_at=None, resume=True))
    assert_same(tmp_path, whole(topology).out)


def test_a_signal_in_the_last_step_stops_no_more_than_a_validation(tmp_path, whole):
    """And there is a checkpoint, should what is left to do come to no end."""
    signalled = replace(whole("tp1"), out=tmp_path, stop_at=(3, 0, signal.SIGTERM))
    (result,) = run_on("tp1", runs.train, replace(signalled, valid=None))
    assert result["tokens"] == 4 * 4 * SEQ_LENGTH
    assert list_checkpoints(tmp_path / "checkpoints") == [4]
    assert load_tensors(tmp_path / "model")


def test_a_signal_in_the_last_step_of_a_part_stops_the_parts_to_come(tmp_path, whole):
    signalled = replace(whole("dp2"), out=tmp_path, stop_at=(2, 1, signal.SIGTERM), until_step=3)
    for run in (signalled, replace(signalled, valid=None)):
        assert run_on("dp2", runs.train, run) == [{}, {}]  # as of no run that came to its end
        assert list_checkpoints(tmp_path / "checkpoints") == [3]


@pytest.mark.parametrize(
    ("topology", "rank", "validation", "number"),
    [
        ("dp2", 1, 0, signal.SIGTERM),
        ("dp2", 0, 1, signal.SIGUSR1),
        ("dp2", 1, 2, signal.SIGTERM),
        ("pp2", 0, 1, signal.SIGTERM),
    ],
)
def test_a_signal_ends_a_validation_which_the_resumed_run_repeats(
    tmp_path, whole, topology, rank, validation, number
):
    expected, step = whole(topology).out, 2 * validation
    stopped = replace(whole(topology), out=tmp_path, stop_valid_at=(validation, rank, number))
    assert run_on(topology, runs.train, stopped) == [{}, {}]
    records = step_records(expected)
    is_first_part = [r["step"] < step or (r["step"] == step and "lr" in r) for r in records]
    assert step_records(tmp_path) == list(itertools.compress(records, is_first_part))
    assert list_checkpoints(tmp_path / "checkpoints") == [step] * bool(step)

    again = replace(stopped, stop_valid_at=(0, rank, number), resume=True)
    run_on(topology, runs.train, again)  # a second time, as soon as it goes on
    assert list_checkpoints(tmp_path / "checkpoints") == [step] * bool(step)
    run_on(topology, runs.train, replace(again, stop_valid_at=None))
    assert_same(tmp_path, expected)
