"""What launch/search.py lists, and what it refuses."""

import pytest

from minitron.errors import MinitronError
from tests.launch.search.searching import call
from tests.runs import VOCAB
from tests.tiny import save_llama


def test_shapes_can_be_listed_without_data_or_weights(inputs, tmp_path, capsys):
    _, model, _, training, arguments = inputs
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model / "config.json").read_bytes())
    call(
        "search", *arguments[: -len(training)], "--model", tmp_path / "model",
        "--scores", tmp_path / "none", "--list_only", "--out", tmp_path / "out",
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
        (("--budget.params", 1e3), "no shape of the grid, out of 4, fits budget.params=[1000]"),
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
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (),
            "the grid has no sizes to search; give at least one of grid.preset, grid.num_layers, ",
        ),
        (
            ("--grid.num_layers", 2),
            "a race needs data; give --data.path and --data.valid_path, or ",
        ),
    ],
)
def test_what_a_race_needs(inputs, tmp_path, flags, message):
    _, model, scores, *_ = inputs
    with pytest.raises(MinitronError) as caught:
        call("search", "--model", model, "--scores", scores, *flags, "--out", tmp_path / "out")
    assert str(caught.value).startswith(message)


def test_a_model_that_knows_nothing(inputs, tmp_path):
    arguments = [x for x in inputs[-1] if x != "--model.allow_untrained"]
    with pytest.raises(MinitronError) as caught:
        call("search", *arguments, "--out", tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("the teacher predicts the data no better than chance: its loss is ")
    assert message.endswith("for this data, or add --model.allow_untrained")


def test_scores_of_another_model(inputs, tmp_path):
    save_llama(tmp_path / "other", vocab_size=VOCAB, seed=1)
    with pytest.raises(MinitronError, match="scores belong to another model"):
        call("search", *inputs[-1], "--model", tmp_path / "other", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
