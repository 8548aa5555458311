"""launch/generate.py as a user calls it, and a student that learns what it wrote."""

import inspect
import json
import textwrap
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from minitron import artifact
from minitron.data.tokenizer import load_tokenizer, train_sentencepiece
from minitron.errors import MinitronError
from tests.launch.launcher import TIMEOUT_S, Launch
from tests.launch.search.searching import call
from tests.tiny import save_llama

VOCAB = 400
PROMPTS = 9
ANSWER = (
    *("generate", "--model", "teacher", "--prompts", "asked.jsonl"),
    *("--sampling.max_new_tokens", 12, "--generate.micro_batch_size", 2),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    lines = [line for line in inspect.getsource(textwrap).splitlines() if line.strip()]
    (root / "teacher").mkdir()
    train_sentencepiece(lines, VOCAB, root / "teacher")
    save_llama(root / "teacher", vocab_size=VOCAB, max_position_embeddings=256)
    save_llama(root / "silent", vocab_size=VOCAB)
    prompts = [json.dumps({"prompt": line}) for line in lines[20 : 20 + PROMPTS]]
    (root / "asked.jsonl").write_text("\n".join(prompts))
    return root


@pytest.fixture(scope="module")
def answered(root, forked):
    result = forked(*ANSWER, "--out", "answered", cwd=root)
    assert result.status == 0, result.err
    assert f"wrote answered/responses: {PROMPTS} responses, " in result.out
    return root / "answered"


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_answered_in_order(root, answered):
    artifact.verify(answered)
    manifest = artifact.read_manifest(answered)
    assert (manifest["stage"], manifest["metrics"]["documents"]) == ("generate", PROMPTS)
    asked, lines = read_lines(root / "asked.jsonl"), read_lines(answered / "responses.jsonl")
    tokenizer = load_tokenizer(root / "teacher")
    for question, line in zip(asked, lines, strict=True):
        assert line["prompt_tokens"] == tokenizer.encode(question["prompt"])
        assert line["response"] == tokenizer.decode(line["response_tokens"])
        assert len(line["response_tokens"]) == 12 or line["finished"]
    assert len({line["response"] for line in lines}) == PROMPTS


@pytest.mark.parametrize(
    "parallel",
    [
        (),  # data-parallel
        ("--parallel.tensor_model_parallel_size", 2, "--parallel.sequence_parallel"),
    ],
)
def test_ranks_do_not_change_the_responses(root, answered, tmp_path, forked, parallel):
    result = forked(*ANSWER, *parallel, "--out", tmp_path / "out", cwd=root, ranks=2)
    assert result.status == 0, result.err
    for name in ("responses.jsonl", "responses.bin", "responses.idx"):
        assert (tmp_path / "out" / name).read_bytes() == (answered / name).read_bytes()


def test_a_killed_run_continues(root, answered, tmp_path, forked):
    out = tmp_path / "out"
    run = Launch(*ANSWER, "--generate.micro_batch_size", 1, "--out", out, cwd=root)
    deadline = time.monotonic() + TIMEOUT_S
    while not (out / "responses.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    lines = (answered / "responses.jsonl").read_bytes().splitlines(keepends=True)
    if (out / "manifest.json").exists():  # it was faster
        (out / "manifest.json").unlink()
    (out / "responses.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:9])
    result = forked(*ANSWER, "--sampling.top_p", 0.5, "--out", out, "--resume", cwd=root)
    assert result.status == 2
    assert "sampling.top_p: 1.0 -> 0.5; take the old values" in result.err
    result = forked(*ANSWER, "--out", out, "--resume", cwd=root)
    assert result.status == 0, result.err
    assert f"answers 4 of {PROMPTS} prompts; continuing" in result.err
    assert (out / "responses.jsonl").read_bytes() == b"".join(lines)


def test_another_recipe_is_refused_before_a_model_is_built(root, answered, monkeypatch):
    monkeypatch.chdir(root)
    monkeypatch.setattr("minitron.model.llama.LlamaModel.__init__", None)
    with pytest.raises(MinitronError, match=r"sampling.top_p: 1.0 -> 0.5; take the old values"):
        call(*ANSWER, "--sampling.top_p", 0.5, "--out", answered, "--resume")


def test_a_student_learns_the_responses_alone(root, answered, tmp_path, forked):
    run = tmp_path / "student"
    result = forked(
        *("train", "--model", "teacher", "--data.path", "answered/responses"),
        *("--data.seq_length", 32, "--train.steps", 1, "--train.global_batch_size", 2),
        *("--train.checkpoint_interval", 0, "--out", run),
        cwd=root,
    )
    assert result.status == 0, result.err
    found = [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]

    tokens, learnt = [], []
    tokenizer = load_tokenizer(root / "teacher")
    for line in read_lines(answered / "responses.jsonl"):
        answer = [*line["response_tokens"], *[tokenizer.eod] * line["finished"]]
        tokens += [*line["prompt_tokens"], *answer]
        learnt += [False] * len(line["prompt_tokens"]) + [True] * len(answer)
    model = LlamaForCausalLM.from_pretrained(root / "teacher", dtype=torch.float32)
    sums = []
    for start in range(0, len(tokens) - 32, 32):
        sample = torch.tensor(tokens[start : start + 33])
        with torch.no_grad():
            logits = model(sample[None, :-1]).logits[0]
        counted = torch.tensor(learnt[start + 1 : start + 33])
        losses = F.cross_entropy(logits, sample[1:], reduction="none")
        sums.append((losses[counted].sum().item(), counted.sum().item()))
    pairs = [
        (one[0] + two[0]) / (one[1] + two[1]) for one in sums for two in sums if one is not two
    ]
    assert min(abs(pair - found[0]) for pair in pairs) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "silent", "--prompts", "asked.jsonl"), "silent holds no tokenizer; copy that"),
        (("--model", "teacher", "--prompts", "none.jsonl"), "none.jsonl does not exist; give a "),
        (("--model", "teacher"), "--prompts.path is missing; give it"),
        (
            ("--model", "teacher", "--prompts", "asked.jsonl", "--generate.micro_batch_size", 0),
            "generate.micro_batch_size=0 must be at least 1",
        ),
        (
            ("--model", "teacher", "--prompts", "asked.jsonl", "--sampling.top_p", 2),
            "sampling.top_p=2.0 must be above 0 and at most 1",
        ),
    ],
)
def test_mistakes_are_one_line(root, tmp_path, forked, arguments, message):
    result = forked("generate", *arguments, "--out", tmp_path / "out", cwd=root)
    assert result.status == 2
    (line,) = [line for line in result.err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()
