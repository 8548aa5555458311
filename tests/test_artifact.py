import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from minitron import artifact
from minitron.artifact import check_out, publish, verify, write_manifest
from minitron.errors import MinitronError


def tree(directory: Path) -> dict[str, str]:
    """Everything below a directory, hidden files included: path -> content."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): p.read_text() for p in files}


@pytest.fixture
def model(tmp_path) -> Path:
    """A finished artifact with two files."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 10)
    (directory / "config.json").write_text("{}")
    write_manifest(directory, stage="train", recipe={"seed": 1}, parents={}, metrics={"loss": 2.5})
    return directory


# Where a stage may write


def test_a_new_or_empty_directory_is_fine(tmp_path):
    check_out(tmp_path / "absent" / "deeper")
    check_out(tmp_path)


def test_a_file_is_refused_whatever_the_flags(tmp_path):
    file = tmp_path / "out"
    file.write_text("mine")
    for flags in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(MinitronError, match=f"--out {file} is a file; give a directory"):
            check_out(file, **flags)


def test_what_is_there_is_kept_unless_the_user_says_otherwise(model):
    with pytest.raises(
        MinitronError, match=r"not empty \(it holds config.json and 2 more\).*--over"
    ):
        check_out(model)
    check_out(model, overwrite=True)


def test_only_a_run_is_resumed(model, tmp_path):
    """A misspelt --out must not write a training run into a model directory."""
    with pytest.raises(MinitronError, match=r"model, which is no run \(it has no recipe"):
        check_out(model, resume=True)
    (model / "recipe.yaml").write_text("out: x")
    check_out(model, resume=True)
    check_out(tmp_path / "new", resume=True)
    (tmp_path / "empty").mkdir()
    check_out(tmp_path / "empty", resume=True)


