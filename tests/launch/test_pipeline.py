"""The main job from end to end: every launcher, with the demo's recipes on a model of toy size.

The chain runs once, each stage on other ranks; the tests look at what it left on disk and compute
it again with transformers.
"""

import difflib
import inspect
import json
import math
import re
import textwrap
import time
import tokenize

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from minitron import artifact
from minitron.data.tokenizer import load_tokenizer
from tests.launch.launcher import LAUNCH, TIMEOUT_S, Launch, launch
from tests.runs import MEASURED, write_tokens

SEQ_LENGTH = 32
# Samples of an evaluation whose number two ranks with micro-batches of 3 do not divide, and a
# shorter one at the end.
EVAL_LENGTH, EVAL_TOKENS = 100, 40 * 100 + 38
LAYERS, HIDDEN, FFN, VOCAB = 3, 48, 64, 350
PRUNED_HIDDEN, PRUNED_FFN = 32, 40
STEPS, BATCH, WARMUP, LR, MIN_LR = 6, 8, 2, 0.01, 0.001
CHECKPOINT = 4  # a step of the teacher that is validated and saved

TRAIN = (
    *("--data.seq_length", SEQ_LENGTH, "--data.valid_path", "demo/data/valid.txt"),
    *("--train.steps", STEPS, "--train.global_batch_size", BATCH, "--train.micro_batch_size", 2),
    *("--train.lr", LR, "--train.min_lr", MIN_LR, "--train.warmup_steps", WARMUP),
)
TP2 = ("--parallel.tensor_model_parallel_size", 2, "--parallel.sequence_parallel")
PP2 = ("--parallel.pipeline_model_parallel_size", 2)


def recipe(name):
    return ("--config", LAUNCH / "recipes" / f"demo_{name}.yaml")


def init(hidden, ffn):
    sizes = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_layers": LAYERS, "kv_channels": 8}
    sizes["max_position_embeddings"] = EVAL_LENGTH
    return [part for key, size in sizes.items() for part in (f"--model.init.{key}", size)]


DISTILL = (
    *("distill", *recipe("distill"), *TRAIN),
    *("--data.path", "0.75:demo/data/source.train", "--data.path", "0.25:demo/data/valid.txt"),
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, forked):
    """What the chain wrote; the recipes' paths begin with this directory's name."""
    root = tmp_path_factory.mktemp("pipeline")
    data = root / "demo" / "data"
    data.mkdir(parents=True)
    sources = [inspect.getsource(module) for module in (textwrap, json, tokenize)]
    lines = [json.dumps({"text": text}) for text in sources]
    (data / "source.train.jsonl").write_text("\n".join(lines))
    (data / "valid.txt").write_text(inspect.getsource(difflib)[:6000])
    write_tokens(data / "random", EVAL_TOKENS)

    def run(*arguments, ranks=1):
        result = forked(*arguments, cwd=root, ranks=ranks)
        assert result.status == 0, result.err

    run(
        *("preprocess", "--data.path", "demo/data/source.train.jsonl"),
        *("--tokenizer.train_vocab_size", VOCAB, "--out", "demo/data/source.train"),
    )
    launch(
        *("train", *recipe("teacher"), *init(HIDDEN, FFN), *TRAIN, *TP2),
        *("--train.checkpoint_interval", CHECKPOINT, "--train.valid_interval", CHECKPOINT),
        cwd=root,
        ranks=2,
    )
    run(
        *("importance", *recipe("importance"), "--data.path", "demo/data/source.train"),
        *("--data.seq_length", SEQ_LENGTH, "--importance.samples", 10, *PP2),
        ranks=2,
    )
    run(
        *("prune", *recipe("width_prune")),
        *("--prune.hidden_size", PRUNED_HIDDEN, "--prune.ffn_hidden_size", PRUNED_FFN),
    )
    run("prune", *recipe("depth_prune"), "--prune.num_layers", LAYERS - 1)
    run(
        *("train", *recipe("control"), *init(PRUNED_HIDDEN, PRUNED_FFN)),
        *("--data.path", "demo/data/source.train", "--data.seq_length", SEQ_LENGTH),
    )
    launch(*DISTILL, cwd=root, ranks=2)  # data-parallel
    run(
        *("eval", "--model", "demo/width", "--data.path", "demo/data/random"),
        *("--data.seq_length", EVAL_LENGTH, "--eval.micro_batch_size", 3, "--out", "demo/eval"),
        ranks=2,
    )
    checkpoint = ("--checkpoint", "demo/teacher", "--checkpoint.step", CHECKPOINT)
    run("export", *checkpoint, "--out", "demo/export")
    run("convert", "--model", "demo/width", *PP2, "--out", "demo/megatron", ranks=2)
    run(
        *("convert", "--model", "demo/width", "--checkpoint", "demo/megatron"),
        *("--out", "demo/back"),
    )
    run(
        *("report", "demo/teacher", "demo/width", "demo/random_init", "demo/scores", "demo/eval"),
        *("--out", "demo/report.html"),
    )
    return root / "demo"


