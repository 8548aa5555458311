"""Intermediate losses on every pipeline stage, against hooks on transformers' models."""

import contextlib
import re
import shutil
from dataclasses import dataclass, fields, replace
from unittest import mock

import pytest
import torch

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill import intermediate, states
from minitron.distill.intermediate import find_pairs
from minitron.distill.relations import relation_loss
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.model import hf
from minitron.parallel import initialize
from minitron.sections.distill import IntermediateConfig, TeacherConfig
from minitron.sections.train import TrainConfig
from minitron.train.loop import Trainer
from tests import reference, runs
from tests.runs import (
    SEQ_LENGTH,
    VOCAB,
    Run,
    build_chunks_of,
    build_objective,
    load_tensors,
    open_batches,
    run_on,
    save_gradients,
    write_tokens,
)
from tests.tiny import save_llama, tiny_config

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
SIX_STEPS = replace(STEPS, steps=6)
# A learning rate of zero: the gradients of one step are what is looked at.
ONE_STEP = replace(STEPS, steps=1, lr=0.0, warmup_steps=0, clip_grad=0.0)
TOLERANCE = 5e-6  # relative, so that any two topologies agree to 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "student", vocab_size=VOCAB)
    save_llama(
        root / "teacher", seed=1, vocab_size=VOCAB, num_hidden_layers=6, hidden_size=48, head_dim=6
    )
    save_llama(root / "shallow", seed=2, vocab_size=VOCAB, num_hidden_layers=2)
    write_tokens(root / "tokens", 23 * SEQ_LENGTH + 1)
    return root


def load(path):
    return reference.LlamaForCausalLM.from_pretrained(path)


@pytest.fixture
def run(root, tmp_path):
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=root / "tokens",
        out=tmp_path,
        train=ONE_STEP,
        intermediate=IntermediateConfig(states=ALL_STATES, layers=LAYERS, weight=0.5),
    )


def _train(parallel, run, *, gradients=False):
    """Do a run; the map's weights, or its gradient if the gradients are wanted."""
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


def _gradients(parallel, run):
    return _train(parallel, run, gradients=True)


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


@pytest.mark.parametrize(
    ("topology", "loss"), [("pp2 uneven", "mse"), ("pp4", "cosine"), ("tp2+sp pp2", "mse")]
)
def test_losses_and_gradients(run, topology, loss):
    """Each state by itself, and other topologies, are in test_every_loss."""
    run = replace(run, intermediate=replace(run.intermediate, loss=loss))
    maps = run_on(topology, _gradients, run)
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


def test_models_of_one_width_need_no_map(run, root):
    layers = IntermediateConfig(states=ALL_STATES[:2], layers=[(-1, -3), (0, 0)], weight=2.0)
    run = replace(
        run,
        model=root / "shallow",
        teacher=TeacherConfig(path=root / "student"),
        intermediate=layers,
    )
    maps = run_on("pp2", _gradients, run)
    assert maps == [None, None]
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_change_nothing(run, recompute):
    """The hooks then run in the backward pass, when later micro-batches have gone forward."""
    run = replace(run, train=replace(run.train, recompute=recompute))
    maps = run_on("pp2", _gradients, run)
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


def test_windows_change_nothing(run):
    """The teacher sees one micro-batch at a time, with layers of its own on every stage."""
    teacher = replace(run.teacher, window=1, layers_per_stage=[4, 2])
    maps = run_on("pp2", _gradients, replace(run, teacher=teacher))
    errors = gradient_errors(run, maps)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("topology", ["tp1", "pp2", "tp2+sp pp2"])
def test_states_in_host_memory_change_nothing(run, topology):
    offloaded = replace(run, teacher=replace(run.teacher, offload_states=True))
    maps = run_on(topology, _with_distant_host, offloaded)
    errors = gradient_errors(offloaded, maps)
    assert max(errors.values()) < 1e-5, errors


def _with_distant_host(parallel, run):
    """Where host and device are two, what waits there is another tensor."""

    class FarHost(platform.HostCopy):
        def __init__(self, tensor):
            super().__init__(tensor.clone())

        def fetch(self):
            return self._host.clone()

    with mock.patch.object(platform, "HostCopy", FarHost):
        return _gradients(parallel, run)


def _window(parallel, run, seq_length):
    topology = initialize(parallel)
    objective = build_objective(run, build_chunks_of(run.model, topology))
    tokens = torch.zeros(1).expand(2, seq_length)  # without the memory
    return objective.window([Batch(*(tokens for _ in fields(Batch)))])


