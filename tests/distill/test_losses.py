"""What the losses of a distillation run log, and the settings they refuse."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from minitron.data.batches import EvalBatches, open_windows
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.model.weights import SINGLE_FILE
from minitron.sections.distill import DistillConfig
from minitron.sections.train import TrainConfig
from tests import reference, runs
from tests.distill.pairs import save_pair
from tests.ops import definitions
from tests.runs import SEQ_LENGTH, run_on, write_tokens

CONFIG = TrainConfig(
    steps=3,
    lr=1e-3,
    adam_eps=1e-6,
    global_batch_size=4,
    micro_batch_size=2,
    checkpoint_interval=0,
)
PLAIN = DistillConfig(
    jsd_beta=definitions.BETA,
    skew_alpha=definitions.ALPHA,
    top_k=definitions.K,
    top_p=definitions.P,
)
TOLERANCE = dict.fromkeys(("loss", "kl", "ce", "top1_agreement", "grad_norm", "weights"), 1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
    write_tokens(root / "valid", 4 * SEQ_LENGTH + 1, seed=1)
    return save_pair(root, CONFIG, student={"num_hidden_layers": 2}, teacher=sizes)


def _models(run):
    """Student and teacher in transformers, as the run finds them."""
    paths = (run.model, run.teacher.path)
    return [LlamaForCausalLM.from_pretrained(path).eval() for path in paths]


def _expected(run, monkeypatch):
    """The records and weights of plain PyTorch."""
    student, teacher = _models(run)
    config = run.distill
    parts = []

    def loss(student, teacher, batch):
        logits = student(batch.tokens).logits.double()
        with torch.no_grad():
            target = teacher(batch.tokens).logits.double()
        objective, kl = (
            definitions.objective(name, logits, target, config.temperature)
            for name in (config.loss, "forward_kl")
        )
        ce = reference.language_modeling_loss(student, batch)
        agrees = (logits.argmax(-1) == target.argmax(-1)).double()
        means = {"kl": kl, "ce": ce}
        part = {k: reference.masked_mean(x, batch).item() for k, x in means.items()}
        eighth = replace(batch, loss_mask=batch.loss_mask * (torch.arange(SEQ_LENGTH) % 8 == 0))
        part["top1_agreement"] = reference.masked_mean(agrees, eighth).item()
        parts.append(part)
        factor = config.temperature**config.temperature_power
        return factor * objective + config.lm_weight * ce

    monkeypatch.setattr(reference, "distillation_loss", loss)
    records = reference.train(student, teacher, run)
    return [{**a, **b} for a, b in zip(records, parts, strict=True)], student.state_dict()


def _compare(run, topology, monkeypatch):
    run_on(topology, runs.train, run)
    expected, weights = _expected(run, monkeypatch)
    records = read_metrics(run.out / "metrics.jsonl")
    for ours, plain in zip(records, expected, strict=True):
        for key, value in plain.items():
            assert ours[key] == pytest.approx(value, rel=TOLERANCE[key]), key
    for name, tensor in load_file(run.out / "model" / SINGLE_FILE).items():
        assert (tensor - weights[name]).norm() < TOLERANCE["weights"] * weights[name].norm(), name


@pytest.mark.parametrize(("topology", "loss"), [("tp2+sp", "jsd"), ("pp2", "top_p")])
def test_three_steps_are_those_of_plain_pytorch(run, tmp_path, monkeypatch, topology, loss):
    """With all that is logged; every loss and topology are in test_every_loss."""
    distill = replace(PLAIN, loss=loss, temperature=1.5, temperature_power=2.0, lm_weight=0.3)
    _compare(replace(run, out=tmp_path, distill=distill), topology, monkeypatch)


def test_agreement_on_held_out_data(run, tmp_path):
    valid = run.tokens.parent / "valid"
    distill = replace(PLAIN, loss="jsd")
    run_on("tp2", runs.train, replace(run, out=tmp_path, valid=valid, distill=distill))
    student, teacher = _models(run)
    windows = EvalBatches(
        open_windows([str(valid)], SEQ_LENGTH),
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        include_remainder=False,
    )
    with torch.no_grad():
        same = [
            student(batch.tokens).logits.argmax(-1) == teacher(batch.tokens).logits.argmax(-1)
            for batch in windows
        ]
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first.keys() == {"step", "tokens", "val_loss", "val_kl", "val_top1_agreement"}
    assert first["val_top1_agreement"] == pytest.approx(torch.cat(same).double().mean().item())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0.0}, "distill.temperature=0.0 must be positive"),
        ({"temperature": -1.0}, "distill.temperature=-1.0 must be positive"),
        ({"lm_weight": -0.5}, "distill.lm_weight=-0.5 must not be negative"),
        (
            {"jsd_beta": 1.0},
            "distill.jsd_beta=1.0 must lie between 0 and 1; at the ends take "
            "distill.loss=forward_kl or reverse_kl",
        ),
        (
            {"skew_alpha": 0.0},
            "distill.skew_alpha=0.0 must lie between 0 and 1; for 0 take distill.loss=forward_kl "
            "or reverse_kl",
        ),
        ({"top_k": 0}, "distill.top_k=0 must be at least 1"),
        ({"top_p": 1.5}, "distill.top_p=1.5 must lie in (0, 1]"),
    ],
)
def test_settings_without_sense_are_refused(keys, message):
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        DistillConfig(**keys)


def test_more_tokens_than_there_are_cannot_be_compared():
    DistillConfig(loss="top_k", top_k=61).check_vocabulary(61)
    DistillConfig(top_k=62).check_vocabulary(61)  # of another loss
    message = (
        "distill.top_k=62 is more than the vocabulary of 61; lower it, or set "
        "distill.loss=forward_kl for all of it"
    )
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        DistillConfig(loss="top_k", top_k=62).check_vocabulary(61)