def records(run):
    """Training lines and validation lines of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    return trained, [line for line in lines if line not in trained]


@torch.no_grad()
def log_probabilities(model_dir, samples):
    """[n, s, v] of the tokens that follow the s inputs of each of n samples."""
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return F.log_softmax(model(torch.tensor(samples)[:, :-1]).logits, -1)


def summed_loss(model_dir, samples):
    """Cross-entropy of samples of one length, added up."""
    predicted = log_probabilities(model_dir, samples).flatten(0, 1).double()
    return float(F.nll_loss(predicted, torch.tensor(samples)[:, 1:].flatten(), reduction="sum"))


def windows(tokens, length):
    """Every sample of `length` inputs, and the shorter last one, each in a list of its own."""
    samples = [tokens[i : i + length + 1] for i in range(0, len(tokens) - 1, length)]
    full = [sample for sample in samples if len(sample) == length + 1]
    return full, samples[len(full) :]


def valid_samples(demo):
    tokenizer = load_tokenizer(demo / "data" / "source.train.tokenizer")
    tokens = [*tokenizer.encode((demo / "data" / "valid.txt").read_text()), tokenizer.eod]
    return windows(tokens, SEQ_LENGTH)[0]


def valid_loss(demo, model):
    """Mean loss of a model directory on the full validation samples."""
    samples = valid_samples(demo)
    return summed_loss(demo / model, samples) / (len(samples) * SEQ_LENGTH)


def test_the_teacher_learns_and_says_how(demo):
    trained, validated = records(demo / "teacher")
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    for line in trained:
        assert line.keys() == {"step", "loss", "lr", "grad_norm", "tokens", *MEASURED}
        assert line["tokens"] == line["step"] * BATCH * SEQ_LENGTH
        assert line["grad_norm"] > 0
        assert line["tokens_per_second"] > 0
    assert [line["lr"] for line in trained[:WARMUP]] == [LR / 2, LR]
    assert trained[-1]["lr"] == pytest.approx(MIN_LR)
    assert all(line.keys() == {"step", "tokens", "val_loss"} for line in validated)
    assert [line["step"] for line in validated] == [0, CHECKPOINT, STEPS]
    assert validated[0]["val_loss"] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert validated[-1]["val_loss"] < validated[0]["val_loss"] - 0.5
    assert validated[-1]["val_loss"] == pytest.approx(valid_loss(demo, "teacher"), abs=1e-4)


def test_distillation_reports_what_transformers_computes(demo):
    trained, validated = records(demo / "width")
    losses = {"loss", "kl", "ce", "top1_agreement"}
    for line in trained:
        assert line.keys() == {"step", *losses, "lr", "grad_norm", "tokens", *MEASURED}
        assert line["kl"] == line["loss"]
        assert 0 <= line["top1_agreement"] <= 1
    assert trained[-1]["kl"] < trained[0]["kl"]
    assert [line["step"] for line in validated] == [0, STEPS]
    target = log_probabilities(demo / "teacher", valid_samples(demo))
    for line, model in zip(validated, ("width_pruned", "width"), strict=True):
        output = log_probabilities(demo / model, valid_samples(demo))
        divergence = F.kl_div(output, target, log_target=True, reduction="none").sum(-1).mean()
        assert line["val_kl"] == pytest.approx(float(divergence), abs=1e-4)
        assert line["val_loss"] == pytest.approx(valid_loss(demo, model), abs=1e-4)


def test_evaluation_is_what_transformers_computes(demo):
    tokens = np.fromfile(demo / "data" / "random.bin", np.uint16).astype(int).tolist()
    full, remainder = windows(tokens, EVAL_LENGTH)
    assert (len(full), len(remainder)) == (40, 1)
    losses = [summed_loss(demo / "width", samples) for samples in (full, remainder)]
    expected = sum(losses) / (EVAL_TOKENS - 1)
    result = json.loads((demo / "eval" / "eval.json").read_text())
    assert result["tokens"] == EVAL_TOKENS - 1
    assert result["lm_loss"] == pytest.approx(expected, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_scores_cover_the_whole_model(demo):
    scores = load_file(demo / "scores" / "scores.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    assert shapes == {  # three aggregations over samples times three over the sequence
        "hidden": (3, 3, LAYERS, HIDDEN),
        "hidden_total": (3, 3, HIDDEN),
        "ffn": (3, 3, LAYERS, FFN),
        "heads": (3, 3, LAYERS, 4),
        "query_groups": (3, 3, LAYERS, 2),
        "block_influence": (LAYERS,),
    }
    assert all(tensor.dtype == torch.float32 and (tensor > 0).all() for tensor in scores.values())


def test_students_have_the_shapes_asked_for(demo):
    width = LlamaForCausalLM.from_pretrained(demo / "width_pruned")
    assert (width.config.hidden_size, width.config.intermediate_size) == (PRUNED_HIDDEN, PRUNED_FFN)
    assert width.config.num_hidden_layers == LAYERS
    # The depth-pruned student is the teacher without its least influential layer.
    scores = load_file(demo / "scores" / "scores.safetensors")
    dropped = int(scores["block_influence"].argmin())
    teacher, depth = (
        load_file(demo / m / "model.safetensors") for m in ("teacher", "depth_pruned")
    )
    kept = [layer for layer in range(LAYERS) if layer != dropped]
    for layer, source in enumerate(kept):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(depth[name.format(layer)], teacher[name.format(source)])
    assert name.format(LAYERS - 1) not in depth


def test_the_control_is_the_width_student_without_knowledge(demo):
    control, student = (
        json.loads((demo / m / "config.json").read_text()) for m in ("random_init", "width")
    )
    ours = ("hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "vocab_size")
    assert {key: control[key] for key in ours} == {key: student[key] for key in ours}
    assert valid_loss(demo, "random_init") == pytest.approx(math.log(VOCAB), abs=0.1)
    assert valid_loss(demo, "width") < valid_loss(demo, "random_init") - 0.2


def test_every_artifact_verifies_and_names_its_parents(demo):
    parents = {
        "teacher": {},
        "scores": {"model": "teacher"},
        "width_pruned": {"model": "teacher", "scores": "scores"},
        "depth_pruned": {"model": "teacher", "scores": "scores"},
        "width": {"teacher": "teacher", "student": "width_pruned"},
        "eval": {"model": "width"},
        "export": {"run": "teacher"},
        "megatron": {"model": "width"},
        "back": {"model": "width", "checkpoint": "megatron/iter_0000000"},
    }
    for name, expected in parents.items():
        artifact.verify(demo / name)
        manifest = artifact.read_manifest(demo / name)
        assert manifest["parents"] == {
            role: {"path": f"demo/{path}", "fingerprint": artifact.fingerprint(demo / path)}
            for role, path in expected.items()
        }
    manifest = artifact.read_manifest(demo / "width")
    assert manifest["stage"] == "distill"
    assert manifest["ranks"] == 2
    assert manifest["command"][1:3] == [str(part) for part in recipe("distill")]
    assert manifest["metrics"]["num_parameters"] == sum(
        tensor.numel() for tensor in load_file(demo / "width" / "model.safetensors").values()
    )
    assert not list(demo.glob(".*"))  # nothing half-written


def test_every_model_speaks_with_the_same_tokenizer(demo):
    original = demo / "data" / "source.train.tokenizer"
    for model in ("teacher", "width_pruned", "width", "random_init", "export", "back"):
        for name in ("tokenizer.model", "tokenizer_config.json"):
            assert (demo / model / name).read_bytes() == (original / name).read_bytes()
    text = (demo / "data" / "valid.txt").read_text()
    theirs = AutoTokenizer.from_pretrained(demo / "width")
    assert theirs.encode(text, add_special_tokens=False) == load_tokenizer(original).encode(text)


def test_a_checkpoint_is_exported_as_it_was_in_the_middle_of_the_run(demo):
    validated = {line["step"]: line["val_loss"] for line in records(demo / "teacher")[1]}
    assert valid_loss(demo, "export") == pytest.approx(validated[CHECKPOINT], abs=1e-4)
    assert validated[CHECKPOINT] - validated[STEPS] > 0.01  # which the final model is not


def test_conversion_to_megatron_and_back_is_exact(demo):
    before, after = (load_file(demo / m / "model.safetensors") for m in ("width", "back"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])


def test_the_report_names_the_models_and_their_losses(demo):
    page = (demo / "report.html").read_text()
    table = (demo / "report.md").read_text()
    for run in ("teacher", "width", "random_init", "eval"):
        assert f"| {run.replace('_', chr(92) + '_')} |" in table
    assert page.count("<svg") == 4  # validation, two trainings, scores
    _, validated = records(demo / "width")
    for line in validated:
        assert f"{line['val_loss']:.3f}" in table
    assert "launch/distill.py --config" in page


@pytest.mark.parametrize("ending", ["kill", "terminate"])
def test_a_run_that_was_ended_resumes_to_the_same_weights(demo, ending):
    """With a checkpoint behind it, most likely while it writes the next one."""
    out = demo / ending
    run = Launch(
        *(*DISTILL, "--out", f"demo/{ending}", "--train.checkpoint_interval", 1),
        cwd=demo.parent,
        ranks=2,
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not (out / "checkpoints" / "iter_0000001").exists() and time.monotonic() < deadline:
        assert run.is_running, run.wait()
        time.sleep(0.02)
    getattr(run, ending)()
    if ending == "terminate":
        result = run.wait()
        assert result.status != 0
        assert result.err.count("stopped by a signal at step ") == 1
        assert "[rank " not in result.err  # where a traceback would begin
    assert not (out / "manifest.json").exists()
    steps = records(out)[0][-1]["step"]
    assert steps < STEPS

    result = launch(*DISTILL, "--out", f"demo/{ending}", "--resume", cwd=demo.parent, ranks=2)
    resumed = re.search(r"resumed from \S+/iter_000000(\d) at step \1", result.err)
    assert int(resumed[1]) == steps if ending == "terminate" else int(resumed[1]) <= steps
    artifact.verify(out)
    weights = [(demo / run / "model.safetensors").read_bytes() for run in (ending, "width")]
    assert weights[0] == weights[1]
    for resumed, whole in zip(records(out), records(demo / "width"), strict=True):
        for line in (*resumed, *whole):
            for key in MEASURED:
                line.pop(key, None)
        assert resumed == whole
