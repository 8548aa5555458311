"""launch/importance.py as a user calls it, and pruning by what it found."""

import json
import xml.etree.ElementTree as ET

import pytest
from safetensors.torch import load_file

from minitron import artifact
from minitron.prune.depth import load_depth
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import save_llama


@pytest.fixture
def arguments(tmp_path):
    save_llama(tmp_path / "model", vocab_size=VOCAB)
    prefix = write_tokens(tmp_path / "tokens", 4 * SEQ_LENGTH + 1)
    data = ("--data.path", prefix, "--data.seq_length", SEQ_LENGTH, "--importance.samples", 3)
    return ("--model", tmp_path / "model", *data)


def test_scores_and_trials_of_a_pipeline_choose_layers(tmp_path, arguments, forked):
    trials = ("--depth.layers", "--depth.windows", 2, "--depth.greedy", 1)
    pipeline = ("--parallel.pipeline_model_parallel_size", 2)
    out = tmp_path / "scores"
    result = forked(
        "importance", *arguments, *trials, *pipeline, "--out", out, cwd=tmp_path, ranks=2
    )
    assert result.status == 0, result.err
    depth = load_depth(out)
    lines = result.out.splitlines()
    assert lines[0].endswith("lm loss without it  increase  logit distance")
    for trial, line in zip(depth.layers, lines[2:6], strict=True):
        cells = [str(trial.drop_layers[0]), f"{trial.lm_loss:.4f}", f"{trial.logit_distance:.4f}"]
        assert [line.split()[i] for i in (0, 2, 4)] == cells
    assert ET.parse(out / "depth.svg").getroot().tag.endswith("svg")
    manifest = artifact.read_manifest(out)
    assert manifest["files"].keys() >= {"scores.safetensors", "depth.json", "depth.md", "depth.svg"}
    calibration = manifest["metrics"]["calibration"]
    assert calibration["samples"] == 3
    data = tmp_path / "tokens.bin"
    assert calibration["data"] == {str(data): artifact.fingerprint(data)}
    assert load_file(out / "scores.safetensors")["ffn"].shape == (3, 3, 4, 48)

    assert "greedy by lm_loss" in result.out
    assert "window of 2" in (out / "depth.md").read_text()

    best = min(depth.windows, key=lambda trial: trial.lm_loss).drop_layers
    sizes = ("--prune.num_layers", 2, "--prune.layer_ranking", "window")
    source = ("--model", tmp_path / "model", "--scores", out)
    result = forked("prune", *source, *sizes, "--out", tmp_path / "pruned", cwd=tmp_path)
    assert result.status == 0, result.err
    assert "layer ranking: window, on 3 samples" in result.out + result.err
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["layers"] == [layer for layer in range(4) if layer + 1 not in best]


def test_scores_alone_make_no_trials(tmp_path, arguments, forked):
    result = forked("importance", *arguments, "--out", tmp_path / "scores", cwd=tmp_path)
    assert result.status == 0, result.err
    assert not (tmp_path / "scores" / "depth.json").exists()
    *table, last = result.out.splitlines()
    assert len(table) == 2 + 4
    assert last == f"wrote {tmp_path / 'scores'}"
    fields = {"samples", "tokenizer", "data"}
    manifest = artifact.read_manifest(tmp_path / "scores")
    assert manifest["metrics"]["calibration"].keys() == fields
