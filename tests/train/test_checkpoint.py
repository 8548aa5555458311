"""A killed run goes on as if nothing had happened, on the same ranks or on others."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron.errors import MinitronError
from minitron.model.llama import build_llama
from minitron.model.sharding import open_model, save_model
from minitron.parallel import initialize
from minitron.sections.train import TrainConfig
from minitron.train import checkpoint
from minitron.train.checkpoint import (
    TRACKER_FILE,
    Position,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from minitron.train.optimizer import build_optimizer, wrap_chunk
from tests import reference, runs
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_model,
    load_tensors,
    run_on,
    step_records,
    write_tokens,
)
from tests.tiny import save_llama

CONFIG = TrainConfig(
    steps=10,
    lr=3e-3,
    warmup_steps=2,
    adam_eps=1e-6,
    global_batch_size=4,
    micro_batch_size=1,
    checkpoint_interval=5,
)
WITHOUT_CHECKPOINTS = replace(CONFIG, checkpoint_interval=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    save_llama(root / "model", vocab_size=VOCAB, tie_word_embeddings=True)
    tokens = write_tokens(root / "tokens", 23 * SEQ_LENGTH + 1)
    return Run(model=root / "model", tokens=tokens, out=root / "out", train=CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run):
    """Runs by topology and precision: without checkpoints, or killed after seven of ten steps."""
    directories = {}

    def finish(topology, precision="fp32", *, killed=False):
        key = topology, precision, killed
        if key not in directories:
            directories[key] = out = tmp_path_factory.mktemp("run")
            this = replace(run, out=out, precision=precision, train=WITHOUT_CHECKPOINTS)
            if killed:
                this = replace(this, train=CONFIG, crash_at=7)
            run_on(topology, runs.train, this)
        return directories[key]

    return finish


def resume(killed, run, out, topology, precision="fp32"):
    """Copy a killed run and resume the copy."""
    shutil.copytree(killed, out, dirs_exist_ok=True)
    again = replace(run, out=out, precision=precision, train=WITHOUT_CHECKPOINTS, resume=True)
    run_on(topology, runs.train, again)


@pytest.mark.parametrize(
    ("topology", "precision"),
    [("tp1", "fp32"), ("tp1", "bf16"), ("dp2", "fp32"), ("dp2", "bf16"), ("tp2 pp2", "fp32")],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, run, finished, topology, precision
):
    killed = finished(topology, precision, killed=True)
    assert [r["step"] for r in step_records(killed)] == [*range(1, 8)]
    # What a run that is killed while it saves leaves behind, and two strangers.
    for name in (".iter_0000010.partial", "iter_10", "iter_0000011.old"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    resume(killed, run, tmp_path, topology, precision)

    whole = finished(topology, precision)
    assert step_records(tmp_path) == step_records(whole)
    found, expected = load_tensors(tmp_path / "model"), load_tensors(whole / "model")
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("topology", ["tp1", "dp2"])
def test_a_run_in_two_parts_is_the_whole_run_bit_for_bit(tmp_path, run, finished, topology):
    first = replace(run, out=tmp_path, train=WITHOUT_CHECKPOINTS, until_step=4)
    result = run_on(topology, runs.train, first)[0]
    assert result["tokens"] == 4 * 4 * SEQ_LENGTH
    assert list_checkpoints(tmp_path / "checkpoints") == [4]
    run_on(topology, runs.train, replace(first, resume=True))  # already there: stays
    assert list_checkpoints(tmp_path / "checkpoints") == [4]
    run_on(topology, runs.train, replace(first, until_step=10, resume=True))
    assert list_checkpoints(tmp_path / "checkpoints") == [4, 10]

    whole = finished(topology)
    assert step_records(tmp_path) == step_records(whole)
    found, expected = load_tensors(tmp_path / "model"), load_tensors(whole / "model")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def _fused_after_loading(parallel, run, path):
    topology = initialize(parallel)
    model = [build_model(run.model, topology)]
    optimizer = build_optimizer([wrap_chunk(chunk) for chunk in model], run.train)
    checkpoint._create_state(optimizer)
    for group in optimizer.param_groups:
        group["fused"] = None  # as a checkpoint of an earlier time has it
    save_checkpoint(path, Position(1, 1), model, optimizer)
    load_checkpoint(checkpoint_path(path, 1), model, optimizer)
    return [group["fused"] for group in optimizer.param_groups]


def test_a_resumed_optimizer_is_fused_again(tmp_path, run):
    (fused,) = run_on("tp1", _fused_after_loading, run, tmp_path)
    assert all(fused)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("tp2", "tp1"),
        ("tp2", "pp2"),
        ("tp1", "dp2"),
        ("dp2", "tp1"),
        ("tp2 pp2", "dp2"),
        ("dp2", "tp2+sp pp2"),
        ("tp1", "pp2 vpp2"),
        ("pp2 vpp2 dp2", "pp2"),
    ],
)
def test_a_run_goes_on_with_other_ranks(tmp_path, run, finished, saved, resumed):
    resume(finished(saved, killed=True), run, tmp_path, resumed)
    whole = finished("tp1")
    for ours, expected in zip(step_records(tmp_path), step_records(whole), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
    expected = load_tensors(whole / "model")
    for name, tensor in load_tensors(tmp_path / "model").items():
        assert (tensor - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize("topology", ["tp1", "dp2"])
def test_batches_samples_and_learning_rate_may_change_in_a_run(tmp_path, run, finished, topology):
    killed = finished("tp1", killed=True)
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    train = replace(WITHOUT_CHECKPOINTS, global_batch_size=6, lr=5e-3, steps=12)
    changed = replace(run, out=tmp_path, train=train, seq_length=SEQ_LENGTH // 2, resume=True)
    run_on(topology, runs.train, changed)

    model = LlamaForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    expected = reference.train(model, None, run, changed, changed_at=5)
    found = step_records(tmp_path)
    assert [r["step"] for r in found] == list(range(1, 13))
    tokens = [*(4 * SEQ_LENGTH for _ in range(5)), *(6 * SEQ_LENGTH // 2 for _ in range(7))]
    assert [r["tokens"] for r in found] == list(itertools.accumulate(tokens))
    for ours, theirs in zip(found[5:], expected[5:], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def _too_few_steps(parallel, run):
    with pytest.raises(MinitronError) as caught:
        runs.train(parallel, run)
    return str(caught.value)


def test_a_run_cannot_end_before_it_has_come(tmp_path, run, finished):
    shutil.copytree(finished("tp1", killed=True), tmp_path, dirs_exist_ok=True)
    short = replace(run, out=tmp_path, train=replace(CONFIG, steps=4), resume=True)
    (message,) = run_on("tp1", _too_few_steps, short)
    assert message == "train.steps=4 is less than the 5 steps that the run has done; raise it"


def _export(parallel, model_dir, checkpoint, out):
    """Write a checkpoint's weights as a model directory, into a model of no weights."""
    topology = initialize(parallel)
    arch, _ = open_model(model_dir)
    model = build_llama(arch, topology, None, dtype=torch.float32)
    position = load_checkpoint(checkpoint, [model])
    out.mkdir(exist_ok=True)
    save_model([model], out, dtype=torch.float32, base_dir=checkpoint)
    return position.step


