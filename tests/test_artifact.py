import hashlib
import json
import os
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
    check_out(model, resume=True)
    check_out(model, overwrite=True)


def test_overwrite_spares_what_minitron_did_not_write(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(MinitronError, match="which minitron did not write"):
        check_out(tmp_path, overwrite=True)
    (tmp_path / "recipe.yaml").write_text("out: x")  # an unfinished run
    check_out(tmp_path, overwrite=True)


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


# Where it comes from


def test_manifest_names_everything(tmp_path, model):
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


def test_sha256_reads_files_longer_than_its_buffer(tmp_path):
    content = os.urandom((1 << 24) + 3)
    (tmp_path / "x").write_bytes(content)
    assert artifact.sha256(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_fingerprint_follows_content_not_place(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    a, b, c = (artifact.fingerprint(tmp_path / name) for name in "abc")
    assert a == b != c
    (tmp_path / "b" / "more").write_text("")
    assert artifact.fingerprint(tmp_path / "b") != a


def test_fingerprint_of_an_artifact_is_that_of_its_manifest(model):
    before = artifact.fingerprint(model)
    (model / "note.txt").write_text("a file added later")
    assert artifact.fingerprint(model) == before
    write_manifest(model, stage="train", recipe={"seed": 2}, parents={})
    assert artifact.fingerprint(model) != before


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
