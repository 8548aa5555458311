"""launch/prune.py as a user calls it."""

import importlib.util
import json
import sys

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from minitron import artifact, config
from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.llama import LlamaModel
from minitron.prune.depth import Ablation, DepthScores, save_depth
from tests.launch.launcher import LAUNCH, launch
from tests.prune.scored import random_importance, save_random
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import logits, save_llama

SCRIPT = LAUNCH / "prune.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module, to save the seconds that a process takes to start."""
    spec = importlib.util.spec_from_file_location("launch_prune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["launch_prune"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prune(script):
    def run(*arguments):
        script.main(config.parse(script.Recipe, list(map(str, arguments))))

    yield run
    if dist.is_initialized():
        dist.destroy_process_group()  # of no use to other tests in this process


@pytest.fixture
def model(tmp_path):
    save_llama(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def scores(tmp_path, model):
    directory = tmp_path / "scores"
    directory.mkdir()
    save_random(directory, model)
    artifact.write_manifest(directory, stage="importance", recipe={}, parents={"model": model})
    return directory


def test_width_from_a_score_directory(tmp_path, model, scores, forked):
    out = tmp_path / "out"
    sizes = ("--prune.hidden_size", 16, "--prune.ffn_hidden_size", 24)
    result = forked(
        "prune", "--model", model, "--scores", scores, *sizes, "--out", out, cwd=tmp_path
    )
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[3].split() == ["hidden", "size", "32", "16", "50.0%"]
    assert lines[-1] == f"wrote {out}"
    arch = hf.read_architecture(out)
    assert (arch.hidden_size, arch.ffn_hidden_size, arch.kv_channels) == (16, 24, 4)
    manifest = artifact.read_manifest(out)
    assert manifest["stage"] == "prune"
    assert manifest["parents"]["model"]["fingerprint"] == artifact.fingerprint(model)
    assert manifest["parents"]["scores"]["fingerprint"] == artifact.fingerprint(scores)
    assert manifest["metrics"]["num_parameters"] == arch.num_parameters
    assert manifest["recipe"]["prune"]["hidden_size"] == 16
    assert {"config.json", "model.safetensors", "pruning.json"} <= manifest["files"].keys()
    artifact.verify(out)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_named_layers_under_torchrun_need_neither_scores_nor_data(tmp_path, model):
    out = tmp_path / "out"
    layers = ("--prune.drop_layers", 2, "--prune.drop_layers", 3)
    result = launch("prune", "--model", model, *layers, "--out", out, cwd=tmp_path, ranks=2)
    assert result.out.count("wrote") == 1
    assert result.out.count("dropped layers 2, 3 (counted from 1)\n") == 1
    assert result.out.count("loss not checked: give --data.path\n") == 1
    assert json.loads((out / "pruning.json").read_text())["layers"] == [0, 3]
    assert hf.read_architecture(out).num_layers == 2


def test_mistakes_are_one_line(model, tmp_path, forked):
    arguments = ("--model", model, "--prune.hiden_size", 16, "--out", tmp_path / "out")
    result = forked("prune", *arguments, cwd=tmp_path)
    assert result.status == 2
    assert "did you mean prune.hidden_size?" in result.err
    assert len(result.err.splitlines()) == 1


def test_help_explains_every_key(prune, capsys):
    with pytest.raises(SystemExit) as caught:
        prune("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key, words in {
        "--model.path": "Its Hugging Face directory",
        "--scores.path": "Directory that launch/importance.py wrote",
        "--prune.hidden_size": "Embedding channels to keep",
        "--prune.ffn_hidden_size": "Neurons to keep",
        "--prune.num_attention_heads": "Query heads to keep",
        "--prune.num_layers": "Layers to keep",
        "--prune.drop_layers": "counted from 1",
        "--out": "Directory of the pruned model",
    }.items():
        assert key in text
        assert words in text


def test_measured_scores_are_used(tmp_path, model, script, prune, monkeypatch):
    """Without scores.path the launcher measures, with the recipe's sections."""
    measured = random_importance(hf.read_architecture(model), seed=5)
    calls = []

    def measure_importance(model_path, *, data, importance, parallel, precision):
        calls.append((model_path, data.path, importance.samples, precision))
        return measured, None

    monkeypatch.setattr(script, "measure_importance", measure_importance)
    (tmp_path / "text.txt").write_text("some text")
    sizes = ("--model", model, "--prune.ffn_hidden_size", 8)
    data = ("--data.path", tmp_path / "text.txt", "--importance.samples", 3, "--precision", "bf16")
    data += ("--check.samples", 0)
    prune(*sizes, *data, "--out", tmp_path / "measured")
    assert calls == [(model, [str(tmp_path / "text.txt")], 3, "bf16")]
    assert artifact.read_manifest(tmp_path / "measured")["parents"].keys() == {"model"}

    (tmp_path / "scores").mkdir()
    save_random(tmp_path / "scores", model, measured)
    prune(*sizes, "--scores", tmp_path / "scores", *data, "--out", tmp_path / "stored")
    assert len(calls) == 1
    models = [LlamaForCausalLM.from_pretrained(tmp_path / d) for d in ("measured", "stored")]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_losses_are_those_of_the_written_model_of_the_source_and_of_chance(tmp_path, forked):
    """On a pipeline of two ranks, which also share the slicing; against transformers."""
    source = save_llama(tmp_path / "model", vocab_size=VOCAB)
    prefix = write_tokens(tmp_path / "tokens", 5 * SEQ_LENGTH + 1)
    arguments = ("--model", tmp_path / "model", "--data.path", prefix, "--check.samples", 4)
    arguments += ("--data.seq_length", SEQ_LENGTH, "--parallel.pipeline_model_parallel_size", 2)
    arguments += ("--prune.ffn_hidden_size", 24, "--prune.num_layers", 3)
    result = forked("prune", *arguments, "--out", tmp_path / "out", cwd=tmp_path, ranks=2)
    assert result.status == 0, result.err
    losses = artifact.read_manifest(tmp_path / "out")["metrics"]["lm_loss"]
    student = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    for name, model in (("source", source), ("student", student)):
        stream = torch.from_numpy(TokenStream(prefix).read(0, 4 * SEQ_LENGTH + 1))
        inputs, labels = stream[:-1].view(-1, SEQ_LENGTH), stream[1:]
        with torch.no_grad():
            expected = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels)
        assert losses[name] == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(losses.values())) == 3
    rows = [line.split() for line in result.out.splitlines()[-4:-1]]
    assert [row[-1] for row in rows] == [f"{loss:.4f}" for loss in losses.values()]


