"""The table: what its numbers are, which is marked, and its three renderings."""

import pytest

from minitron.report.runs import read_runs
from minitron.report.table import HEADER, Table, count_text, row_of
from tests.report.run_dirs import (
    VALID_DATA,
    evaluation,
    score_directory,
    training_run,
    write_manifest,
)

OTHER_DATA = {"path": ["train.bin"], "valid_path": ["other.bin"], "seq_length": 64}


def table_of(*paths):
    return Table(read_runs(paths))


def columns(table):
    """Column title -> texts with their marks, model by model."""
    cells = [[cell.text + cell.marks for cell in row] for row in table.cells()]
    return dict(zip(HEADER, zip(*cells, strict=True), strict=True))


def test_before_is_the_first_validation_and_after_the_last(tmp_path):
    path = training_run(tmp_path / "width", [5.0, 3.0, 4.0], stage="distill")
    (row,) = table_of(path).rows
    assert (row.loss_before, row.loss_after, row.tokens) == (5.0, 4.0, 20)
    assert columns(table_of(path)) == {
        "model": ("width",),
        "stage": ("distill",),
        "parameters": ("4.51B",),
        "loss before": ("5.000",),
        "loss after": ("4.000",),
        "tokens": ("20",),
    }


def test_nothing_is_claimed_that_was_not_measured(tmp_path):
    pruned = write_manifest(tmp_path / "pruned", "prune", num_parameters=1000)
    begun = training_run(tmp_path / "begun", [5.0], finished=False)
    diverged = training_run(tmp_path / "diverged", [5.0, None])
    not_begun = tmp_path / "not_begun"
    not_begun.mkdir()
    (not_begun / "metrics.jsonl").touch()
    shown = columns(table_of(pruned, begun, diverged, not_begun))
    assert shown["loss before"] == ("-", "5.000", "5.000", "-")
    assert shown["loss after"] == ("-", "-", "-", "-")
    assert shown["tokens"] == ("-", "0", "10", "-")
    assert shown["parameters"] == ("1.00k", "-", "4.51B", "-")
    assert shown["stage"] == ("prune", "train, unfinished", "train", "train, unfinished")


def test_a_first_validation_after_training_began_is_not_before(tmp_path):
    path = training_run(tmp_path / "run", [5.0, 3.0])
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join(lines[1:]))
    (run,) = read_runs([path])
    assert row_of(run).loss_before is None
    assert row_of(run).loss_after == 3.0


def test_evaluation_is_a_loss_without_training(tmp_path):
    (row,) = table_of(evaluation(tmp_path / "eval", 2.5)).rows
    assert (row.loss_before, row.loss_after, row.tokens) == (None, 2.5, None)


CHECK = {"path": ["calibration"], "seq_length": 32, "samples": 16}


def test_a_pruned_model_shows_its_sources_loss_and_its_own(tmp_path):
    losses = {"source": 2.0, "student": 5.0, "random": 9.0}
    made = {"num_parameters": 1000, "lm_loss": losses, "lm_loss_data": CHECK}
    recipe = {"data": None, "check": {"samples": 16}}
    table = table_of(
        write_manifest(tmp_path / "pruned", "prune", recipe=recipe, **made),
        write_manifest(tmp_path / "unchecked", "prune", recipe=recipe, num_parameters=1000),
    )
    shown = columns(table)
    assert (shown["loss before"], shown["loss after"]) == (("2.000", "-"), ("5.000", "-"))
    notes = "losses measured on the first 16 samples of calibration, sequences of 32"
    assert notes in table.notes()


def test_a_search_shows_the_losses_of_its_winner(tmp_path):
    recipe = {"data": {**VALID_DATA, "valid_samples": 8}}
    losses = {"source_loss": 2.0, "pruned_loss": 7.0, "val_loss": 4.0, "tokens": 1_900_000_000}
    made = {"num_parameters": 1000, "best": "L2", **losses}
    table = table_of(write_manifest(tmp_path / "best", "search", recipe=recipe, **made))
    (row,) = table.rows
    assert (row.loss_before, row.loss_after, row.tokens) == (7.0, 4.0, 1.9e9)
    assert row.data == "the first 8 samples of valid.bin, sequences of 64"


def test_scores_are_no_model(tmp_path):
    assert table_of(score_directory(tmp_path / "scores")).rows == []


def test_lowest_of_each_column_is_marked(tmp_path):
    table = table_of(
        training_run(tmp_path / "a", [4.0, 2.5]), training_run(tmp_path / "b", [5.0, 2.25])
    )
    assert columns(table)["loss before"] == ("4.000*", "5.000")
    assert columns(table)["loss after"] == ("2.500", "2.250*")
    assert "*: the lowest of its column" in table.notes()
    assert "losses measured on valid.bin, sequences of 64" in table.notes()


def test_only_losses_on_the_same_data_compete(tmp_path):
    table = table_of(
        training_run(tmp_path / "teacher", [9.0, 1.0], data=OTHER_DATA),
        training_run(tmp_path / "a", [4.0, 2.5]),
        training_run(tmp_path / "b", [5.0, 2.25]),
    )
    assert columns(table)["loss after"] == ("1.000 [1]", "2.500 [2]", "2.250 [2]*")
    assert table.labels() == {"teacher": "teacher [1]", "a": "a [2]", "b": "b [2]"}
    assert table.notes()[1:] == [
        "*: the lowest of its column on the same data",
        "[1] losses measured on other.bin, sequences of 64",
        "[2] losses measured on valid.bin, sequences of 64",
    ]


def test_a_single_run_beats_nobody(tmp_path):
    table = table_of(training_run(tmp_path / "a", [4.0, 2.5]))
    assert not any("*" in note for note in table.notes())
    assert "*" not in table.text()


def test_text_is_aligned(tmp_path):
    table = table_of(
        training_run(tmp_path / "a_long_name", [4.0, 2.5]),
        training_run(tmp_path / "b", [11.0, 12.25]),
        training_run(tmp_path / "c", [4.0, 2.5], data=OTHER_DATA),
    )
    header, rule, *body = table.text().splitlines()[:5]
    assert all(len(line) == len(header) == len(rule) for line in body)
    points = [[i for i, letter in enumerate(line) if letter == "."] for line in body]
    assert points[0] == points[1] == points[2]  # numbers line up, marked or not


def test_markdown_escapes_names(tmp_path):
    table = table_of(training_run(tmp_path / "a|b_c", [4.0, 2.5]))
    header, rule, row = table.markdown().splitlines()[:3]
    assert header.count("|") == rule.count("|") == len(HEADER) + 1
    assert row.startswith("| a\\|b\\_c | train |")


def test_html_escapes_names(tmp_path):
    text = table_of(training_run(tmp_path / "<b>&", [4.0, 2.5])).html()
    assert '<th scope="row">&lt;b&gt;&amp;</th>' in text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (8_392_704, "8.39M"),
        (4_512_746_496, "4.51B"),
        (94e9, "94.0B"),
        (15e12, "15.0T"),
    ],
)
def test_count_text(count, text):
    assert count_text(count) == text
