"""launch/search.py: the race is a distillation, whatever the ranks and however often it dies."""

import gc
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from minitron import artifact, config
from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.model import hf
from minitron.model.llama import LlamaModel
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.scores import load_scores, save_scores
from minitron.search.trials import Trials
from minitron.train.loop import Trainer
from tests.harness import run_distributed
from tests.prune.scored import random_importance
from tests.runs import SEQ_LENGTH, VOCAB, Crash, write_tokens
from tests.tiny import save_llama

LAUNCH = Path(__file__).parents[2] / "launch"


def load_script(stage):
    spec = importlib.util.spec_from_file_location(f"launch_{stage}", LAUNCH / f"{stage}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(stage, *arguments):
    """Run a stage in this process, on its rank."""
    script = load_script(stage)
    in_pool = dist.is_initialized()  # whose group it is then
    try:
        script.main(config.parse(script.Recipe, list(map(str, arguments))))
    finally:
        if not in_pool and dist.is_initialized():
            dist.destroy_process_group()  # of no use to other tests in this process


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model, its scores and the arguments of a search that race three of four shapes."""
    root = tmp_path_factory.mktemp("inputs")
    model, scores = root / "model", root / "scores"
    save_llama(model, vocab_size=VOCAB)
    scores.mkdir()
    save_scores(scores, random_importance(hf.read_architecture(model)))
    artifact.write_manifest(scores, stage="importance", recipe={}, parents={"model": model})
    write_tokens(root / "train", 23 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 6 * SEQ_LENGTH + 1, seed=1)
    training = (
        "--data.path", root / "train", "--data.valid_path", root / "valid",
        "--data.seq_length", SEQ_LENGTH, "--train.steps", 4, "--train.global_batch_size", 4,
        "--train.lr", 3e-3, "--train.adam_eps", 1e-6, "--train.valid_interval", 3,
        "--train.checkpoint_interval", 1,
    )  # fmt: skip
    search = (
        "--model", model, "--scores", scores, "--grid.num_layers", 2, 4,
        "--grid.ffn_hidden_size", 16, 48, "--grid.hidden_size", 16, "--budget.params", 2.5e4,
        "--race.entrants", 3, "--race.rungs", 2,
    )  # fmt: skip
    return root, model, scores, training, (*search, *training)


@pytest.fixture(scope="module")
def searched(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "out"
    call("search", *inputs[-1], "--out", out)
    return out


def read(out):
    return json.loads((out / "search.json").read_text())


def loss_of(model_dir, tokens):
    """Validation loss by transformers."""
    stream = torch.from_numpy(TokenStream(tokens).read(0, 6 * SEQ_LENGTH + 1))
    model = LlamaForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        logits = model(stream[:-1].view(-1, SEQ_LENGTH)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:]).item()


def test_a_search_leaves_a_record_a_table_a_plot_and_the_best_model(inputs, searched):
    root = inputs[0]
    found = read(searched)
    assert [c["name"] for c in found["candidates"]] == [
        "L4-h16-f48-n8-g2", "L4-h16-f16-n8-g2", "L2-h16-f48-n8-g2", "L2-h16-f16-n8-g2",
    ]  # fmt: skip
    assert found["source"]["loss"] == pytest.approx(loss_of(inputs[1], root / "valid"), rel=1e-5)
    steps = sorted(list(c["losses"]) for c in found["candidates"])
    assert steps == [[], ["0", "2"], ["0", "2", "3", "4"], ["0", "2", "3", "4"]]
    by_loss = sorted(found["candidates"], key=lambda c: c["pruned_loss"])
    assert by_loss[-1]["losses"] == {}
    finalists = [c for c in found["candidates"] if "4" in c["losses"]]
    dropped = next(c for c in found["candidates"] if list(c["losses"]) == ["0", "2"])
    assert all(c["losses"]["2"] <= dropped["losses"]["2"] for c in finalists)
    best = min(finalists, key=lambda c: c["losses"]["4"])
    assert found["best"] == best["name"]
    loss = loss_of(searched / "best", root / "valid")
    assert loss == pytest.approx(best["losses"]["4"], rel=1e-5)
    for directory in (searched, searched / "best"):
        artifact.verify(directory)
        manifest = artifact.read_manifest(directory)
        assert manifest["stage"] == "search"
        assert manifest["metrics"]["best"] == best["name"]
        assert manifest["parents"].keys() == {"model", "scores"}
    files = artifact.read_manifest(searched)["files"].keys()
    assert files == {"search.json", "search.md", "ranking.svg", "recipe.yaml"}
    assert not list(searched.glob("race/*/checkpoints"))


def test_the_loss_right_after_pruning_is_that_of_the_pruned_model(inputs, searched, tmp_path):
    root, model, scores, *_ = inputs
    source = hf.read_architecture(model)
    for number, candidate in enumerate(read(searched)["candidates"]):
        student = tmp_path / str(number)
        student.mkdir()
        target = hf.read_architecture(searched / "best").__class__(
            **{**vars(source), **{k: candidate[k] for k in ("num_layers", "hidden_size")}}
            | {"ffn_hidden_size": candidate["ffn_hidden_size"]}
        )
        prune_model(model, student, plan_pruning(source, target, load_scores(scores).scores()))
        expected = loss_of(student, root / "valid")
        assert candidate["pruned_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_race_is_a_distillation_without_interruption(inputs, searched, tmp_path):
    _, model, scores, training, _ = inputs
    found = read(searched)
    best = next(c for c in found["candidates"] if c["name"] == found["best"])
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size")
    flags = [x for name in sizes for x in (f"--prune.{name}", best[name])]
    call("prune", "--model", model, "--scores", scores, *flags, "--out", tmp_path / "pruned")
    call(
        "distill", "--teacher", model, "--teacher.allow_untrained",
        "--student", tmp_path / "pruned", *training,
        "--train.valid_interval", 1, "--out", tmp_path / "distilled",
    )  # fmt: skip
    records = read_metrics(tmp_path / "distilled" / "metrics.jsonl")
    losses = {str(r["step"]): r["val_loss"] for r in records if "val_loss" in r}
    assert best["losses"] == {step: losses[step] for step in best["losses"]}
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "distilled").state_dict()
    ours = LlamaForCausalLM.from_pretrained(searched / "best").state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("ranks", ["--parallel.tensor_model_parallel_size=2", "--seed=1234"])
def test_two_ranks_find_the_same(inputs, searched, tmp_path, ranks):
    """Tensor-parallel, and (a flag that changes nothing) data-parallel."""
    run_distributed(call, 2, "search", *inputs[-1], ranks, "--out", tmp_path / "out")
    ours, theirs = read(searched), read(tmp_path / "out")
    assert theirs["best"] == ours["best"]
    for one, two in zip(ours["candidates"], theirs["candidates"], strict=True):
        assert two["name"] == one["name"]
        assert two["pruned_loss"] == pytest.approx(one["pruned_loss"], rel=1e-5)
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)


@pytest.mark.parametrize("point", ["pruned", "training", "between", "writing"])
def test_a_search_that_dies_goes_on(inputs, searched, tmp_path, monkeypatch, point):
    owner, method, calls = {
        "pruned": (Trials, "pruned_loss", 2),
        "training": (Trainer, "train_step", 8),  # past a checkpoint, before a rung
        "between": (Trials, "train", 4),
        "writing": (Trials, "save", 0),
    }[point]
    original, left = getattr(owner, method), [calls]

    def dying(*args, **kwargs):
        if not left[0]:
            raise Crash
        left[0] -= 1
        return original(*args, **kwargs)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(owner, method, dying)
        with pytest.raises(Crash):
            call("search", *inputs[-1], "--out", out)
    assert not (out / "manifest.json").exists()
    done = [c for c in read(out)["candidates"] if c["pruned_loss"] is not None]
    measured = []
    monkeypatch.setattr(
        Trials,
        "pruned_loss",
        lambda self, arch, original=Trials.pruned_loss: (
            measured.append(arch) or original(self, arch)
        ),
    )
    call("search", *inputs[-1], "--out", out, "--resume")
    assert len(measured) == 4 - len(done)
    assert read(out) == read(searched)
    best = [LlamaForCausalLM.from_pretrained(d / "best").state_dict() for d in (out, searched)]
    assert all(torch.equal(best[0][name], tensor) for name, tensor in best[1].items())
    artifact.verify(out)

    call("search", *inputs[-1], "--out", out, "--resume")  # nothing is left to do
    assert len(measured) == 4 - len(done)
    assert read(out) == read(searched)


@pytest.mark.parametrize(
    ("flag", "value", "change"),
    [
        ("--race.entrants", 2, "race.entrants: 3 -> 2"),
        ("--train.lr", 0.5, "train.lr: 0.003 -> 0.5"),
    ],
)
def test_another_recipe_is_not_resumed(inputs, searched, flag, value, change):
    with pytest.raises(MinitronError) as caught:
        call("search", *inputs[-1], flag, value, "--out", searched, "--resume")
    assert str(caught.value) == (
        f"--resume would continue a run with another recipe than {searched / 'recipe.yaml'}: "
        f"{change}; take the old values or another --out"
    )


def test_models_do_not_pile_up(inputs, tmp_path, monkeypatch):
    alive = []
    original = Trials._build

    def build(self, *args, **kwargs):
        alive.append(sum(isinstance(thing, LlamaModel) for thing in gc.get_objects()))
        return original(self, *args, **kwargs)

    gc.collect()
    before = sum(isinstance(thing, LlamaModel) for thing in gc.get_objects())
    monkeypatch.setattr(Trials, "_build", build)
    call("search", *inputs[-1], "--out", tmp_path / "out")
    assert len(alive) == 4 + 3 + 2
    assert set(alive) <= {before + 1, before + 2}  # the teacher, and at most the one before


def test_shapes_can_be_listed_without_data_or_weights(inputs, tmp_path, capsys):
    model = inputs[1]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    call(
        "search", *inputs[-1], "--model", tmp_path / "model", "--scores", tmp_path / "none",
        "--data.path", tmp_path / "none", "--data.valid_path", tmp_path / "none",
        "--list_only", "--out", tmp_path / "out",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["1", "L4-h16-f48-n8-g2"]
    assert len(lines) == 2 + 4 + 2
    assert not (tmp_path / "out").exists()


def test_a_latency_budget_is_measured(inputs, tmp_path, capsys):
    call(
        "search", *inputs[-1], "--budget.latency", 60, "--deployment.context", 32,
        "--deployment.generated", 8, "--list_only", "--out", tmp_path / "out",
    )  # fmt: skip
    assert "latency, s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--data.valid_path",),
            "shapes are compared by validation loss; give --data.valid_path",
        ),
        (
            ("--race.rungs", 4),
            "race.rungs=[4] must lie before the last step, train.steps=4",
        ),
        (
            ("--parallel.pipeline_model_parallel_size", 2, "--parallel.layers_per_stage", "1,3"),
            "parallel.layers_per_stage=[1, 3] suits one depth only; leave it out, and the layers "
            "of every shape are spread evenly",
        ),
        (
            ("--distill.intermediate.states", "embedding"),
            "distill.intermediate.states=['embedding'] pairs layers, which differ from shape to "
            "shape; race on the logits alone",
        ),
        (("--budget.params", 1e3), "none of the grid's 4 shapes fits budget.params=[1000.0]"),
    ],
)
def test_mistakes(inputs, tmp_path, flags, message):
    arguments = list(inputs[-1])
    if flags[0] in arguments:
        place = arguments.index(flags[0])
        del arguments[place : place + 2]
    arguments += flags if flags[1:] else ()
    with pytest.raises(MinitronError) as caught:
        call("search", *arguments, "--out", tmp_path / "out")
    assert str(caught.value).startswith(message)


def test_scores_of_another_model(inputs, tmp_path):
    save_llama(tmp_path / "other", vocab_size=VOCAB, seed=1)
    with pytest.raises(MinitronError, match="scores belong to another model"):
        call("search", *inputs[-1], "--model", tmp_path / "other", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
