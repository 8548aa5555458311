"""launch/distill.py with intermediate losses, and what is left of them in its results: nothing."""

import json

import pytest
import torch

from minitron.sections.train import TrainConfig
from minitron.train.optimizer import learning_rate
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
        return result.out

    said = run(
        *("distill", "--config", LAUNCH / "recipes" / "demo_distill.yaml"),
        *("--teacher", "teacher", "--teacher.allow_untrained", "--student", "student"),
        *("--out", "run"),
        *("--data.path", "train", "--data.valid_path", "train", "--data.seq_length", SEQ_LENGTH),
        *("--distill.intermediate.states", "embedding"),
        *("--distill.intermediate.states", "block_output"),
        *("--distill.intermediate.layers", "[[-1, -1], [0, 1]]"),
        *("--train.steps", 4, "--train.warmup_steps", 1, "--train.checkpoint_interval", 2),
    )
    assert said == "wrote run\n"
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    names = ["embedding", "block_output_2", "block_output_0"]
    for record in trained:
        values = [record[f"intermediate/{name}"] for name in names]
        expected = record["kl"] + record["alpha"] * sum(values)
        assert record["loss"] == pytest.approx(expected)
    assert [line["alpha"] > 0 for line in trained] == [False, True, True, True]

    assert run("export", "--checkpoint", "run", "--out", "export") == "wrote export\n"
    exported, student = load_tensors(root / "export"), load_tensors(root / "run")
    assert exported.keys() == student.keys() == load_tensors(root / "student").keys()
    assert all(torch.equal(tensor, student[name]) for name, tensor in exported.items())


def test_a_resumed_run_may_change_its_batches_schedule_and_ranks(root, forked):
    def arguments(seq_length, batch, lr, parallel):
        return (
            *("--teacher", "teacher", "--teacher.allow_untrained", "--student", "student"),
            *("--data.path", "train", "--data.seq_length", seq_length, "--out", "changed"),
            *("--train.global_batch_size", batch, "--train.lr", lr, "--train.warmup_steps", 2),
            *("--train.steps", 5, f"--parallel.{parallel}_model_parallel_size", 2),
        )

    first = (*arguments(SEQ_LENGTH, 4, 1e-3, "tensor"), "--until_step", 2)
    result = forked("distill", *first, cwd=root, ranks=2)
    assert result.status == 0, result.err
    tokens = root / "train.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[2:] + content[:2])
    other = (*arguments(SEQ_LENGTH // 2, 6, 5e-4, "pipeline"), "--resume")
    changes = [
        "data.seq_length: 16 -> 8",
        "fingerprint of data.path: ",
        "parallel.pipeline_model_parallel_size: 1 -> 2",
        "parallel.tensor_model_parallel_size: 2 -> 1",
        "train.global_batch_size: 4 -> 6",
        "train.lr: 0.001 -> 0.0005",
    ]
    result = forked("distill", *other, "--allow-change", cwd=root, ranks=2)
    assert result.status == 0, result.err
    said = [line for line in result.err.splitlines() if "goes on with a change: " in line]
    assert len(said) == len(changes)
    assert all(change in line for line, change in zip(said, changes, strict=True))

    lines = [json.loads(x) for x in (root / "changed" / "metrics.jsonl").read_text().splitlines()]
    seen = [2 * 4 * SEQ_LENGTH + n * 6 * SEQ_LENGTH // 2 for n in range(4)]
    assert [line["tokens"] for line in lines] == [4 * SEQ_LENGTH, *seen]
    config = TrainConfig(steps=5, lr=5e-4, warmup_steps=2)
    assert [line["lr"] for line in lines[2:]] == [learning_rate(step, config) for step in (3, 4, 5)]

    back = (*arguments(SEQ_LENGTH, 6, 5e-4, "pipeline")[:-2], "--resume")
    result = forked("distill", *back, cwd=root)
    assert result.status == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "than changed/recipe.yaml: data.seq_length: 8 -> 16; add --allow_change, or " in line

    saved = (root / "changed" / "recipe.yaml").read_text()
    same = arguments(SEQ_LENGTH // 2, 6, 5e-4, "pipeline")[:-2]
    fewer = [4 if value == 5 else value for value in same]  # steps
    result = forked("distill", *fewer, "--resume", "--allow-change", cwd=root)
    assert result.status == 2
    assert "train.steps=4 is less than the 5 steps that the run has done; raise" in result.err
    assert (root / "changed" / "recipe.yaml").read_text() == saved
    assert (root / "changed" / "manifest.json").exists()