@pytest.mark.parametrize(
    ("topology", "states", "floats"),
    [
        # final states, embedding, three outputs, three inputs, and q, k, v of 8, 2 and 2 heads
        ("tp1", ALL_STATES, 48 * (1 + 1 + 3 + 3) + 3 * 12 * 6),
        ("tp2+sp", ALL_STATES, 48 * (1 + 1 + 3 + 3) / 2 + 3 * 12 * 6 / 2),
        ("pp2", ["embedding"], 48),  # beside the final states on another stage
    ],
)
def test_the_default_window_counts_all_states(run, topology, states, floats):
    run = replace(run, intermediate=replace(run.intermediate, states=states))
    expected = int(2**30 // (2 * 2**14 * floats * 4))
    assert set(run_on(topology, _window, run, 2**14)) == {expected}


# Many steps


@dataclass(frozen=True)
class Expected:
    """What plain PyTorch makes of a run with dynamic weight."""

    records: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    map: torch.Tensor


@pytest.fixture(scope="module")
def dynamic(root):
    """A run of ten steps with α = L_logits / L_is."""
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=root / "tokens",
        out=root,
        train=STEPS,
        intermediate=IntermediateConfig(states=ALL_STATES, layers=LAYERS),
    )


@pytest.fixture(scope="module")
def expected(dynamic):
    student, teacher = load(dynamic.model), load(dynamic.teacher.source)
    plain = reference.Intermediate(dynamic, student, teacher)
    records = reference.train(student, teacher, dynamic, intermediate=plain)
    return Expected(records, student.state_dict(), plain.map.detach())


def differences(expected, out, maps):
    """The largest relative differences in everything that is logged and learned."""
    records = read_metrics(out / "metrics.jsonl")
    assert len(records) == len(expected.records)
    found = {
        key: max(
            abs(ours[key] - plain[key]) / (plain[key] or 1.0)
            for ours, plain in zip(records, expected.records, strict=True)
        )
        for key in expected.records[0]
    }
    weights = load_tensors(out / "model")
    assert weights.keys() == expected.weights.keys()
    found["weights"] = max(
        relative_error(tensor, expected.weights[name]) for name, tensor in weights.items()
    )
    found["map"] = max(relative_error(weight, expected.map) for weight in maps)
    return found


@pytest.mark.parametrize("topology", ["tp1", "tp2", "tp2+sp", "pp2", "dp2", "tp2 pp2", "pp2 vpp2"])
def test_ten_steps_are_those_of_plain_pytorch(dynamic, expected, tmp_path, topology):
    maps = run_on(topology, _train, replace(dynamic, out=tmp_path))
    assert all(torch.equal(weight, maps[0]) for weight in maps)  # the stages' copies stay one
    found = differences(expected, tmp_path, maps)
    assert max(found.values()) < TOLERANCE, found
    first, *later = read_metrics(tmp_path / "metrics.jsonl")
    assert first["alpha"] == 0.0
    assert first["loss"] == first["kl"]
    assert all(record["alpha"] > 0.01 for record in later)


def _divided_by_microbatches(output, loss):
    """What megatron-core does with auxiliary losses where losses are means over micro-batches."""
    return states._AttachLoss.apply(output, loss / 2)


def _with_divided_losses(parallel, run):
    with mock.patch.object(states, "attach_loss", _divided_by_microbatches):
        return _gradients(parallel, run)


def test_a_loss_that_is_scaled_for_micro_batches_is_seen(run):
    errors = gradient_errors(run, run_on("pp2", _with_divided_losses, run))
    assert errors["d map"] == pytest.approx(0.5, abs=1e-3)
    assert all(error < 1e-5 for name, error in errors.items() if "intermediate" in name)


class _UnsharedCompanion(intermediate.Companion):
    def __init__(self, student, *args, **options):
        super().__init__(student, *args, **options)
        student.config.has_cond_embedder = False


def _with_unshared_map(parallel, run):
    with mock.patch.object(intermediate, "Companion", _UnsharedCompanion):
        return _gradients(parallel, run)


def test_copies_of_the_map_that_are_not_summed_are_seen(run):
    assert gradient_errors(run, run_on("pp2", _with_unshared_map, run))["d map"] > 0.1


# Resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory, dynamic):
    """Runs by topology: whole, or killed after four of six steps with a checkpoint of three."""
    directories = {}

    def finish(topology, precision="fp32", *, killed=False):
        key = topology, precision, killed
        if key not in directories:
            directories[key] = out = tmp_path_factory.mktemp("run")
            this = replace(dynamic, out=out, train=SIX_STEPS, precision=precision)
            if killed:
                this = replace(this, train=replace(SIX_STEPS, checkpoint_interval=3), crash_at=4)
            run_on(topology, runs.train, this)
        return directories[key]

    return finish


def step_records(out):
    records = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in runs.MEASURED} for r in records]


@pytest.mark.parametrize(("topology", "precision"), [("dp2", "bf16"), ("tp2 pp2", "fp32")])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path, dynamic, finished, topology, precision
):
    shutil.copytree(finished(topology, precision, killed=True), tmp_path, dirs_exist_ok=True)
    run = replace(dynamic, out=tmp_path, train=SIX_STEPS, precision=precision, resume=True)
    run_on(topology, runs.train, run)
    whole = finished(topology, precision)
    assert step_records(tmp_path) == step_records(whole)
    ours, theirs = load_tensors(tmp_path / "model"), load_tensors(whole / "model")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(("saved", "resumed"), [("tp2 pp2", "dp2"), ("dp2", "tp2 pp2")])
