"""Successive halving with made-up losses."""

import math

import pytest

from minitron.errors import MinitronError
from minitron.search.race import run_race
from minitron.sections.search import RaceConfig

# A slow starter (d) that would win, one that leads early (a), and one that is never good (e).
LOSSES = {
    10: {"a": 1.0, "b": 3.0, "c": 2.0, "d": 2.5, "e": 9.0},
    20: {"a": 0.9, "b": 2.0, "c": 0.8, "d": 1.0, "e": 8.0},
    40: {"a": 0.7, "b": 1.0, "c": 0.6, "d": 0.1, "e": 7.0},
}


def race(entrants="abcde", rungs=(10, 20, 40), keep=0.5, losses=LOSSES):
    asked, dropped = [], []

    def loss_at(name, step):
        asked.append((name, step))
        return losses[step][name]

    best = run_race(list(entrants), rungs, keep, loss_at, dropped.append)
    return best, asked, dropped


def test_the_better_part_goes_on():
    best, asked, dropped = race()
    assert asked == [
        ("a", 10), ("b", 10), ("c", 10), ("d", 10), ("e", 10),
        ("a", 20), ("c", 20), ("d", 20),  # half of five, rounded up, in their old order
        ("a", 40), ("c", 40),
    ]  # fmt: skip
    assert dropped == ["b", "e", "d", "a"]
    assert best == "c"


def test_who_keeps_all_finds_the_slow_starter():
    best, asked, dropped = race(keep=1.0)
    assert len(asked) == 15
    assert dropped == ["c", "a", "b", "e"]  # at the end, best first
    assert best == "d"


def test_one_left_runs_to_the_end():
    best, asked, dropped = race(keep=0.1)
    assert asked[5:] == [("a", 20), ("a", 40)]
    assert (best, dropped) == ("a", ["c", "d", "b", "e"])


def test_without_rungs_the_last_step_decides():
    best, asked, _ = race(rungs=(20,))
    assert best == "c"
    assert len(asked) == 5


def test_of_equals_the_first_goes_on():
    even = {step: dict.fromkeys("abcde", 1.0) for step in LOSSES}
    assert race(losses=even)[0] == "a"
    assert race(entrants="ca", losses=even)[0] == "c"


def test_who_diverges_drops_out_and_the_others_go_on():
    losses = {step: {**LOSSES[step], "a": math.inf, "c": math.inf} for step in LOSSES}
    best, asked, dropped = race(losses={10: LOSSES[10], 20: losses[20], 40: losses[40]})
    assert asked[5:] == [("a", 20), ("c", 20), ("d", 20), ("d", 40)]
    assert dropped == ["b", "e", "a", "c"]
    assert best == "d"


def test_when_all_have_diverged():
    losses = {**LOSSES, 20: dict.fromkeys("abcde", math.inf)}
    with pytest.raises(MinitronError) as caught:
        race(losses=losses)
    assert str(caught.value) == (
        "by step 20 the training of a, c, d has diverged, and no shape is left; lower train.lr and "
        "search anew"
    )


def test_the_last_step_is_the_last_rung():
    assert RaceConfig().all_rungs(400) == [100, 200, 400]
    assert RaceConfig(rungs=[]).all_rungs(1) == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"entrants": 0}, "race.entrants=0 must be at least 1"),
        ({"keep": 0.0}, "race.keep=0.0 must be above 0 and at most 1"),
        ({"keep": 1.5}, "race.keep=1.5 must be above 0 and at most 1"),
        ({"rungs": [0, 5]}, "race.rungs=[0, 5] must be steps above 0 that rise"),
        ({"rungs": [7, 7]}, "race.rungs=[7, 7] must be steps above 0 that rise"),
    ],
)
def test_races_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError) as caught:
        RaceConfig(**values)
    assert str(caught.value) == message


@pytest.mark.parametrize(("rungs", "steps"), [([100, 200], 200), ([], 0)])
def test_rungs_past_the_last_step(rungs, steps):
    with pytest.raises(MinitronError) as caught:
        RaceConfig(rungs=rungs).all_rungs(steps)
    assert str(caught.value) == (
        f"race.rungs={rungs} must lie before the last step, train.steps={steps}"
    )
