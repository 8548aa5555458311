"""What a distillation refuses before its first step, and what it says of the two models."""

import contextlib
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron.distill import gates
from minitron.distill.losses import LogitDistillation
from minitron.distill.teacher import Teacher
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.model import hf
from minitron.model.llama import padded_vocab_size
from minitron.parallel import initialize
from minitron.sections.distill import DistillConfig, TeacherConfig
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from tests import reference
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_model,
    build_teacher,
    load_tensors,
    open_batches,
    run_on,
    save_gradients,
    write_tokens,
)
from tests.tiny import random_llama, save_llama, tiny_config

CONFIG = TrainConfig(
    steps=1, lr=0.0, clip_grad=0.0, global_batch_size=4, micro_batch_size=2, checkpoint_interval=0
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher that expects each token again, as the data has it, and random students."""
    root = tmp_path_factory.mktemp("models")
    teacher = random_llama(tiny_config(vocab_size=VOCAB, tie_word_embeddings=True), seed=1)
    with torch.no_grad():
        for layer in teacher.model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
        teacher.model.norm.weight.fill_(1.0)
        teacher.model.embed_tokens.weight.normal_()
    teacher.save_pretrained(root / "teacher")
    save_llama(root / "student", vocab_size=VOCAB)
    save_llama(root / "padded", vocab_size=VOCAB + 100)
    write_tokens(root / "tokens", 12 * SEQ_LENGTH + 1, repeat=9)
    return root


@pytest.fixture
def run(models, tmp_path):
    return Run(
        model=models / "student",
        teacher=TeacherConfig(path=models / "teacher"),
        tokens=models / "tokens",
        out=tmp_path,
        train=CONFIG,
    )


# Vocabularies


def test_equal_vocabularies_need_no_tokenizer():
    assert gates.shared_vocab_size(61, 61, None) == 61


def test_padding_beyond_the_tokenizer_is_not_compared():
    assert gates.shared_vocab_size(73, 160, 70) == 73
    assert gates.shared_vocab_size(160, 70, 70) == 70


def test_other_vocabularies_are_refused():
    with pytest.raises(MinitronError) as caught:
        gates.shared_vocab_size(61, 99, None)
    assert str(caught.value) == (
        "the teacher's vocabulary has 61 tokens, the student's 99, and neither brings a tokenizer "
        "that could tell which rows are padding; distillation compares token by token: give a "
        "student pruned from this teacher"
    )
    with pytest.raises(MinitronError, match=r"student's 69, and the tokenizer has 70; dist"):
        gates.shared_vocab_size(70, 69, 70)


# Weights


def _check_weights(parallel, model_dir):
    model = build_model(model_dir, initialize(parallel))
    try:
        gates.check_weights(model, Path("m"))
    except MinitronError as error:
        return str(error)
    return None


@pytest.mark.parametrize("topology", ["tp1", "tp2", "tp2+sp pp2", "tp4"])
def test_sound_weights_pass(models, topology):
    assert set(run_on(topology, _check_weights, models / "student")) == {None}


@pytest.mark.parametrize("topology", ["tp1", "tp2", "pp2", "tp2 pp2"])
def test_damaged_weights_are_named_on_every_rank(tmp_path, topology):
    model = random_llama(tiny_config())
    with torch.no_grad():
        model.model.layers[3].self_attn.k_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight[5, 40] = math.nan
        model.model.norm.weight[3] = math.inf
        model.model.layers[1].input_layernorm.weight.zero_()  # a vector may be
    model.save_pretrained(tmp_path)
    assert set(run_on(topology, _check_weights, tmp_path)) == {
        "the weights of m are damaged: model.layers.0.mlp.down_proj.weight holds NaN or "
        "infinity, model.layers.3.self_attn.k_proj.weight is all zeros, model.norm.weight holds "
        "NaN or infinity; write them anew, or give another model"
    }


# The first losses


def _check_start(parallel, run, allow_untrained):
    topology = initialize(parallel)
    teacher = build_teacher(replace(run.teacher, allow_untrained=allow_untrained), topology)
    student = [build_model(run.model, topology)]
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "log", said.append)
        try:
            gates.check_start(teacher, student, next(batches.microbatches(0)))
        except MinitronError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("topology", ["tp1", "tp2+sp", "pp2", "dp2"])
def test_both_models_first_losses_are_said(run, topology):
    replicas = 2 if topology == "dp2" else 1
    ranks = [open_batches(run, rank=rank, size=replicas) for rank in range(replicas)]
    batch = reference.concatenate([next(batches.microbatches(0)) for batches in ranks])
    teacher = LlamaForCausalLM.from_pretrained(run.teacher.path, dtype=torch.float32)
    student = LlamaForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    losses = [
        reference.masked_mean(loss, batch).item()
        for loss in (
            reference.language_modeling_loss(teacher, batch),
            reference.language_modeling_loss(student, batch),
            reference.distillation_loss(student, teacher, batch),
        )
    ]
    assert losses[0] < math.log(VOCAB) < losses[1]
    sizes = [sum(p.numel() for p in model.parameters()) for model in (student, teacher)]
    first = "teacher's loss {:.4f}, initial student's loss {:.4f}, KL between them {:.4f}"
    expected = [
        "on the first samples, in nats a token: " + first.format(*losses),
        "warning: the student has more parameters ({:,} > {:,}) than the teacher; did you swap "
        "--teacher and --student?".format(*sizes),
    ]
    assert all(said == expected for said in run_on(topology, _check_start, run, False))


def test_a_student_that_is_the_teacher_is_warned_of(models, run):
    same = replace(run, model=run.teacher.path)
    ((_, warning),) = run_on("tp1", _check_start, same, True)
    assert warning.startswith("warning: the student says what the teacher says; is --student the ")


def test_a_student_that_knows_more_than_the_teacher_is_warned_of(models, run):
    swapped = replace(run, model=run.teacher.path, teacher=TeacherConfig(path=run.model))
    ((first, warning),) = run_on("tp1", _check_start, swapped, True)
    of_teacher, of_student = re.findall(r"loss (\S+),", first)
    assert warning == (
        f"warning: the student has a lower loss ({of_student} < {of_teacher}) than the teacher; "
        "did you swap --teacher and --student?"
    )


@pytest.mark.parametrize("topology", ["tp1", "pp2"])
def test_a_teacher_that_knows_nothing_is_refused(run, topology):
    untrained = replace(run, teacher=TeacherConfig(path=run.model))
    for said in run_on(topology, _check_start, untrained, False):
        assert said[-1].startswith("the teacher predicts the data no better than chance: ")
        assert said[-1].endswith(
            f"that of guessing among {VOCAB} tokens {math.log(VOCAB):.2f}; check that it is the "
            "right model for this data, or add --teacher.allow_untrained"
        )
    for said in run_on(topology, _check_start, untrained, True):
        assert not said[-1].startswith("the teacher predicts")


def _check_teacher(parallel, run, allow_untrained):
    topology = initialize(parallel)
    teacher = build_model(run.teacher.path, topology)
    batch = next(open_batches(run).microbatches(0))
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "log", said.append)
        try:
            gates.check_teacher(teacher, batch, allow_untrained=allow_untrained)
        except MinitronError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("topology", ["tp2+sp", "pp2"])
def test_a_teacher_is_judged_before_its_outputs_are_stored(models, run, topology):
    batch = next(open_batches(run).microbatches(0))
    teacher = LlamaForCausalLM.from_pretrained(run.teacher.path, dtype=torch.float32)
    loss = reference.masked_mean(reference.language_modeling_loss(teacher, batch), batch)
    expected = f"before the first sample: teacher's loss {loss.item():.4f} nats a token"
    assert run_on(topology, _check_teacher, run, False) == [[expected]] * 2
    untrained = replace(run, teacher=TeacherConfig(path=run.model))
    for _, refusal in run_on(topology, _check_teacher, untrained, False):
        assert re.fullmatch(
            r"the teacher predicts the data no better than chance: .*, or add "
            r"--teacher\.allow_untrained",
            refusal,
        )
    assert all(len(said) == 1 for said in run_on(topology, _check_teacher, untrained, True))


# Tables of different length


def _distill(parallel, run):
    topology = initialize(parallel)
    paths = (run.model, run.teacher.path)
    rows = max(hf.read_architecture(path).vocab_size for path in paths)
    rows = padded_vocab_size(rows, topology.tp_size)
    student, teacher = (build_model(path, topology, padded_vocab=rows) for path in paths)
    objective = LogitDistillation(Teacher(teacher, run.teacher), DistillConfig())
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    trainer = Trainer([student], objective, batches, None, run.train, run.out)
    with contextlib.closing(trainer):
        trainer.run()
    save_gradients([student], run.out / "gradients")


@pytest.mark.parametrize("longer", ["student", "teacher"])
@pytest.mark.parametrize("topology", ["tp1", "tp2"])
def test_the_longer_table_is_padding(models, run, topology, longer):
    paths = {"model": models / "padded"}
    if longer == "teacher":
        padded = TeacherConfig(path=models / "padded")
        paths = {"model": models / "teacher", "teacher": padded}
    run = replace(run, **paths)
    run_on(topology, _distill, run)

    student = LlamaForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    teacher = LlamaForCausalLM.from_pretrained(run.teacher.path, dtype=torch.float32)
    batch = reference.global_batch(run, 0)
    for model in (student, teacher):  # transformers' own way to a shorter table
        model.lm_head.register_forward_hook(lambda module, args, logits: logits[..., :VOCAB])
    loss = reference.masked_mean(reference.distillation_loss(student, teacher, batch), batch)
    loss.backward()
    (record,) = read_metrics(run.out / "metrics.jsonl")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in load_tensors(run.out / "gradients").items():
        expected = dict(student.named_parameters())[name].grad
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), name
