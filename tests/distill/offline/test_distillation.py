"""Distilling from a store, against plain PyTorch with the teacher at hand."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitron.data.batches import EvalBatches, open_windows
from minitron.distill.offline.objective import StoredDistillation
from minitron.distill.offline.store import LogitStore
from minitron.distill.offline.teacher import StoredTeacher, without_padding
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.parallel import initialize
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig, DistillConfig
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from tests import reference
from tests.distill.offline.stores import write_store
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_model,
    load_tensors,
    open_batches,
    run_on,
    save_gradients,
    write_tokens,
)
from tests.tiny import save_llama

TEMPERATURE = 1.3
# A learning rate of zero: the gradients of one step are what is looked at.
CONFIG = TrainConfig(
    steps=1, lr=0.0, clip_grad=0.0, global_batch_size=4, micro_batch_size=2, checkpoint_interval=0
)
# Written in other batches, and with another seed, than any run below reads.
STORES = {
    "full": CacheConfig(top_k=VOCAB, floats="fp32", temperature=TEMPERATURE, micro_batch_size=3),
    "top_k": CacheConfig(top_k=20, floats="fp32", temperature=TEMPERATURE),
    "draws": CacheConfig(draws=30, floats="fp32", temperature=TEMPERATURE),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    student = save_llama(root / "student", vocab_size=VOCAB, num_hidden_layers=3)
    teacher = save_llama(root / "teacher", seed=1, vocab_size=VOCAB, hidden_size=48)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(4)
    teacher.save_pretrained(root / "teacher")
    write_tokens(root / "tokens", 12 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 5 * SEQ_LENGTH + 1, seed=1)
    data = DataConfig(
        path=[str(root / "tokens")], valid_path=[str(root / "valid")], seq_length=SEQ_LENGTH
    )
    for name, cache in STORES.items():
        topology = "tp2" if name == "full" else "tp1"
        run_on(topology, write_store, root / "teacher", data, cache, root / name, 99)
    return root, student, teacher


def _distill(parallel, run, store, config):
    """Distill, then write the student's gradients."""
    topology = initialize(parallel)
    ranks = {"data_parallel_rank": topology.dp_rank, "data_parallel_size": topology.dp_size}
    validation = EvalBatches(
        open_windows([str(run.valid)], SEQ_LENGTH),
        micro_batch_size=run.train.micro_batch_size,
        include_remainder=False,
        **ranks,
    )
    student = build_model(run.model, topology)
    teacher = StoredTeacher(
        LogitStore(store), vocab_size=VOCAB, is_last_stage=topology.is_last_stage
    )
    objective = StoredDistillation(teacher, config)
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    trainer = Trainer([student], objective, batches, validation, run.train, run.out)
    with contextlib.closing(trainer):
        trainer.run()
    save_gradients([student], run.out / "gradients")


def _run(world, out, topology, store, train=CONFIG, student="student", **distill):
    """Validation before the step, the step, and the student's gradients."""
    root, _, _ = world
    run = Run(
        model=root / student, tokens=root / "tokens", valid=root / "valid", out=out, train=train
    )
    config = DistillConfig(temperature=TEMPERATURE, **distill)
    run_on(topology, _distill, run, root / store, config)
    validated, trained, _ = read_metrics(out / "metrics.jsonl")
    return run, validated, trained, load_tensors(out / "gradients")


