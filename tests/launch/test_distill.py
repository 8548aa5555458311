"""launch/distill.py with intermediate losses, and what is left of them in its results: nothing."""

import json

import pytest
import torch

from tests.launch.launcher import LAUNCH
from tests.runs import SEQ_LENGTH, VOCAB, load_tensors, write_tokens
from tests.tiny import save_llama


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_llama(root / "teacher", vocab_size=VOCAB, seed=1, hidden_size=48, head_dim=6)
    save_llama(root / "student", vocab_size=VOCAB, num_hidden_layers=3)
    write_tokens(root / "train", 40 * SEQ_LENGTH + 1)
    return root


def test_a_run_with_intermediate_losses_is_exported_without_their_map(root, forked):
    def run(*arguments):
        result = forked(*arguments, cwd=root)
        assert result.status == 0, result.err

    run(
        *("distill", "--config", LAUNCH / "recipes" / "demo_distill.yaml"),
        *("--teacher", "teacher", "--teacher.allow_untrained", "--student", "student"),
        *("--out", "run"),
        *("--data.path", "train", "--data.valid_path", "train", "--data.seq_length", SEQ_LENGTH),
        *("--distill.intermediate.states", "embedding"),
        *("--distill.intermediate.states", "block_output"),
        *("--distill.intermediate.layers", "[[-1, -1], [0, 1]]"),
        *("--train.steps", 4, "--train.warmup_steps", 1, "--train.checkpoint_interval", 2),
    )
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    names = ["embedding", "block_output_2", "block_output_0"]
    for record in trained:
        values = [record[f"intermediate/{name}"] for name in names]
        expected = record["kl"] + record["alpha"] * sum(values)
        assert record["loss"] == pytest.approx(expected)
    assert [line["alpha"] > 0 for line in trained] == [False, True, True, True]

    run("export", "--run", "run", "--out", "export")
    exported, student = load_tensors(root / "export"), load_tensors(root / "run")
    assert exported.keys() == student.keys() == load_tensors(root / "student").keys()
    assert all(torch.equal(tensor, student[name]) for name, tensor in exported.items())
