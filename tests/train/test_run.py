"""A run's directory: refused, replaced or taken over, and complete once it has a manifest."""

import fcntl
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml

from minitron import artifact, config
from minitron.errors import MinitronError
from minitron.parallel import initialize
from minitron.sections.parallel import ParallelConfig
from minitron.sections.train import TrainConfig
from minitron.train import lock
from minitron.train.checkpoint import ModelFiles
from minitron.train.run import finish_run, open_run
from tests.runs import build_model, load_tensors, run_on
from tests.tiny import save_llama

INPUTS = {"student": "5a", "teacher": "7e", "data.path": "da"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe of a training stage has."""

    out: Path
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 1
    overwrite: bool = False
    resume: bool = False
    allow_change: bool = False
    until_step: int | None = None


@pytest.fixture
def recipe(tmp_path):
    return Recipe(out=tmp_path / "runs" / "first")


def _attempt(recipe):
    """A first attempt at a run, with something in its directory."""
    open_run(recipe, INPUTS)
    (recipe.out / "metrics.jsonl").write_text("{}\n")


def _files(directory):
    return sorted(path.name for path in directory.iterdir() if path.name != artifact.LOCK)


def test_a_new_run_saves_its_recipe(recipe):
    open_run(recipe, INPUTS)
    assert _files(recipe.out) == ["inputs.json", "recipe.yaml"]
    saved = yaml.safe_load((recipe.out / "recipe.yaml").read_text())
    assert saved == config.to_dict(recipe)
    assert saved["train"]["lr"] == recipe.train.lr


def test_a_directory_that_is_not_empty_is_refused(recipe):
    _attempt(recipe)
    with pytest.raises(MinitronError, match=r"first is not empty \(.*\); choose .* --overwrite"):
        open_run(replace(recipe, seed=2), INPUTS)
    assert _files(recipe.out) == ["inputs.json", "metrics.jsonl", "recipe.yaml"]
    assert yaml.safe_load((recipe.out / "recipe.yaml").read_text())["seed"] == 1


def test_overwriting_begins_anew(recipe):
    _attempt(recipe)
    open_run(replace(recipe, seed=2, overwrite=True), INPUTS)
    assert _files(recipe.out) == ["inputs.json", "recipe.yaml"]
    assert yaml.safe_load((recipe.out / "recipe.yaml").read_text())["seed"] == 2


def test_overwriting_spares_what_minitron_did_not_write(recipe):
    recipe.out.mkdir(parents=True)
    (recipe.out / "thesis.tex").write_text("x")
    with pytest.raises(
        MinitronError, match=r"--overwrite would delete .*first, which minitron did"
    ):
        open_run(replace(recipe, overwrite=True), INPUTS)
    assert _files(recipe.out) == ["thesis.tex"]


def test_resuming_takes_the_directory_over(recipe, caplog):
    _attempt(recipe)
    (recipe.out / "manifest.json").write_text("{}")  # no longer complete
    elsewhere = replace(
        recipe,
        resume=True,
        until_step=9,
        parallel=ParallelConfig(tensor_model_parallel_size=2),
        train=replace(recipe.train, micro_batch_size=2, checkpoint_interval=7, recompute="full"),
    )
    with caplog.at_level("INFO"):
        assert open_run(elsewhere, INPUTS | {"teacher": "7f"})
    assert caplog.messages == [
        f"goes on with a change: {change}"
        for change in (
            "fingerprint of teacher: 7e -> 7f",
            "parallel.tensor_model_parallel_size: 1 -> 2",
            "train.checkpoint_interval: 500 -> 7",
            "train.micro_batch_size: 1 -> 2",
            "train.recompute: none -> full",
        )
    ]
    assert artifact.read_json(recipe.out / "inputs.json")["teacher"] == "7f"
    assert _files(recipe.out) == ["inputs.json", "metrics.jsonl", "recipe.yaml"]
    assert yaml.safe_load((recipe.out / "recipe.yaml").read_text()) == config.to_dict(elsewhere)


def test_resuming_a_complete_run_leaves_it_as_it_is(recipe, caplog):
    _attempt(recipe)
    (recipe.out / "manifest.json").write_text("{}")
    before = {name: (recipe.out / name).read_bytes() for name in _files(recipe.out)}
    again = replace(recipe, resume=True, train=replace(recipe.train, valid_interval=7))
    with caplog.at_level("INFO"):
        assert not open_run(again, INPUTS | {"teacher": "7f"})
    assert caplog.messages == [f"{recipe.out} is complete; --resume has nothing to do"]
    assert {name: (recipe.out / name).read_bytes() for name in _files(recipe.out)} == before
    with pytest.raises(MinitronError, match="other inputs than"):
        open_run(again, INPUTS | {"data.path": "db"})
    more = replace(again, allow_change=True, train=replace(recipe.train, steps=200))
    assert open_run(more, INPUTS)
    assert not (recipe.out / "manifest.json").exists()


@pytest.mark.parametrize("way", ["resume", "overwrite"])
def test_a_run_that_another_process_writes_is_left_alone(recipe, way, monkeypatch, caplog):
    monkeypatch.setattr(lock, "_PATIENCE_S", 1)
    open_run(recipe, INPUTS)
    lock.unlock(recipe.out)
    command = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.flock(file, fcntl.LOCK_EX)\n"
        "file.write('process 7 on gpu07')\nfile.flush()\nprint('begun', flush=True)\ninput()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", command, str(recipe.out / artifact.LOCK)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(MinitronError) as caught, caplog.at_level("INFO"):
            open_run(replace(recipe, **{way: True}), INPUTS)
        other.kill()
    said = f"{recipe.out} is being written by process 7 on gpu07; "
    assert str(caught.value) == f"{said}wait for its end, or choose another --out"
    assert caplog.messages == [f"{said}waits 1 s for its end"]
    assert _files(recipe.out) == ["inputs.json", "recipe.yaml"]
    assert open_run(replace(recipe, **{way: True}), INPUTS)


def test_a_lock_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    """The writer who is waited for ends, and takes the file away."""
    path = tmp_path / artifact.LOCK
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(lock.time, "sleep", lambda _: (path.unlink(), other.close()))
        lock.lock(tmp_path)
    with path.open() as third, pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.unlock(tmp_path)
    assert not path.exists()


def test_resuming_what_was_never_begun_begins_it(recipe):
    open_run(replace(recipe, resume=True), INPUTS)
    assert _files(recipe.out) == ["inputs.json", "recipe.yaml"]


def test_resuming_another_recipe_is_refused(recipe):
    _attempt(recipe)
    other = replace(recipe, resume=True, seed=2, train=replace(recipe.train, steps=7))
    with pytest.raises(MinitronError) as caught:
        open_run(other, INPUTS)
    assert str(caught.value) == (
        f"--resume would continue a run with another recipe than {recipe.out / 'recipe.yaml'}: "
        "seed: 1 -> 2; train.steps: 100 -> 7; take the old values or another --out"
    )
    assert yaml.safe_load((recipe.out / "recipe.yaml").read_text())["seed"] == 1


def test_batches_and_learning_rate_may_change_if_asked(recipe, caplog):
    _attempt(recipe)
    other = replace(recipe, resume=True, train=replace(recipe.train, lr=1e-3, global_batch_size=9))
    changes = "train.global_batch_size: 8 -> 9", "train.lr: 0.0001 -> 0.001"
    with pytest.raises(MinitronError) as caught:
        open_run(other, INPUTS)
    assert str(caught.value).endswith(
        f": {'; '.join(changes)}; add --allow_change, or take the old values or another --out"
    )
    with caplog.at_level("INFO"):
        open_run(replace(other, allow_change=True), INPUTS)
    assert [f"goes on with a change: {change}" for change in changes] == caplog.messages
    assert yaml.safe_load((recipe.out / "recipe.yaml").read_text())["train"]["lr"] == 1e-3


def test_what_is_learnt_may_not_change(recipe):
    _attempt(recipe)
    train = replace(recipe.train, steps=7, weight_decay=0.5)
    with pytest.raises(MinitronError) as caught:
        open_run(replace(recipe, resume=True, allow_change=True, train=train), INPUTS)
    assert str(caught.value).endswith(
        "train.steps: 100 -> 7; train.weight_decay: 0.1 -> 0.5; "
        "take the old values or another --out"
    )


def test_other_content_of_a_path_is_seen(recipe, caplog):
    _attempt(recipe)
    again = replace(recipe, resume=True)
    other = INPUTS | {"data.path": "db", "student": "5b"}
    changes = "fingerprint of data.path: da -> db", "fingerprint of student: 5a -> 5b"
    with pytest.raises(MinitronError) as caught:
        open_run(again, other)
    assert str(caught.value) == (
        f"--resume would continue a run with other inputs than {recipe.out / 'inputs.json'}: "
        f"{'; '.join(changes)}; add --allow_change, or take the old values or another --out"
    )
    assert artifact.read_json(recipe.out / "inputs.json") == INPUTS
    with caplog.at_level("INFO"):
        open_run(replace(again, allow_change=True), other)
    assert caplog.messages == [f"goes on with a change: {change}" for change in changes]


def _finish(parallel, recipe, model_dir):
    topology = initialize(parallel)
    model = build_model(model_dir, topology)
    open_run(recipe, INPUTS)
    finish_run(
        recipe,
        [model],
        stage="train",
        parents={"model": model_dir},
        metrics={"val_loss": 1.5},
        files=ModelFiles(dtype=torch.float32, base_dir=model_dir, tokenizer=None),
    )


@pytest.mark.parametrize("topology", ["tp1", "tp2 dp2"])
def test_a_finished_run_is_a_model_directory(tmp_path, recipe, topology):
    model = save_llama(tmp_path / "model", eos_token_id=7)
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"\x00tokens")
    run_on(topology, _finish, recipe, tmp_path / "model")
    assert set(_files(recipe.out)) >= {
        "config.json",
        "generation_config.json",
        "manifest.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
    }
    assert not [name for name in _files(recipe.out) if "partial" in name]
    assert (recipe.out / "tokenizer.json").read_bytes() == b"\x00tokens"
    expected = load_tensors(tmp_path / "model")
    found = load_tensors(recipe.out)
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())

    artifact.verify(recipe.out)
    manifest = artifact.read_manifest(recipe.out)
    assert manifest["stage"] == "train"
    assert manifest["recipe"] == config.to_dict(recipe)
    assert manifest["parents"]["model"]["fingerprint"] == artifact.fingerprint(tmp_path / "model")
    assert manifest["metrics"] == {
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "val_loss": 1.5,
    }