def test_overwrite_spares_what_minitron_did_not_write(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(MinitronError, match="which minitron did not write"):
        check_out(tmp_path, overwrite=True)
    (tmp_path / "recipe.yaml").write_text("out: x")  # an unfinished run
    check_out(tmp_path, overwrite=True)


def test_one_entry_is_not_followed_by_no_more(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(MinitronError, match=r"not empty \(it holds a\);"):
        check_out(tmp_path)


def test_a_path_below_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file / "sub", file / "sub" / "deeper"):
        with pytest.raises(MinitronError, match=f"--out {out} cannot be created: {file} is a file"):
            check_out(out)
        with pytest.raises(MinitronError, match="is a file"), publish(out):
            pass
    assert file.read_text() == "mine"


@pytest.mark.parametrize("out", [".", "..", "../run", "/", "../run/sub/.."])
def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch, out):
    (tmp_path / "run" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(MinitronError, match="the working directory or holds it"):
        check_out(Path(out))
    check_out(Path("sub"))
    (tmp_path / "run" / "recipe.yaml").write_text("out: .")
    check_out(Path("."), resume=True)  # nothing is replaced


def test_a_dangling_link_is_refused(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(MinitronError, match=r"out is a symbolic link to nowhere, which does not"):
        check_out(tmp_path / "out")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(MinitronError, match="loop is a symbolic link to loop"):
        check_out(tmp_path / "loop")


def test_a_parent_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # tests may run as root
    with pytest.raises(MinitronError, match=f"a/b cannot be created: {tmp_path} is not writable"):
        check_out(tmp_path / "a" / "b")


def test_a_refusal_of_the_system_is_one_line(tmp_path):
    out = tmp_path / ("x" * 300)
    with pytest.raises(MinitronError, match=r"cannot be used \(File name too long\); choose"):
        artifact.prepare(out)


@pytest.mark.parametrize("name", [".", "sub", "sub/weights.bin"])
def test_overwrite_spares_what_the_stage_reads(model, name):
    (model / "sub").mkdir()
    with pytest.raises(MinitronError, match=f"would delete {model}, but this stage reads"):
        check_out(model, overwrite=True, inputs=[None, model.parent, model / name])
    check_out(model, overwrite=True, inputs=[None, model.parent, model.with_name("model2")])


# Complete or absent


def test_publish_shows_nothing_before_the_end(tmp_path):
    out = tmp_path / "runs" / "a"
    with publish(out) as directory:
        (directory / "x").write_text("1")
        assert not out.exists()
        assert directory.parent == out.parent  # the rename stays on one file system
    assert tree(tmp_path) == {"runs/a/x": "1"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_publish_leaves_nothing_after_a_failure(tmp_path, error):
    def fail():
        with publish(tmp_path / "a") as directory:
            (directory / "x").write_text("1")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_publish_discards_what_a_killed_run_left(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "stale").write_text("0")
    with publish(tmp_path / "a") as directory:
        (directory / "x").write_text("1")
    assert tree(tmp_path) == {"a/x": "1"}


def test_overwrite_replaces_the_directory_as_a_whole(tmp_path, model):
    with pytest.raises(MinitronError, match="not empty"), publish(model):
        pass
    with publish(model, overwrite=True) as directory:
        (directory / "x").write_text("1")
        assert (model / "weights.bin").exists()  # the old one stands until the new one is whole
    assert tree(tmp_path) == {"model/x": "1"}


def test_a_failed_overwrite_keeps_the_old_directory(tmp_path, model):
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    with pytest.raises(RuntimeError), publish(model, overwrite=True):
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert os.listdir(tmp_path) == ["model"]


def test_a_symbolic_link_stays_one(tmp_path, model):
    """A link to another disk keeps its meaning: what is written goes there."""
    link = tmp_path / "here" / "out"
    link.parent.mkdir()
    link.symlink_to(model)
    with publish(link, overwrite=True) as directory:
        assert directory.parent == model.parent
        (directory / "x").write_text("1")
    assert link.is_symlink()
    assert tree(tmp_path) == {"model/x": "1"}
    assert tree(link) == {"x": "1"}


def test_write_json_replaces_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    artifact.write_json(file, {"path": Path("a"), "n": 1})
    assert json.loads(file.read_text()) == {"path": "a", "n": 1}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        artifact.write_json(file, {"n": 2})
    assert json.loads(file.read_text())["n"] == 1


def test_read_json_says_what_is_wrong(tmp_path):
    file = tmp_path / "x.json"
    with pytest.raises(MinitronError, match=f"^{file} does not exist$"):
        artifact.read_json(file)
    for content in (b"{", b"\xff"):
        file.write_bytes(content)
        with pytest.raises(MinitronError, match=f"^{file} is not valid JSON"):
            artifact.read_json(file)
    with pytest.raises(MinitronError, match=f"^{tmp_path} cannot be read .Is a directory.$"):
        artifact.read_json(tmp_path)


# Where it comes from


def test_manifest_names_everything(tmp_path, model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["launch/distill.py", "--seed", "1"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "big").write_text("not hashed")
    data = tmp_path / "data.bin"
    data.write_bytes(b"tokens")
    write_manifest(
        model,
        stage="distill",
        recipe={"seed": 1, "train": {"lr": 1e-4}},
        parents={"teacher": model, "data": data},
    )
    manifest = artifact.read_manifest(model)
    assert manifest["stage"] == "distill"
    assert manifest["recipe"] == {"seed": 1, "train": {"lr": 1e-4}}
    assert manifest["metrics"] == {}
    assert (manifest["command"], manifest["ranks"]) == (["launch/distill.py", "--seed", "1"], 8)
    assert manifest["parents"]["data"] == {
        "path": str(data),
        "fingerprint": hashlib.sha256(b"tokens").hexdigest()[:16],
    }
    assert manifest["files"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name in ("config.json", "weights.bin")
        for content in [(model / name).read_bytes()]
    }
    assert {"python", "torch", "megatron-core"} <= set(manifest["versions"])


def test_read_manifest_of_a_foreign_directory(tmp_path):
    assert artifact.read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "problem"), [("[1]", "does not hold a JSON object"), ("{}", "does not list")]
)
def test_a_manifest_of_another_form_is_refused(tmp_path, content, problem):
    (tmp_path / "manifest.json").write_text(content)
    for read in (artifact.read_manifest, verify):
        with pytest.raises(MinitronError, match=rf"manifest.json {problem}.*delete it to use"):
            read(tmp_path)


# Still what it was


def test_verify_passes_an_intact_artifact_and_a_foreign_directory(tmp_path, model):
    verify(model)
    verify(tmp_path)


def test_verify_finds_a_missing_file(model):
    (model / "weights.bin").unlink()
    with pytest.raises(MinitronError, match=r"weights.bin is missing although manifest.json lists"):
        verify(model)


def test_verify_finds_a_truncated_file(model):
    os.truncate(model / "weights.bin", 2559)
    with pytest.raises(MinitronError, match=r"weights.bin has 2559 bytes, manifest.json says 2560"):
        verify(model)


def test_verify_finds_a_flipped_bit(model):
    content = bytearray((model / "weights.bin").read_bytes())
    content[1000] ^= 1
    (model / "weights.bin").write_bytes(content)
    with pytest.raises(MinitronError, match=r"weights.bin does not match its SHA-256"):
        verify(model)
