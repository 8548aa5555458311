"""The loop's record of a run, its learning rate, and the settings it refuses."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron.data.batches import EvalBatches, open_windows
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.sections.distill import IntermediateConfig, TeacherConfig
from minitron.sections.train import TrainConfig
from minitron.train.optimizer import learning_rate
from tests import reference, runs
from tests.runs import MEASURED, SEQ_LENGTH, VOCAB, Run, load_tensors, run_on, write_tokens
from tests.tiny import save_llama

CONFIG = TrainConfig(
    steps=5,
    lr=1e-3,
    warmup_steps=2,
    global_batch_size=4,
    micro_batch_size=2,
    valid_interval=2,
    checkpoint_interval=0,
)


# Learning rate


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    config = TrainConfig(steps=14, warmup_steps=4, lr=8.0, min_lr=2.0)
    rates = [learning_rate(step, config) for step in range(1, 15)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]
    assert rates[4 + 5 - 1] == pytest.approx(5.0)  # half way
    assert rates[-1] == 2.0
    falling = rates[3:]
    assert falling == sorted(falling, reverse=True)
    steps = [a - b for a, b in itertools.pairwise(falling)]
    assert steps == pytest.approx(steps[::-1])  # as slow at the end as at the start
    assert steps[0] < steps[4]


def test_the_learning_rate_at_its_edges():
    no_warmup = TrainConfig(steps=2, lr=1.0, min_lr=0.0)
    assert [learning_rate(step, no_warmup) for step in (1, 2)] == pytest.approx([0.5, 0.0])
    only_warmup = TrainConfig(steps=2, lr=1.0, warmup_steps=2)
    assert [learning_rate(step, only_warmup) for step in (1, 2)] == [0.5, 1.0]
    assert TrainConfig(lr=3e-4).final_lr == pytest.approx(3e-5)
    assert TrainConfig(lr=3e-4, min_lr=0.0).final_lr == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"micro_batch_size": 0}, "train.micro_batch_size=0 must be at least 1"),
        ({"global_batch_size": -8}, "train.global_batch_size=-8 must be at least 1"),
        ({"steps": -1}, "train.steps=-1 must not be negative"),
        ({"lr": -1e-4, "min_lr": 0.0}, "train.lr=-0.0001 must not be negative"),
        ({"min_lr": -1.0}, "train.min_lr=-1.0 must not be negative"),
        ({"clip_grad": -1.0}, "train.clip_grad=-1.0 must not be negative"),
        ({"weight_decay": -0.1}, "train.weight_decay=-0.1 must not be negative"),
        ({"keep_checkpoints": -1}, "train.keep_checkpoints=-1 must not be negative"),
        ({"lr": 1e-4, "min_lr": 2e-4}, "train.min_lr=0.0002 is above train.lr=0.0001; lower it"),
        (
            {"steps": 10, "warmup_steps": 11},
            "train.warmup_steps=11 is more than train.steps=10; lower it",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError) as caught:
        TrainConfig(**values)
    assert str(caught.value) == message


# The record of a run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = save_llama(root / "student", vocab_size=VOCAB)
    teacher = save_llama(root / "teacher", vocab_size=VOCAB, seed=1, num_hidden_layers=2)
    write_tokens(root / "tokens", 9 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 5 * SEQ_LENGTH + 4, seed=1)
    return root, student, teacher


def _run(root, out, **changes):
    run = Run(
        model=root / "student",
        tokens=root / "tokens",
        valid=root / "valid",
        out=out,
        train=CONFIG,
    )
    return replace(run, **changes)


def _validation_means(root, *losses):
    """Means of per-token losses over the five whole samples of the validation data."""
    batches = EvalBatches(
        open_windows([str(root / "valid")], SEQ_LENGTH),
        micro_batch_size=5,
        data_parallel_rank=0,
        data_parallel_size=1,
        include_remainder=False,
    )
    (batch,) = batches
    with torch.no_grad():
        return [loss(batch).mean().item() for loss in losses]


def _most_probable(model, batch):
    return model(batch.tokens).logits.argmax(-1)


@pytest.mark.parametrize(("topology", "distill"), [("tp1", False), ("dp2", True), ("pp2", True)])
def test_metrics_of_a_run(models, tmp_path, topology, distill):
    root, student, teacher = models
    source = TeacherConfig(path=root / "teacher") if distill else None
    run = _run(root, tmp_path, teacher=source)
    results = run_on(topology, runs.train, run)
    records = read_metrics(tmp_path / "metrics.jsonl")

    losses = ["loss", "kl", "ce", "top1_agreement"] if distill else ["loss"]
    validation = ["val_loss", "val_kl", "val_top1_agreement"] if distill else ["val_loss"]
    trained = [r for r in records if "loss" in r]
    for step, record in enumerate(trained, start=1):
        expected = {"step", "lr", "grad_norm", "tokens", *MEASURED, *losses}
        assert record.keys() == expected
        assert record["step"] == step
        assert record["tokens"] == step * 4 * SEQ_LENGTH
        assert all(record[name] > 0 for name in MEASURED)
        assert record["lr"] == learning_rate(step, CONFIG)
        if distill:
            assert record["kl"] == record["loss"]
    assert len(trained) == 5

    validated = [r for r in records if "val_loss" in r]
    assert len(validated) + len(trained) == len(records)
    assert [r["step"] for r in records] == [0, 1, 2, 2, 3, 4, 4, 5, 5]
    assert [r["step"] for r in validated] == [0, 2, 4, 5]
    for record in validated:
        assert record.keys() == {"step", "tokens", *validation}
        assert record["tokens"] == record["step"] * 4 * SEQ_LENGTH
    expected = _validation_means(
        root,
        lambda batch: reference.language_modeling_loss(student, batch),
        lambda batch: reference.distillation_loss(student, teacher, batch),
        lambda batch: _most_probable(student, batch).eq(_most_probable(teacher, batch)).double(),
    )
    found = [validated[0][name] for name in validation]
    assert found == pytest.approx(expected[: len(found)], rel=1e-5)

    last = {name: validated[-1][name] for name in validation}
    assert results == [last | {"tokens": 5 * 4 * SEQ_LENGTH}] * len(results)


def test_validation_has_no_influence(models, tmp_path):
    root, _, _ = models
    found = []
    source = TeacherConfig(path=root / "teacher")
    for valid in (root / "valid", None):
        run = _run(root, tmp_path / f"{valid is None}", valid=valid, teacher=source)
        run_on("tp1", runs.train, run)
        records = [r for r in read_metrics(run.out / "metrics.jsonl") if "loss" in r]
        found.append([(r["loss"], r["grad_norm"]) for r in records])
    assert found[0] == found[1]
    assert len(read_metrics(tmp_path / "True" / "metrics.jsonl")) == CONFIG.steps


def test_no_steps_write_the_model_as_it_was(models, tmp_path):
    root, _, _ = models
    run = _run(root, tmp_path, train=TrainConfig(steps=0))
    (result,) = run_on("tp1", runs.train, run)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert result["tokens"] == 0
    before, after = load_tensors(root / "student"), load_tensors(tmp_path / "model")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def _failure(parallel, run):
    try:
        runs.train(parallel, run)
    except MinitronError as error:
        return str(error)


def test_validation_data_without_a_label_that_counts_are_refused(models, tmp_path):
    root, _, _ = models
    write_tokens(tmp_path / "valid", 5 * SEQ_LENGTH + 3, prompt=5 * SEQ_LENGTH + 1)
    run = _run(root, tmp_path / "out", valid=tmp_path / "valid")
    message = (
        "none of the labels in data.valid_path counts, they are all of prompts; give data with "
        "responses, or none"
    )
    assert run_on("tp1", _failure, run) == [message]


@pytest.mark.parametrize(
    ("valid", "message"),
    [
        (
            None,
            "at step 1 the loss is nan and the gradient norm nan; lower train.lr=0.001 or look "
            "at the data, and start another run",
        ),
        ("valid", "before the first step val_loss is nan; look at the model and the data"),
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank(models, tmp_path, valid, message):
    root, student, _ = models
    broken = copy.deepcopy(student)
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    run = _run(root, tmp_path / "out", model=tmp_path / "broken", valid=valid and root / valid)
    assert run_on("pp2", _failure, run) == [message] * 2


@pytest.mark.parametrize("topology", ["dp2", "pp2"])
def test_a_step_without_a_label_that_counts_is_passed_over(models, tmp_path, topology):
    """Its data are seen, and nothing is learnt: not even of α, which stays as it was."""
    root, _, _ = models
    states = IntermediateConfig(states=["embedding"])
    source = TeacherConfig(path=root / "teacher")
    run = _run(root, tmp_path, teacher=source, intermediate=states, valid=None, prompts_at=2)
    run_on(topology, runs.train, run)
    student, teacher = (
        LlamaForCausalLM.from_pretrained(root / name) for name in ("student", "teacher")
    )
    plain = reference.Intermediate(run, student, teacher)
    expected = reference.train(student, teacher, run, intermediate=plain)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert records[2].keys() == {"step", "skipped", "tokens", *MEASURED}
    for ours, theirs in zip(records, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-5)
    weights = load_tensors(tmp_path / "model")
    for name, parameter in student.named_parameters():
        assert (weights[name] - parameter).norm() < 1e-5 * parameter.norm(), name


# Batches


def test_a_global_batch_that_does_not_divide_is_refused(models, tmp_path):
    root, _, _ = models
    run = _run(root, tmp_path, train=replace(CONFIG, micro_batch_size=3))
    with pytest.raises(MinitronError, match=r"global_batch_size=4 is not a multiple of .* 3 x 1"):
        runs.open_batches(run)