def _check_gradients(student, found):
    assert found.keys() == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        error = (found[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, name


@pytest.mark.parametrize(
    ("topology", "micro", "total"),
    [("tp1", 4, 4), ("tp2+sp", 1, 6), ("pp2", 2, 8), ("dp2", 1, 4)],
)
def test_the_whole_distribution_teaches_as_the_teacher_does(
    world, tmp_path, topology, micro, total
):
    root, student, teacher = world
    config = replace(CONFIG, micro_batch_size=micro, global_batch_size=total)
    run, validated, trained, gradients = _run(world, tmp_path, topology, "full", config)

    batch = reference.global_batch(run, 0)
    assert 0 < batch.loss_mask.mean() < 1
    losses = reference.distillation_loss(student, teacher, batch, TEMPERATURE)
    expected = reference.masked_mean(losses, batch)
    assert trained["loss"] == trained["kl"] == pytest.approx(expected.item(), rel=1e-5)
    student.zero_grad()
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in student.parameters()]).norm()
    assert trained["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    if topology != "dp2":  # whose ranks hold half of each gradient
        _check_gradients(student, gradients)

    (whole,) = EvalBatches(
        open_windows([str(root / "valid")], SEQ_LENGTH),
        micro_batch_size=5,
        data_parallel_rank=0,
        data_parallel_size=1,
        include_remainder=False,
    )
    with torch.no_grad():
        kl = reference.distillation_loss(student, teacher, whole, TEMPERATURE).mean()
        cross_entropy = reference.language_modeling_loss(student, whole).mean()
        first, second = (model(whole.tokens).logits.argmax(-1) for model in (student, teacher))
    assert validated["val_kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert validated["val_loss"] == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert validated["val_top1_agreement"] == pytest.approx((first == second).float().mean().item())


def test_the_data_teaches_beside_the_store(world, tmp_path):
    _, student, teacher = world
    options = {"lm_weight": 0.3, "temperature_power": 2.0}
    run, _, trained, gradients = _run(world, tmp_path, "pp2", "full", **options)
    batch = reference.global_batch(run, 0)
    losses = reference.distillation_loss(student, teacher, batch, TEMPERATURE)
    kl = reference.masked_mean(losses, batch)
    ce = reference.masked_mean(reference.language_modeling_loss(student, batch), batch)
    expected = TEMPERATURE**2 * kl + 0.3 * ce
    with torch.no_grad():
        first, second = (model(batch.tokens).logits.argmax(-1) for model in (student, teacher))
    eighth = replace(batch, loss_mask=batch.loss_mask * (torch.arange(SEQ_LENGTH) % 8 == 0))
    agreement = reference.masked_mean((first == second).double(), eighth)
    means = {"loss": expected, "kl": kl, "ce": ce, "top1_agreement": agreement}
    for name, value in means.items():
        assert trained[name] == pytest.approx(value.item(), rel=1e-5), name
    student.zero_grad()
    expected.backward()
    _check_gradients(student, gradients)


@pytest.mark.parametrize("topology", ["tp1", "tp2"])
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_the_longer_table_is_padding(world, tmp_path, topology, longer):
    root, student, teacher = world
    paths = {"store": "full", "student": "student"}
    padded = save_llama(root / "padded", seed=2, vocab_size=VOCAB + 40)
    if longer == "student":
        student, paths["student"] = padded, "padded"
    else:
        teacher, paths["store"] = padded, "padded_full"
        cache = replace(STORES["full"], top_k=VOCAB + 40)
        data = DataConfig(path=[str(root / "tokens")], seq_length=SEQ_LENGTH)
        data = replace(data, valid_path=[str(root / "valid")])
        run_on("tp1", write_store, root / "padded", data, cache, root / "padded_full", 99)
    run, _, trained, gradients = _run(world, tmp_path, topology, **paths)

    batch = reference.global_batch(run, 0)
    for model in (student, teacher):  # transformers' own way to a shorter table
        hook = lambda module, args, logits: logits[..., :VOCAB]  # noqa: E731
        model.lm_head.register_forward_hook(hook)
    losses = reference.distillation_loss(student, teacher, batch, TEMPERATURE)
    loss = reference.masked_mean(losses, batch)
    assert trained["kl"] == pytest.approx(loss.item(), rel=1e-5)
    student.zero_grad()
    loss.backward()
    _check_gradients(student, gradients)


def test_what_padding_had_goes_to_the_tokens():
    """Of a teacher with three tokens and a padding row or two, of which the store has four."""
    ids = np.array([[2, 0, 1, 3], [0, 3, 1, 4], [1, 2, -1, -1]])
    probabilities = np.array([[0.4, 0.2, 0.2, 0.1], [0.4, 0.2, 0.2, 0.1], [0.5, 0.25, 0, 0]])
    with np.errstate(divide="ignore"):
        log_probs = np.log(probabilities)
    without_padding(ids, log_probs, 3)
    assert ids.tolist() == [[2, 0, 1, -1], [0, -1, 1, -1], [1, 2, -1, -1]]
    expected = [[0.5, 0.25, 0.25, 0], [0.4 / 0.7, 0, 0.2 / 0.7, 0], [0.5, 0.25, 0, 0]]
    np.testing.assert_allclose(np.exp(log_probs), expected, rtol=1e-12)


def test_a_loss_that_needs_whole_distributions_is_refused(world):
    root, _, _ = world
    teacher = StoredTeacher(LogitStore(root / "draws"), vocab_size=VOCAB, is_last_stage=True)
    message = (
        r"distill\.loss=jsd needs the teacher's whole distributions, .* instead of teacher\.log"
    )
    with pytest.raises(MinitronError, match=message):
        StoredDistillation(teacher, DistillConfig(temperature=TEMPERATURE, loss="jsd"))


def _log_probs(model, batch):
    return F.log_softmax(model(batch.tokens).logits.double() / TEMPERATURE, -1)


def test_top_k_is_the_divergence_of_its_bins(world, tmp_path):
    _, student, teacher = world
    run, _, trained, gradients = _run(world, tmp_path, "tp2+sp", "top_k")
    batch = reference.global_batch(run, 0)
    with torch.no_grad():
        log_q, ids = _log_probs(teacher, batch).topk(20)
    log_p = _log_probs(student, batch)
    kl = (log_q.exp() * (log_q - log_p.gather(-1, ids))).sum(-1)
    tail = 1 - log_q.exp().sum(-1)
    others = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
    expected = reference.masked_mean(kl + tail * (tail.log() - others), batch)
    assert trained["loss"] == pytest.approx(expected.item(), rel=1e-5)
    whole = reference.distillation_loss(student, teacher, batch, TEMPERATURE)
    assert trained["loss"] < reference.masked_mean(whole, batch).item()
    student.zero_grad()
    expected.backward()
    _check_gradients(student, gradients)


def test_draws_are_an_estimate_of_the_divergence(world, tmp_path):
    root, student, teacher = world
    run, validated, trained, gradients = _run(world, tmp_path, "pp2", "draws")
    assert validated.keys() == {"step", "tokens", "val_loss", "val_kl"}
    assert "top1_agreement" not in trained  # of few draws several are often as frequent
    batch = reference.global_batch(run, 0)
    store = LogitStore(root / "draws")
    counts = torch.zeros(*batch.tokens.shape, VOCAB + 1, dtype=torch.float64)
    for row, name in enumerate(batch.sample_ids.tolist()):
        targets = store.read(tuple(name), batch.tokens[row].numpy())
        weights = torch.from_numpy(np.exp(targets.log_probs.astype(np.float64)))
        counts[row].scatter_(-1, torch.from_numpy(targets.ids) % (VOCAB + 1), weights)
    drawn = counts[..., :VOCAB]
    with torch.no_grad():
        log_q = _log_probs(teacher, batch)
    negative_entropy = (log_q.exp() * log_q).sum(-1)
    estimate = negative_entropy - (drawn * _log_probs(student, batch)).sum(-1)
    expected = reference.masked_mean(estimate, batch)
    assert trained["loss"] == pytest.approx(expected.item(), rel=1e-5)
    student.zero_grad()
    expected.backward()
    _check_gradients(student, gradients)
    exact = reference.masked_mean(
        (log_q.exp() * (log_q - _log_probs(student, batch))).sum(-1), batch
    )
    assert trained["loss"] == pytest.approx(exact.item(), rel=0.2)