def test_a_run_goes_on_with_other_ranks(tmp_path, dynamic, finished, saved, resumed):
    shutil.copytree(finished(saved, killed=True), tmp_path, dirs_exist_ok=True)
    run_on(resumed, runs.train, replace(dynamic, out=tmp_path, train=SIX_STEPS, resume=True))
    for ours, whole in zip(step_records(tmp_path), step_records(finished("dp2")), strict=True):
        assert ours == pytest.approx(whole, rel=1e-5)


def test_validation_neither_sees_nor_changes_them(tmp_path, dynamic, finished):
    write_tokens(tmp_path / "valid", 5 * SEQ_LENGTH + 1, seed=1)
    config = replace(SIX_STEPS, valid_interval=3)
    run = replace(dynamic, out=tmp_path, train=config, valid=tmp_path / "valid")
    run_on("dp2", runs.train, run)
    records = step_records(tmp_path)
    validated = [r for r in records if "val_loss" in r]
    losses = {"val_loss", "val_kl", "val_top1_agreement"}
    assert all(r.keys() == {"step", "tokens"} | losses for r in validated)
    assert [r for r in records if "loss" in r] == step_records(finished("dp2"))


# Relations


def test_relations_of_many_rows_against_whole_matrices():
    """Chunks of rows in fp64: the values and gradients of the whole matrices."""
    generator = torch.Generator().manual_seed(3)
    ours = torch.randn(11, 2, (4 + 2 * 2) * 3, generator=generator, dtype=torch.float64)
    theirs = torch.randn(11, 2, (4 + 2 * 2) * 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(11, 2, generator=generator, dtype=torch.float64)

    def heads(x):
        return [part.permute(1, 2, 0, 3) for part in x.unflatten(-1, (8, -1)).split([4, 2, 2], 2)]

    found, expected = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    with mock.patch("minitron.distill.relations._ROWS", 4):
        losses = relation_loss(found, theirs, 4, 2)
        (losses * weights).sum().backward()
    whole = reference.relation_distance(heads(expected), heads(theirs)).t()
    (whole * weights).sum().backward()
    torch.testing.assert_close(losses, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-14)
    assert relation_loss(theirs, theirs, 4, 2).abs().max() < 1e-12


# Settings


STUDENT = hf.architecture_from_config(tiny_config().to_dict())
TEACHER = hf.architecture_from_config(tiny_config(num_hidden_layers=6).to_dict())


def test_the_default_is_the_papers_pair():
    config = IntermediateConfig(states=["block_output", "embedding"])
    assert [pair.name for pair in find_pairs(config, STUDENT, TEACHER)] == [
        "intermediate/block_output_1",
        "intermediate/embedding",
    ]
    assert find_pairs(config, STUDENT, TEACHER)[0].teacher.layer == 3
    assert find_pairs(IntermediateConfig(), STUDENT, TEACHER) == []


def test_layers_that_nothing_is_compared_at_need_not_exist():
    shallow = hf.architecture_from_config(tiny_config(num_hidden_layers=1).to_dict())
    assert find_pairs(IntermediateConfig(), shallow, TEACHER) == []
    (pair,) = find_pairs(IntermediateConfig(states=["embedding"]), shallow, TEACHER)
    assert pair.name == "intermediate/embedding"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"layers": [(4, 0)]},
            "distill.intermediate.layers=[[4, 0]] names layer 4 of the student, which has 4; "
            "use -4 to 3",
        ),
        (
            {"layers": [(0, 0), (3, -7)]},
            "distill.intermediate.layers=[[0, 0], [3, -7]] names layer -7 of the teacher, which "
            "has 6; use -6 to 5",
        ),
        ({"weight": -0.5}, "distill.intermediate.weight=-0.5 must not be negative"),
        (
            {"states": ["mlp_input", "mlp_input"]},
            "distill.intermediate.states=['mlp_input', 'mlp_input'] names something twice; "
            "leave one",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        find_pairs(IntermediateConfig(**{"states": ["block_output"], **values}), STUDENT, TEACHER)


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("num_attention_heads", "num_attention_heads", 4),
        ("num_key_value_heads", "num_query_groups", 4),
    ],
)
def test_relations_of_other_heads_are_refused(key, name, value):
    other = hf.architecture_from_config(tiny_config(**{key: value}).to_dict())
    message = (
        f"attention_relation compares head with head, but the student has {name}="
        f"{getattr(STUDENT, name)} and the teacher {value}; leave it out of "
        "distill.intermediate.states"
    )
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        find_pairs(IntermediateConfig(states=["attention_relation"]), STUDENT, other)