def test_a_student_pruned_at_random_is_compared_with_another(tmp_path, model, prune):
    save_llama(model, vocab_size=VOCAB)
    prefix = write_tokens(tmp_path / "tokens", 4 * SEQ_LENGTH + 1)
    data = ("--data.path", prefix, "--data.seq_length", SEQ_LENGTH, "--check.samples", 2)
    sizes = ("--prune.method", "random", "--prune.ffn_hidden_size", 24, "--seed", 3)
    prune("--model", model, *sizes, *data, "--out", tmp_path / "out")
    losses = artifact.read_manifest(tmp_path / "out")["metrics"]["lm_loss"]
    assert losses["student"] != losses["random"]


def test_the_scores_know_the_data_of_the_check(tmp_path, scores, model, prune, capsys):
    """As long as it is there."""
    save_llama(model, vocab_size=VOCAB)
    save_random(scores, model)
    prefix = write_tokens(tmp_path / "tokens", 5 * SEQ_LENGTH + 1)
    data = {"path": [str(prefix)], "seq_length": SEQ_LENGTH, "workers": 3}
    parents = {"model": model}
    artifact.write_manifest(scores, stage="importance", recipe={"data": data}, parents=parents)
    arguments = ("--model", model, "--scores", scores, "--prune.num_layers", 3)
    check = ("--check.samples", 4, "--out", tmp_path / "out", "--overwrite")
    prune(*arguments, *check)
    metrics = artifact.read_manifest(tmp_path / "out")["metrics"]
    losses = metrics["lm_loss"]
    checked = {"path": [str(prefix)], "seq_length": SEQ_LENGTH, "samples": 4}
    assert metrics["lm_loss_data"] == checked
    student = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    stream = torch.from_numpy(TokenStream(prefix).read(0, 4 * SEQ_LENGTH + 1))
    with torch.no_grad():
        found = student(stream[:-1].view(-1, SEQ_LENGTH)).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(found, stream[1:])
    assert losses["student"] == pytest.approx(expected.item(), rel=1e-5)
    assert "loss not checked" not in capsys.readouterr().out

    for file in tmp_path.glob("tokens.*"):
        file.unlink()
    with pytest.raises(MinitronError, match=r"check.samples=4 .* needs data, .* give --data.path"):
        prune(*arguments, *check)
    prune(*arguments, "--out", tmp_path / "blind")
    assert "loss not checked: give --data.path\n" in capsys.readouterr().out
    assert "lm_loss" not in artifact.read_manifest(tmp_path / "blind")["metrics"]


def test_a_student_that_is_not_finite_is_refused_without_data(tmp_path, model, prune):
    """Weights that are finite one by one."""
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    arguments = ("--model", model, "--prune.drop_layers", 2, "--out", tmp_path / "out")
    with pytest.raises(MinitronError, match=r"loss on random tokens is (nan|inf)"):
        prune(*arguments)
    assert not (tmp_path / "out").exists()
    prune(*arguments, "--check.samples", 0)


