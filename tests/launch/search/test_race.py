"""launch/search.py: the race is a distillation, whatever the ranks."""

import gc

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from minitron import artifact
from minitron.data.indexed import TokenStream
from minitron.metrics import read_metrics
from minitron.model import hf
from minitron.model.llama import LlamaModel
from minitron.platform import release_memory
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.scores import load_scores
from minitron.search.trials import Trials
from minitron.train.loop import Trainer
from tests.harness import run_distributed
from tests.launch.search.searching import AT_RUNGS, agree, call, read
from tests.runs import SEQ_LENGTH, load_tensors


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
    assert files == {"search.json", "search.md", "ranking.svg", "recipe.yaml", "inputs.json"}
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_race_is_a_distillation_without_interruption(inputs, searched, tmp_path, ranks):
    """In fp32 on one rank, in bf16 on two pipeline stages."""
    _, model, scores, training, arguments = inputs
    options = ()
    if ranks == 2:
        options = ("--precision", "bf16", "--parallel.pipeline_model_parallel_size", 2)
        searched = tmp_path / "searched"
        run_distributed(call, 2, "search", *arguments, *options, *AT_RUNGS, "--out", searched)
    found = read(searched)
    best = next(c for c in found["candidates"] if c["name"] == found["best"])
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size")
    flags = [x for name in sizes for x in (f"--prune.{name}", best[name])]
    call("prune", "--model", model, "--scores", scores, *flags, "--out", tmp_path / "pruned")
    distill = (
        "distill", "--teacher", model, "--teacher.allow_untrained",
        "--student", tmp_path / "pruned", *training, *options,
        "--train.valid_interval", 1, "--out", tmp_path / "distilled",
    )  # fmt: skip
    if ranks == 1:
        call(*distill)
    else:
        run_distributed(call, ranks, *distill)
    records = read_metrics(tmp_path / "distilled" / "metrics.jsonl")
    losses = {str(r["step"]): r["val_loss"] for r in records if "val_loss" in r}
    assert best["losses"] == {step: losses[step] for step in best["losses"]}
    ours, theirs = (load_tensors(d) for d in (searched / "best", tmp_path / "distilled"))
    assert ours.keys() == theirs.keys()
    assert {tensor.dtype for tensor in ours.values()} == {
        (torch.float32, torch.bfloat16)[ranks - 1]
    }
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("ranks", ["--parallel.tensor_model_parallel_size=2", "--seed=1234"])
def test_two_ranks_find_the_same(inputs, searched, tmp_path, ranks):
    """Tensor-parallel, and (a flag that changes nothing) data-parallel."""
    arguments = (*inputs[-1], *AT_RUNGS, ranks, "--out", tmp_path / "out")
    run_distributed(call, 2, "search", *arguments)
    ours, theirs = read(searched), read(tmp_path / "out")
    assert theirs["best"] == ours["best"]
    for one, two in zip(ours["candidates"], theirs["candidates"], strict=True):
        agree(two, one, one["losses"])


def test_interleaved_stages_race_the_depths_that_they_can_share(inputs, searched, tmp_path):
    stages = (
        "--parallel.pipeline_model_parallel_size=2",
        "--parallel.virtual_pipeline_model_parallel_size=2",
    )
    arguments = (*inputs[-1], *AT_RUNGS, *stages, "--out", tmp_path / "out")
    run_distributed(call, 2, "search", *arguments)
    expected = {c["name"]: c for c in read(searched)["candidates"] if c["num_layers"] == 4}
    found = read(tmp_path / "out")["candidates"]
    assert {c["name"] for c in found} == expected.keys()  # two layers are too few for four chunks
    compared = 0
    for candidate in found:
        reference = expected[candidate["name"]]
        steps = candidate["losses"].keys() & reference["losses"].keys()
        agree(candidate, reference, steps)
        compared += len(steps)
    assert compared >= 2


def _poisoned(name, *arguments):
    """A search in which a weight of one shape is no number after two steps, on one rank."""
    original = Trainer.train_step

    def train_step(self):
        if self.step == 2 and self.out.name == name and not dist.get_rank():
            with torch.no_grad():
                next(self.model[0].decoder.layers[0].parameters()).fill_(torch.nan)
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        call("search", *arguments)
        call("search", *arguments, "--resume")


def test_a_shape_that_diverges_drops_out(inputs, searched, tmp_path):
    undisturbed = read(searched)
    best, out = undisturbed["best"], tmp_path / "out"
    stages = "--parallel.pipeline_model_parallel_size=2"
    run_distributed(_poisoned, 2, best, *inputs[-1], *AT_RUNGS, stages, "--out", out)
    found = {candidate["name"]: candidate for candidate in read(out)["candidates"]}
    assert found[best]["diverged"] == 4
    assert found[best]["losses"].keys() == {"0", "2"}
    (other,) = (c for c in undisturbed["candidates"] if "4" in c["losses"] and c["name"] != best)
    assert read(out)["best"] == other["name"]
    agree(found[other["name"]], other, other["losses"])
    lines = (out / "search.md").read_text().splitlines()
    assert lines[5].startswith(f"| 4 | {best} |")
    assert lines[5].endswith("| diverged |")
    artifact.verify(out)


def test_models_do_not_pile_up(inputs, tmp_path, monkeypatch):
    alive = []
    original = Trials._build

    def build(self, *args, **kwargs):
        alive.append(sum(isinstance(thing, LlamaModel) for thing in gc.get_objects()))
        return original(self, *args, **kwargs)

    release_memory()
    before = sum(isinstance(thing, LlamaModel) for thing in gc.get_objects())
    monkeypatch.setattr(Trials, "_build", build)
    call("search", *inputs[-1], "--out", tmp_path / "out")
    assert len(alive) == 4 + 3 + 2
    assert set(alive) == {before + 1}  # the teacher
