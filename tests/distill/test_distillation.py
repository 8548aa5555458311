"""The distillation loss through two whole models, against plain PyTorch on one process."""

import contextlib
from dataclasses import replace

import pytest
import torch

from minitron.distill.losses import LogitDistillation
from minitron.metrics import read_metrics
from minitron.model.sharding import save_model
from minitron.parallel import initialize
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from tests import reference
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_chunks_of,
    build_teacher,
    load_tensors,
    open_batches,
    run_on,
    save_gradients,
    write_tokens,
)
from tests.tiny import save_llama

# A learning rate of zero: the gradients of one step are what is looked at.
CONFIG = TrainConfig(
    steps=1, lr=0.0, clip_grad=0.0, global_batch_size=4, micro_batch_size=2, checkpoint_interval=0
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    student = save_llama(root / "student", vocab_size=VOCAB, num_hidden_layers=3)
    teacher = save_llama(
        root / "teacher",
        seed=1,
        vocab_size=VOCAB,
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=5,
        tie_word_embeddings=True,
    )
    write_tokens(root / "tokens", 12 * SEQ_LENGTH + 1)
    return root, student, teacher


@pytest.fixture
def run(models, tmp_path):
    root, _, _ = models
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=root / "tokens",
        out=tmp_path,
        train=CONFIG,
    )


def _distill(parallel, run, temperature):
    """Distill, then write the student's gradients and the teacher's weights; state of both."""
    topology = initialize(parallel)
    student = build_chunks_of(run.model, topology)
    teacher = build_teacher(run.teacher, topology)
    objective = LogitDistillation(teacher, DistillConfig(temperature=temperature))
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    trainer = Trainer(student, objective, batches, None, run.train, run.out)
    with contextlib.closing(trainer):
        trainer.run()
    save_gradients(student, run.out / "gradients")
    (run.out / "teacher").mkdir(exist_ok=True)
    save_model([teacher.model], run.out / "teacher", dtype=torch.float32)
    return {
        "trainable": any(p.requires_grad for p in teacher.model.parameters()),
        "gradients": any(p.grad is not None for p in teacher.model.parameters()),
        "training": [teacher.model.training, *{chunk.training for chunk in student}],
    }


def test_loss_and_gradients(models, run):
    """With the optimizer that a run has; every loss and topology are in test_every_loss."""
    _, student, teacher = models
    temperature = 1.7
    facts = run_on("tp2 pp2", _distill, run, temperature)

    batch = reference.global_batch(run, 0)
    assert 0 < batch.loss_mask.mean() < 1
    losses = reference.distillation_loss(student, teacher, batch, temperature)
    expected = reference.masked_mean(losses, batch)
    student.zero_grad()
    expected.backward()
    (record,) = read_metrics(run.out / "metrics.jsonl")
    assert record["loss"] == record["kl"] == pytest.approx(expected.item(), rel=1e-5)
    found = load_tensors(run.out / "gradients")
    assert found.keys() == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name

    for rank in facts:
        assert rank == {"trainable": False, "gradients": False, "training": [False, True]}


def test_the_teacher_stays_as_it_is(models, run):
    root, _, _ = models
    config = replace(CONFIG, steps=3, lr=1e-2)
    run_on("tp2", _distill, replace(run, train=config), 1.0)
    before, after = load_tensors(root / "teacher"), load_tensors(run.out / "teacher")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(record["grad_norm"] > 0.01 for record in read_metrics(run.out / "metrics.jsonl"))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(models, run):
    run_on("tp2+sp", _distill, replace(run, model=run.teacher.path), 1.0)
    (record,) = read_metrics(run.out / "metrics.jsonl")
    assert abs(record["loss"]) < 1e-6
    assert record["grad_norm"] < 1e-5
