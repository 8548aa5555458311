"""Tasks from the command line: measured, and used to choose layers."""

import inspect
import json
import textwrap

import pytest

from minitron import artifact
from minitron.data.tokenizer import train_sentencepiece
from minitron.prune.depth import load_depth
from tests.eval.test_tasks import VOCAB, write_tasks
from tests.tiny import save_llama

pytest.importorskip("lm_eval")


def test_tasks_measure_a_model_and_choose_its_layers(tmp_path, forked):
    def run(*arguments, ranks=1):
        result = forked(*arguments, cwd=tmp_path, ranks=ranks)
        assert result.status == 0, result.err
        return result.out

    save_llama(tmp_path / "model", vocab_size=VOCAB)
    train_sentencepiece([inspect.getsource(textwrap)], VOCAB, tmp_path / "model")
    (tmp_path / "text.txt").write_text(inspect.getsource(textwrap))
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks")
    tasks = ("--tasks.names", "minitron_code", "--tasks.include_path", tmp_path / "tasks")
    said = run("eval", "--model", tmp_path / "model", *tasks, "--out", tmp_path / "eval")
    found = json.loads((tmp_path / "eval" / "tasks.json").read_text())["minitron_code"]
    assert f"{found['acc']:.4f}" in said
    assert not (tmp_path / "eval" / "eval.json").exists()
    assert artifact.read_manifest(tmp_path / "eval")["metrics"]["tasks"]["minitron_code"] == found

    data = ("--data.path", tmp_path / "text.txt", "--data.seq_length", 16)
    trials = ("--depth.windows", 2, "--depth.samples", 2, "--importance.samples", 2)
    source = ("--model", tmp_path / "model")
    out = ("--out", tmp_path / "scores")
    run("importance", *source, *data, *trials, *tasks, *out, ranks=2)
    depth = load_depth(tmp_path / "scores")
    assert depth.accuracy == found["acc"]
    best = min(depth.windows, key=lambda trial: (-trial.accuracy, trial.lm_loss)).drop_layers
    sizes = ("--prune.num_layers", 2, "--prune.layer_ranking", "window_accuracy")
    scores = ("--scores", tmp_path / "scores")
    run("prune", *source, *scores, *sizes, "--out", tmp_path / "pruned")
    record = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert record["layers"] == [layer for layer in range(4) if layer + 1 not in best]
