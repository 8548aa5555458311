"""Plots: what is drawn, how much of it, and that it fits into a page."""

import re
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from minitron.errors import MinitronError
from minitron.report import plots
from minitron.report.runs import read_runs
from tests.report.run_dirs import score_directory, training_run

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg):
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")
    ]


def num_points(svg):
    """Most points of any path."""
    paths = (element.get("d", "") for element in ElementTree.fromstring(svg).iter(f"{SVG}path"))
    return max(len(re.findall("[ML]", path)) for path in paths)


def test_short_curves_are_drawn_point_by_point():
    curve = {"step": np.arange(5.0), "loss": np.array([5.0, 4.0, np.nan, 2.0, 1.0])}
    line = plots.thin(curve, "step", "loss")
    assert line.x.tolist() == [0, 1, 3, 4]  # what is not a number is left out
    assert line.y.tolist() == line.low.tolist() == line.high.tolist() == [5, 4, 2, 1]


def test_long_curves_are_averaged_and_keep_their_range():
    losses = np.random.default_rng(0).random(50_000)
    line = plots.thin({"step": np.arange(50_000.0), "loss": losses}, "step", "loss")
    pieces = losses.reshape(400, 125)
    np.testing.assert_allclose(line.y, pieces.mean(axis=1))
    np.testing.assert_array_equal(line.low, pieces.min(axis=1))
    np.testing.assert_array_equal(line.high, pieces.max(axis=1))
    np.testing.assert_allclose(line.x, np.arange(400) * 125 + 62)


def test_a_curve_without_numbers_is_no_line():
    assert plots.thin({"step": np.arange(2.0), "loss": np.full(2, np.nan)}, "step", "loss") is None


def test_retained_share_of_importance():
    line = plots.retained(np.array([[1.0, 4.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]]))
    assert line.x.tolist() == [0, 25, 50, 75, 100]
    np.testing.assert_allclose(line.y, [0, (40 + 25) / 2, (70 + 50) / 2, (90 + 75) / 2, 100])


def test_validation_figure_names_every_run_and_describes_itself(tmp_path):
    runs = read_runs(
        [training_run(tmp_path / "a", [5.0, 3.0]), training_run(tmp_path / "b", [4.0, 3.5])]
    )
    svg = plots.validation_figure(runs, ["a [1]", "b [2]"])
    assert {"a [1]", "b [2]", "training tokens"} <= set(texts(svg))
    label = ElementTree.fromstring(svg).get("aria-label")
    assert "a [1]: from 5.000 at 0 to 3.000 at 10" in label


def test_nothing_to_draw_is_no_figure(tmp_path):
    (run,) = read_runs([training_run(tmp_path / "run", [None, None])])
    assert plots.validation_figure([run], ["run"]) is None
    assert plots.training_figure(run, 0) is None
    assert plots.validation_figure([], []) is None


def test_training_figure_shows_kl_beside_another_loss(tmp_path):
    (run,) = read_runs([training_run(tmp_path / "run", [5.0, 3.0, 2.0], kl=1.0)])
    assert "loss, kl (nats per token)" in texts(plots.training_figure(run, 0))


def test_training_figure_shows_a_loss_that_is_the_kl_once(tmp_path):
    (run,) = read_runs([training_run(tmp_path / "run", [5.0, 3.0, 3.0], kl=3.0)])
    assert "kl (nats per token)" in texts(plots.training_figure(run, 0))


@pytest.mark.parametrize("steps", [1, 5, 50_000])
def test_figures_of_any_length_stay_small(tmp_path, steps):
    (run,) = read_runs([training_run(tmp_path / "run", [5.0, *np.linspace(4, 2, steps)])])
    svg = plots.training_figure(run, 0)
    assert num_points(svg) <= 1000
    assert len(svg) < 100_000


@pytest.mark.parametrize("layers", [1, 3])
def test_scores_figure_counts_layers_from_one(tmp_path, layers):
    (run,) = read_runs([score_directory(tmp_path / "scores", layers=layers)])
    svg = plots.scores_figure(run)
    assert {"Block influence", "Embedding channels", "MLP neurons"} <= set(texts(svg))
    label = ElementTree.fromstring(svg).get("aria-label")
    assert f"lowest in layer {layers} " in label  # the fixture's influence falls with depth
    assert "highest in layer 1 " in label


def test_colors_are_the_page_s_and_ids_are_the_figure_s_own(tmp_path):
    runs = read_runs([training_run(tmp_path / name, [5.0, 3.0]) for name in "ab"])
    figures = [plots.training_figure(run, index) for index, run in enumerate(runs)]
    ids = [re.findall(r' id="([^"]+)"', figure) for figure in figures]
    assert not set(ids[0]) & set(ids[1])
    for figure, own in zip(figures, ids, strict=True):
        assert len(set(own)) == len(own)
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', figure)) <= set(own)
        assert "var(--series-" in figure
        assert not re.findall(r"(?:fill|stroke|color): *#", figure)


def test_many_runs_still_look_different(tmp_path):
    runs = read_runs([training_run(tmp_path / f"run{i}", [5.0, 3.0]) for i in range(10)])
    svg = plots.validation_figure(runs, [run.name for run in runs])
    lines = re.findall(r'style="fill: none; (stroke(?:-dasharray)?: [^"]*var\(--series[^"]*)"', svg)
    assert len(set(lines)) == 10


def test_the_same_run_gives_the_same_bytes(tmp_path):
    (run,) = read_runs([score_directory(tmp_path / "scores")])
    assert plots.scores_figure(run) == plots.scores_figure(run)


def test_missing_matplotlib_is_one_line_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MinitronError, match=r"needs matplotlib.*run: pip install matplotlib"):
        plots.require_matplotlib()
