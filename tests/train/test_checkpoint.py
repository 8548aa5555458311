"""A killed run goes on as if nothing had happened, on the same ranks or on others."""

import shutil
from dataclasses import replace

import pytest
import torch

from minitron.metrics import read_metrics
from minitron.train.config import TrainConfig
from tests import runs
from tests.runs import SEQ_LENGTH, VOCAB, Run, load_tensors, run_on, write_tokens
from tests.tiny import save_llama

STEPS = 10
CONFIG = TrainConfig(
    steps=STEPS,
    lr=1e-2,
    warmup_steps=2,
    adam_eps=1e-6,
    global_batch_size=4,
    micro_batch_size=1,
    checkpoint_interval=5,
    valid_interval=0,
)
WITHOUT_CHECKPOINTS = replace(CONFIG, checkpoint_interval=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    save_llama(root / "model", vocab_size=VOCAB, tie_word_embeddings=True)
    tokens = write_tokens(root / "tokens", 23 * SEQ_LENGTH + 1)
    return Run(model=root / "model", tokens=tokens, out=root / "out", train=CONFIG)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory, run):
    """Directories of runs that died after seven steps, two more than their last checkpoint."""
    directories = {}

    def crash(topology, precision="fp32"):
        if (topology, precision) not in directories:
            out = tmp_path_factory.mktemp("crashed")
            died = replace(run, out=out, precision=precision, crash_at=7)
            run_on(topology, runs.train, died)
            directories[topology, precision] = out
        return directories[topology, precision]

    return crash


def _steps(out):
    records = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in records]


@pytest.mark.parametrize(
    ("topology", "precision"),
    [("tp1", "fp32"), ("tp1", "bf16"), ("dp2", "fp32"), ("dp2", "bf16"), ("tp2 pp2", "fp32")],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, run, crashed, topology, precision
):
    whole = replace(run, out=tmp_path / "whole", train=WITHOUT_CHECKPOINTS, precision=precision)
    run_on(topology, runs.train, whole)
    shutil.copytree(crashed(topology, precision), tmp_path / "resumed")
    assert [r["step"] for r in _steps(tmp_path / "resumed")] == [*range(1, 8)]
    run_on(topology, runs.train, replace(whole, out=tmp_path / "resumed", resume=True))
    assert _steps(tmp_path / "resumed") == _steps(tmp_path / "whole")
    weights = [load_tensors(tmp_path / name / "model") for name in ("whole", "resumed")]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [("tp2", "tp1"), ("tp2", "pp2"), ("tp2 pp2", "tp1"), ("tp1", "tp2+sp"), ("dp2", "tp1"), ("dp2","tp2 dp2"), ("tp1", "dp2"), ("dp2", "pp2"), ("pp2 dp2", "dp2")],
)
def test_a_run_goes_on_with_other_ranks(tmp_path, run, crashed, saved, resumed):
    whole = replace(run, out=tmp_path / "whole", train=WITHOUT_CHECKPOINTS)
    run_on(resumed, runs.train, whole)
    shutil.copytree(crashed(saved), tmp_path / "resumed")
    run_on(resumed, runs.train, replace(whole, out=tmp_path / "resumed", resume=True))
    for a, b in zip(_steps(tmp_path / "resumed"), _steps(tmp_path / "whole"), strict=True):
        print(a,b)
