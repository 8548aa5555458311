"""What is shown of the trials: the same numbers on the terminal, in depth.md and in depth.svg."""

import logging
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from minitron.prune.depth import Ablation, DepthScores
from minitron.prune.depth_plot import _draw, plot_depth
from minitron.prune.depth_table import depth_table, save_depth_table

INFLUENCE = torch.tensor([0.4, 0.1, 0.2, 0.3])


def trials(*removals, accuracy):
    """Every number of every trial is another one."""
    return [
        Ablation(
            drop_layers=list(layers),
            lm_loss=2.5 + i / 8 + len(layers),
            logit_distance=1.0 / (1 + i + 8 * len(layers)),
            accuracy=0.1 * len(layers) + 0.05 * (i % 2) if accuracy else None,
        )
        for i, layers in enumerate(removals)
    ]


def scores(*, accuracy, **changes):
    values = {
        "layers": trials([1], [2], [3], [4], accuracy=accuracy),
        "windows": trials([1, 2], [2, 3], [3, 4], [1, 2, 3], [2, 3, 4], accuracy=accuracy),
        "greedy": trials([3], [3, 1], accuracy=accuracy),
        "criterion": "logit_distance",
    }
    whole = 0.75 if accuracy else None
    return DepthScores(samples=9, lm_loss=2.0, accuracy=whole, **values | changes)


def cells(text):
    """Tables of any form as lists of cells."""
    rows = [line.replace("|", "  ").strip().split("  ") for line in text.splitlines()]
    return [[cell.strip() for cell in row if cell.strip()] for row in rows]


@pytest.mark.parametrize("accuracy", [False, True])
def test_every_number_is_in_the_table(tmp_path, accuracy):
    depth = scores(accuracy=accuracy)
    save_depth_table(tmp_path, INFLUENCE, depth)
    saved = cells((tmp_path / "depth.md").read_text())
    shown = cells(depth_table(INFLUENCE, depth))

    def row(*first, trial):
        loss, distance = trial.lm_loss, trial.logit_distance
        numbers = [loss, loss - 2, distance, *([trial.accuracy] if accuracy else [])]
        return [*first, *(f"{x:.4f}" for x in numbers)]

    for i, trial in enumerate(depth.layers):
        expected = row(str(i + 1), f"{INFLUENCE[i]:.4f}", trial=trial)
        assert expected in saved
        assert expected in shown
    for trial in depth.windows:
        expected = row(f"{trial.drop_layers[0]}-{trial.drop_layers[-1]}", trial=trial)
        assert expected in saved
        assert expected not in shown
    for i, trial in enumerate(depth.greedy):
        expected = row(str(i + 1), str(trial.drop_layers[-1]), trial=trial)
        assert expected in saved
        assert expected in shown
    best = {"1-2": "lm_loss", "3-4": "logit_distance"}
    if accuracy:  # odd ones are best by it
        best = {"1-2": "lm_loss", "2-3": "accuracy", "3-4": "logit_distance"}
    for text in (saved, shown):
        found = [(line[0], line[1]) for line in text if line and "-" in line[0] and len(line) > 1]
        assert [pair for pair in found if pair[0] in best][: len(best)] == list(best.items())
        assert any(line[:2] == ["greedy by logit_distance", "takes layer"] for line in text)
    assert "whole model's loss is 2.0000" in depth_table(INFLUENCE, depth)


def test_criteria_that_agree_share_a_line():
    depth = scores(accuracy=False)
    losses = sorted(depth.windows[:3], key=lambda trial: trial.logit_distance)
    windows = [
        Ablation(drop_layers=t.drop_layers, lm_loss=2.0 + i, logit_distance=t.logit_distance)
        for i, t in enumerate(losses)
    ]
    shown = depth_table(INFLUENCE, scores(accuracy=False, windows=windows))
    (line,) = [line for line in shown.splitlines() if line.startswith("3-4")]
    assert "lm_loss, logit_distance" in line
    assert not any(line.startswith(("1-2", "2-3")) for line in shown.splitlines())


def test_block_influence_alone(tmp_path):
    save_depth_table(tmp_path, INFLUENCE, None)
    rows = [[str(i), f"{x:.4f}"] for i, x in enumerate(INFLUENCE.tolist(), start=1)]
    assert cells((tmp_path / "depth.md").read_text())[2:] == rows
    assert cells(depth_table(INFLUENCE, None))[2:] == rows


def test_the_plot_shows_every_number():
    depth = scores(accuracy=True)
    figure = _draw(INFLUENCE, depth)
    left, right = figure.axes[::2], figure.axes[1::2]
    bars = left[0].patches
    assert [bar.get_height() for bar in bars] == INFLUENCE.tolist()
    assert [round(bar.get_x() + bar.get_width() / 2, 6) for bar in bars] == [1, 2, 3, 4]
    assert list(right[0].lines[0].get_ydata()) == [3, 1]
    values = (
        lambda trial: trial.lm_loss - 2.0,
        lambda trial: trial.logit_distance,
        lambda trial: trial.accuracy,
    )
    for axes, beside, value in zip(left[1:], right[1:], values, strict=True):
        series = (depth.layers, depth.windows[:3], depth.windows[3:])
        for line, found in zip(axes.lines, series, strict=False):
            assert list(line.get_xdata()) == [trial.drop_layers[0] for trial in found]
            assert list(line.get_ydata()) == [value(trial) for trial in found]
        assert list(beside.lines[0].get_ydata()) == [value(trial) for trial in depth.greedy]
        assert beside.get_ylim() == axes.get_ylim()
        assert beside.get_yscale() == axes.get_yscale()
        assert axes.get_ylabel()
    assert [axes.get_yscale() for axes in left] == ["linear", "log", "log", "linear"]
    assert left[3].lines[3].get_ydata()[0] == 0.75
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "1 layer left out",
        "2 neighbours",
        "3 neighbours",
        "whole model",
        "greedy by logit_distance",
    ]
    assert (left[-1].get_xlabel(), right[-1].get_xlabel()) == (
        "first layer left out",
        "layers left out",
    )


def test_a_layer_that_is_better_gone_has_its_place():
    """A loss that falls has no logarithm."""
    depth = scores(accuracy=False)
    depth.layers[1] = Ablation(drop_layers=[2], lm_loss=1.5, logit_distance=0.1)
    figure = _draw(INFLUENCE, depth)
    assert [axes.get_yscale() for axes in figure.axes[::2]] == ["linear", "linear", "log"]


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="minitron")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plot_depth(tmp_path, INFLUENCE, None)
    assert "depth.svg is not drawn: matplotlib is not installed" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "depth",
    [
        None,
        scores(accuracy=False, windows=[], greedy=[]),
        scores(accuracy=True, layers=[], greedy=[]),
        scores(accuracy=True),
    ],
)
def test_a_plot_is_the_same_file_again(tmp_path, depth):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        plot_depth(tmp_path / name, INFLUENCE, depth)
        found.append((tmp_path / name / "depth.svg").read_bytes())
    assert found[0] == found[1]
    assert ET.fromstring(found[0]).tag.endswith("svg")