def test_merging_where_no_head_goes_is_said_to_have_no_effect(tmp_path, model, prune, capsys):
    arguments = ("--model", model, "--prune.method", "first", "--prune.ffn_hidden_size", 24)
    prune(*arguments, "--prune.merge_heads", "plus", "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "prune.merge_heads=plus has no effect: all 8 query heads stay\n" in out
    assert "dropped" not in out


def test_ranks_write_the_same_files(tmp_path, model, scores, forked):
    sizes = ("--prune.hidden_size", 16, "--prune.num_query_groups", 1, "--prune.num_layers", 2)
    files = []
    for ranks in (1, 3):
        out = tmp_path / str(ranks)
        arguments = ("--model", model, "--scores", scores, *sizes, "--out", out)
        result = forked("prune", *arguments, cwd=tmp_path, ranks=ranks)
        assert result.status == 0, result.err
        files.append(artifact.read_manifest(out)["files"])
    assert files[0] == files[1]


def test_pruning_again_from_stored_scores_gives_the_same_bytes(
    tmp_path, model, scores, prune, monkeypatch
):
    def no_model(*_, **__):
        raise AssertionError("stored scores need no forward pass")

    monkeypatch.setattr(LlamaModel, "__init__", no_model)
    sizes = ("--prune.ffn_hidden_size", 24, "--prune.num_attention_heads", 4)
    for out in ("first", "second"):
        arguments = ("--model", model, "--scores", scores, *sizes, "--check.samples", 0)
        prune(*arguments, "--out", tmp_path / out)
    first, second = (artifact.read_manifest(tmp_path / o)["files"] for o in ("first", "second"))
    assert first == second


@pytest.mark.parametrize("method", ["magnitude", "random", "first"])
def test_methods_without_activations_need_no_data(tmp_path, model, prune, method, capsys):
    sizes = ("--prune.ffn_hidden_size", 20, "--prune.num_layers", 3, "--prune.multiple", 8)
    prune("--model", model, "--prune.method", method, *sizes, "--out", tmp_path / "out")
    assert "ffn_hidden_size: 20 -> 24, a multiple of 8 = 8 x 1 ranks" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (record["ffn"] == [list(range(24))] * 3) == (method == "first")
    assert (record["layers"] == [0, 1, 2]) or method != "first"


def test_pruning_without_scores_or_data(tmp_path, model, prune):
    with pytest.raises(MinitronError, match=r"give --scores.path .* or --data.path to measure"):
        prune("--model", model, "--prune.num_layers", 2, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--parallel.tensor_model_parallel_size", 2),
            "ffn_hidden_size=41 is not divisible by par",
        ),
        (("--data.path", "none", "--data.seq_length", 65), "data.seq_length=65 "),
    ],
)
def test_what_the_check_could_not_run_is_not_sliced(
    tmp_path, model, script, prune, monkeypatch, flags, message
):
    monkeypatch.setattr(script, "prune_model", None)
    arguments = ("--model", model, "--prune.ffn_hidden_size", 41, "--prune.method", "first")
    with pytest.raises(MinitronError, match=f"^{message}"):
        prune(*arguments, *flags, "--out", tmp_path / "out")


def test_scores_of_another_model(tmp_path, scores, prune):
    save_llama(tmp_path / "other", seed=1)
    arguments = ("--model", tmp_path / "other", "--prune.num_layers", 2, "--out", tmp_path / "out")
    with pytest.raises(MinitronError, match="scores belong to another model"):
        prune(*arguments, "--scores", scores)


def test_damaged_scores(tmp_path, model, scores, prune):
    content = bytearray((scores / "scores.safetensors").read_bytes())
    content[-2] ^= 1
    (scores / "scores.safetensors").write_bytes(content)
    arguments = ("--model", model, "--prune.num_layers", 2, "--out", tmp_path / "out")
    with pytest.raises(MinitronError, match=r"scores.safetensors does not match its SHA-256"):
        prune(*arguments, "--scores", scores)


def test_altered_trials(tmp_path, model, scores, prune):
    """Where they alone are read: no width changes."""
    taken = [Ablation(drop_layers=[layer], lm_loss=1.0, logit_distance=0.1) for layer in (2, 3)]
    depth = DepthScores(samples=4, lm_loss=4.0, layers=taken, windows=[], greedy=[])
    save_depth(scores, depth)
    artifact.write_manifest(scores, stage="importance", recipe={}, parents={"model": model})
    path = scores / "depth.json"
    path.write_text(path.read_text().replace("1.0", "9.0", 1))
    arguments = ("--model", model, "--scores", scores, "--out", tmp_path / "out")
    with pytest.raises(MinitronError, match=r"depth.json does not match its SHA-256"):
        prune(*arguments, "--prune.num_layers", 3, "--prune.layer_ranking", "lm_loss")
    assert not (tmp_path / "out").exists()


def test_an_existing_directory_is_kept_unless_overwrite_is_given(tmp_path, model, prune):
    arguments = ("--model", model, "--out", tmp_path / "out", "--prune.drop_layers")
    prune(*arguments, 1)
    with pytest.raises(MinitronError, match=r"is not empty .*--overwrite"):
        prune(*arguments, 2)
    assert artifact.read_manifest(tmp_path / "out")["recipe"]["prune"]["drop_layers"] == [1]
    prune(*arguments, 2, "--overwrite")
    assert artifact.read_manifest(tmp_path / "out")["recipe"]["prune"]["drop_layers"] == [2]


def test_a_failure_leaves_nothing_behind(tmp_path, model, prune):
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-4:] = b"\xff\xff\xff\xff"  # NaN
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(MinitronError, match="NaN"):
        prune("--model", model, "--prune.drop_layers", 1, "--out", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
