"""What identifies an input of a stage: its content, read in part where it is large."""

import hashlib
import os
import sys

import pytest

from minitron import artifact
from minitron.artifact import write_manifest
from minitron.errors import MinitronError


@pytest.fixture
def model(tmp_path):
    """A finished artifact."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "weights.bin").write_bytes(bytes(range(256)) * 10)
    write_manifest(directory, stage="train", recipe={"seed": 1}, parents={}, metrics={"loss": 2.5})
    return directory


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


def test_fingerprint_of_nothing(tmp_path):
    with pytest.raises(MinitronError, match=f"^{tmp_path / 'a'} does not exist$"):
        artifact.fingerprint(tmp_path / "a")


@pytest.mark.parametrize("position", [0, 1 << 20, 3 << 20])
def test_fingerprint_sees_the_content_of_large_files(tmp_path, position):
    """In the begin, and further on as far as training spreads what it changes."""
    weights = tmp_path / "model.safetensors"
    content = bytearray(os.urandom((3 << 20) + 100_000))
    weights.write_bytes(content)
    before = artifact.fingerprint(tmp_path)
    content[position : position + 100_000] = os.urandom(100_000)
    weights.write_bytes(content)
    assert artifact.fingerprint(tmp_path) != before


def test_fingerprint_reads_little_of_large_files(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(1 << 40)  # takes no room, but would take hours to read
    artifact.fingerprint(tmp_path)


def test_fingerprint_of_an_artifact_is_of_what_its_manifest_lists(model):
    before = artifact.fingerprint(model)
    (model / "note.txt").write_text("a file added later")
    assert artifact.fingerprint(model) == before
    (model / "note.txt").unlink()
    (model / "weights.bin").write_bytes(bytes(2560))
    write_manifest(model, stage="train", recipe={"seed": 1}, parents={}, metrics={"loss": 2.5})
    assert artifact.fingerprint(model) != before


def test_fingerprint_is_not_of_how_an_artifact_was_made(model, monkeypatch):
    """The same weights from a run that was finished twice."""
    before = artifact.fingerprint(model)
    for name in ("recipe.yaml", "inputs.json", "metrics.jsonl"):
        (model / name).write_text("other")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "--resume"])
    old = artifact.read_manifest(model)
    write_manifest(model, stage="train", recipe={"seed": 2}, parents={"model": model})
    assert artifact.read_manifest(model)["command"] != old["command"]
    assert artifact.fingerprint(model) == before
