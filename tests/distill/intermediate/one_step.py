"""One step with intermediate losses, on ranks and by hooks on transformers' models."""

import contextlib
from dataclasses import replace

import torch

from minitron.metrics import read_metrics
from minitron.parallel import initialize
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from tests import reference, runs
from tests.runs import (
    build_chunks_of,
    build_objective,
    load_tensors,
    open_batches,
    save_gradients,
)

ALL_STATES = ["embedding", "block_output", "mlp_input", "attention_relation"]
# With two stages the student's layers are 0-1 and 2-3, the teacher's 0-2 and 3-5: states travel in
# both directions, and the last pair is that of the final norms.
LAYERS = [(0, 3), (2, 1), (-1, -1)]
STEPS = TrainConfig(
    steps=10,
    lr=1e-3,
    warmup_steps=3,
    adam_eps=1e-6,
    global_batch_size=4,
    micro_batch_size=2,
    checkpoint_interval=0,
)
# A learning rate of zero: the gradients of one step are what is looked at.
ONE_STEP = replace(STEPS, steps=1, lr=0.0, warmup_steps=0, clip_grad=0.0)


def load(path):
    """A model directory in transformers."""
    return reference.LlamaForCausalLM.from_pretrained(path)


def train(parallel, run, *, gradients=False):
    """Do a run and write the weights, or the gradients; the map's weights or gradient."""
    topology = initialize(parallel)
    model = build_chunks_of(run.model, topology, recompute=run.train.recompute)
    objective = build_objective(run, model)
    batches = open_batches(run, rank=topology.dp_rank, size=topology.dp_size)
    trainer = Trainer(model, objective, batches, None, run.train, run.out)
    with contextlib.closing(trainer):
        trainer.run()
    if gradients:
        save_gradients(model, run.out / "gradients")
    else:
        runs.on_rank_zero(lambda: (run.out / "model").mkdir())
        runs.save_model(model, run.out / "model", dtype=torch.float32)
    weight = model[0].companion.weight
    return None if weight is None else weight.detach().clone()


def gradients(parallel, run):
    """Do a run of one step, and write the gradients; that of the map."""
    return train(parallel, run, gradients=True)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def gradient_errors(run, maps):
    """Relative errors of one step's losses and gradients."""
    student, teacher = load(run.model), load(run.teacher.source)
    plain = reference.Intermediate(run, student, teacher)
    batch = reference.global_batch(run, 0)
    kl = reference.masked_mean(reference.distillation_loss(student, teacher, batch), batch)
    loss, parts = plain.add(kl, batch)
    loss.backward()
    (record,) = read_metrics(run.out / "metrics.jsonl")
    expected = {"loss": loss.item(), "kl": kl.item(), **parts}
    assert record.keys() == expected.keys() | {
        "step",
        "lr",
        "grad_norm",
        "tokens",
        "ce",
        "top1_agreement",
        *runs.MEASURED,
    }
    errors = {name: abs(record[name] - value) / value for name, value in expected.items()}
    found = load_tensors(run.out / "gradients")
    assert found.keys() == {name for name, _ in student.named_parameters()}
    for name, parameter in student.named_parameters():
        errors[f"d {name}"] = relative_error(found[name], parameter.grad)
    squares = [p.grad.double().square().sum() for p in student.parameters()]
    for found in maps:
        assert (found is None) == (plain.map is None)
        if found is not None:
            errors["d map"] = relative_error(found, plain.map.grad)
    if plain.map is not None:
        squares.append(plain.map.grad.double().square().sum())
    norm = sum(squares).sqrt().item()
    errors["grad_norm"] = abs(record["grad_norm"] - norm) / norm
    return errors
