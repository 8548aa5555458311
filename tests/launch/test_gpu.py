"""The main job on one GPU, by NCCL, against the same on the CPU."""

import json

import pytest
import torch

from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import ImportanceConfig
from tests.launch.launcher import launch

load_file = pytest.importorskip("safetensors.torch").load_file
runs = pytest.importorskip("tests.runs")  # needs megatron-core
importance = pytest.importorskip("minitron.prune.importance")
for module in ("jsonargparse", "zstandard"):  # needed by the launched scripts
    pytest.importorskip(module)

HOOKS = ("_see_norm", "_see_neurons", "_see_heads", "_see_layer", "_end_microbatch")
SIZES = {"hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 3, "num_attention_heads": 4}
TRAIN = (
    *("--train.steps", 5, "--train.global_batch_size", 4, "--train.micro_batch_size", 2),
    *("--train.lr", 0.01, "--train.min_lr", 0.001, "--train.warmup_steps", 1),
)


def _chain(root):
    """Train a teacher, score, prune and distill it; every step's loss, and the scores."""
    root.mkdir()
    prefix = runs.write_tokens(root / "tokens", 20 * runs.SEQ_LENGTH + 1)
    data = ("--data.path", prefix, "--data.seq_length", runs.SEQ_LENGTH)
    init = [part for k, v in SIZES.items() for part in (f"--model.init.{k}", v)]
    vocabulary = ("--model.init.vocab_size", runs.VOCAB)
    launch("train", *init, *vocabulary, *data, *TRAIN, "--out", root / "teacher", cwd=root)
    scores = ("--importance.samples", 10, "--out", root / "scores")
    launch("importance", "--model", root / "teacher", *data, *scores, cwd=root)
    source = ("--model", root / "teacher", "--scores", root / "scores")
    sizes = ("--prune.ffn_hidden_size", 32, "--out", root / "pruned")
    launch("prune", *source, *sizes, cwd=root)
    models = ("--teacher", root / "teacher", "--student", root / "pruned")
    launch("distill", *models, *data, *TRAIN, "--out", root / "student", cwd=root)
    losses = []
    for run in ("teacher", "student"):
        lines = (root / run / "metrics.jsonl").read_text().splitlines()
        losses += [record["loss"] for record in map(json.loads, lines) if "loss" in record]
    return torch.tensor(losses), load_file(root / "scores" / "scores.safetensors")


@pytest.mark.gpu
def test_training_scores_and_distillation_equal_the_cpus(tmp_path, monkeypatch):
    on_gpu = _chain(tmp_path / "gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = _chain(tmp_path / "cpu")
    assert len(on_gpu[0]) == 10
    torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=2e-3, atol=2e-3)
    for name, scores in on_cpu[1].items():
        kept = (slice(2), slice(2)) if scores.ndim > 2 else ...  # variances magnify rounding
        torch.testing.assert_close(on_gpu[1][name][kept], scores[kept], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_hooks_of_importance_do_not_wait_for_the_gpu(tmp_path, monkeypatch):
    """All that importance adds to a layer, and to the end of a micro-batch."""
    prefix = runs.write_tokens(tmp_path / "tokens", 20 * runs.SEQ_LENGTH + 1)
    data = ("--data.path", prefix, "--data.seq_length", runs.SEQ_LENGTH)
    init = [part for k, v in SIZES.items() for part in (f"--model.init.{k}", v)]
    model = (*init, "--model.init.vocab_size", runs.VOCAB, "--out", tmp_path / "model")
    launch("train", *model, *data, *TRAIN, cwd=tmp_path)
    calls = []

    def watched(name):
        hook = getattr(importance._Collector, name)

        def call(*args):
            calls.append(name)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return hook(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    for name in HOOKS:
        monkeypatch.setattr(importance._Collector, name, watched(name))
    importance.measure_importance(
        tmp_path / "model",
        data=DataConfig(path=[str(prefix)], seq_length=runs.SEQ_LENGTH),
        importance=ImportanceConfig(samples=6),
        parallel=ParallelConfig(),
        precision="fp32",
    )
    torch.distributed.destroy_process_group()
    assert [calls.count(name) for name in HOOKS] == [2 * 3 * 6, 3 * 6, 3 * 6, 3 * 6, 6]
