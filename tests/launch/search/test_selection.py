"""launch/search.py chooses what stays as launch/prune.py does, and says how to repeat it."""

import json
import shlex

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron import artifact
from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.prune.depth import Ablation, DepthScores, save_depth
from tests.launch.search.searching import call, read
from tests.prune.scored import random_importance, save_random
from tests.runs import SEQ_LENGTH


def searching(inputs, *sizes):
    """A search that trains one shape of a grid for a step, without scores."""
    _, model, _, training, _ = inputs
    return (
        "search", "--model", model, "--model.allow_untrained", *training, "--train.steps", 1,
        "--race.rungs", "[]", "--race.entrants", 1, "--grid.hidden_size", 16,
        "--grid.ffn_hidden_size", 16, *sizes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tried(inputs, tmp_path_factory):
    """The model's scores with trials of windows of two layers beside them."""
    model, scores = inputs[1], tmp_path_factory.mktemp("tried") / "scores"
    scores.mkdir()
    importance = random_importance(hf.read_architecture(model))
    importance.block_influence[:] = torch.arange(4.0)  # of which 1 and 2 would go
    save_random(scores, model, importance)
    windows = [
        Ablation(drop_layers=[first, first + 1], lm_loss=loss, logit_distance=0.5)
        for first, loss in ((1, 6.0), (2, 5.0), (3, 7.0))
    ]
    depth = DepthScores(samples=4, lm_loss=4.0, layers=[], windows=windows, greedy=[])
    save_depth(scores, depth)
    artifact.write_manifest(scores, stage="importance", recipe={}, parents={"model": model})
    return scores


def repeat(printed, out):
    """Run the prune.py command that a search has printed."""
    (line,) = [line for line in printed.splitlines() if "launch/prune.py" in line]
    python, script, *flags = shlex.split(line)
    assert (python, script, flags[-2:]) == ("python", "launch/prune.py", ["--out", "DIR"])
    call("prune", *flags[:-1], out, "--check.samples", 0)
    return flags


def loss_of(directory, root):
    stream = torch.from_numpy(TokenStream(root / "valid").read(0, 6 * SEQ_LENGTH + 1))
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(directory)(
            stream[:-1].view(-1, SEQ_LENGTH)
        ).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1:]).item()


def test_every_way_to_choose_is_searched_with_and_repeated(inputs, tried, tmp_path, capsys):
    call(
        *searching(inputs, "--grid.num_layers", "2,3"), "--scores", tried,
        "--grid.num_query_groups", 1, "--grid.num_attention_heads", 4, "--out", tmp_path / "out",
        "--prune.layer_ranking", "window", "--prune.head_ranking", "across",
        "--prune.group_reduction", "mean", "--prune.merge_heads", "minus",
        "--prune.batch_aggregation", "var",
    )  # fmt: skip
    captured = capsys.readouterr()
    (found,) = read(tmp_path / "out")["candidates"]  # windows of one layer were not tried
    assert found["name"] == "L2-h16-f16-n4-g1"
    flags = repeat(captured.out, tmp_path / "pruned")
    assert {"window", "across", "mean", "minus", "var"} <= {*flags}
    assert json.loads((tmp_path / "pruned/pruning.json").read_text())["layers"] == [0, 3]
    assert found["pruned_loss"] == pytest.approx(loss_of(tmp_path / "pruned", inputs[0]), rel=1e-5)


@pytest.mark.parametrize("method", ["first", "random"])
def test_a_method_that_needs_no_scores(inputs, tmp_path, capsys, method):
    method = ("--prune.method", method, "--seed", 9)
    call(*searching(inputs, "--grid.num_layers", 2), *method, "--out", tmp_path / "out")
    flags = repeat(capsys.readouterr().out, tmp_path / "pruned")
    assert "--scores" not in flags
    (found,) = read(tmp_path / "out")["candidates"]
    assert found["pruned_loss"] == pytest.approx(loss_of(tmp_path / "pruned", inputs[0]), rel=1e-5)
    assert artifact.read_manifest(tmp_path / "out")["parents"].keys() == {"model"}


def test_what_ranking_needs(inputs, tried, tmp_path):
    out, three_layers = ("--out", tmp_path / "out"), searching(inputs, "--grid.num_layers", 3)
    window = ("--prune.layer_ranking", "window")
    for flags, message in {
        (*window, "--scores", inputs[2]): "depth.json does not exist; run launch/importance.py wi",
        (*window, "--scores", tried): "prune.layer_ranking=window needs trials that these scores d",
        window[:0]: "pruning needs importance scores; give --scores.path, a directory that "
        "launch/importance.py wrote, or another prune.method",
    }.items():
        with pytest.raises(MinitronError) as caught:
            call(*three_layers, *flags, *out)
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