def test_weights_are_read_without_the_optimizer_on_any_ranks(tmp_path, run, finished):
    checkpoint = checkpoint_path(finished("tp2", killed=True) / "checkpoints", 5)
    exports = []
    for topology in ("tp1", "tp2", "pp2"):
        out = tmp_path / topology
        assert set(run_on(topology, _export, run.model, checkpoint, out)) == {5}
        exports.append(load_tensors(out))
    for other in exports[1:]:
        assert other.keys() == exports[0].keys()
        assert all(torch.equal(tensor, exports[0][name]) for name, tensor in other.items())
    assert exports[0].keys() == load_tensors(run.model).keys()
    start, end = load_tensors(run.model), load_tensors(finished("tp2") / "model")
    for name, tensor in exports[0].items():  # on its way
        assert not torch.equal(tensor, start[name])
        assert (tensor - start[name]).norm() < (end[name] - start[name]).norm()


def _save_three(parallel, model_dir, directory):
    topology = initialize(parallel)
    model = build_model(model_dir, topology)
    for step in (1, 2, 3):
        save_checkpoint(directory, Position(step), [model], keep=2)


def test_only_the_newest_checkpoints_are_kept(tmp_path, run):
    assert list_checkpoints(tmp_path / "absent") == []
    run_on("tp1", _save_three, run.model, tmp_path)
    assert list_checkpoints(tmp_path) == [2, 3]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"iter_0000002", "iter_0000003", TRACKER_FILE}
    assert (tmp_path / TRACKER_FILE).read_text() == "3\n"
