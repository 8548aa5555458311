"""The record of a search: written, read again, ranked, drawn."""

import json

import pytest

from minitron.errors import MinitronError
from minitron.search.plot import plot_race, ranks
from minitron.search.results import Candidate, Results, load_results
from minitron.search.space import find_shapes
from minitron.sections.search import BudgetConfig, GridConfig
from tests.search.test_space import LLAMA_8B, accept, params


@pytest.fixture
def results():
    """Three shapes: one that raced to the end, one that dropped out, one that never ran."""
    shapes, _ = find_shapes(
        LLAMA_8B,
        GridConfig(num_layers=[16, 24, 32]),
        BudgetConfig(),
        {"params": params, "latency": lambda arch: arch.num_layers / 1000},
        accept,
    )
    measured = [(3.0, {0: 3.0, 10: 2.0}), (4.0, {0: 4.0, 10: 1.5, 20: 1.25}), (5.0, {})]
    return Results(
        source=LLAMA_8B,
        source_loss=1.0,
        candidates=[
            Candidate(shape=shape, pruned_loss=loss, losses=losses)
            for shape, (loss, losses) in zip(shapes, measured, strict=True)
        ],
    )


def test_what_is_written_is_read_again(tmp_path, results):
    assert load_results(tmp_path, LLAMA_8B) is None
    results.best = results.candidates[1].name
    results.save(tmp_path, [10, 20])
    assert load_results(tmp_path, LLAMA_8B) == results
    first = json.loads((tmp_path / "search.json").read_text())["candidates"][0]
    assert first == {
        "name": "L32-h4096-f14336-n32-g8",
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "params": 8_030_261_248,
        "latency": 0.032,
        "pruned_loss": 3.0,
        "losses": {"0": 3.0, "10": 2.0},
        "diverged": None,
    }


@pytest.mark.parametrize("content", ["[]", "{}", '{"source": {"loss": 1}, "candidates": [{}]}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(MinitronError) as caught:
        load_results(tmp_path, LLAMA_8B)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/search.json is not what launch/search.py writes (")
    assert message.endswith("; restore it, or choose another --out")


def test_who_got_farther_ranks_higher(results):
    assert [c.shape.arch.num_layers for c in results.ranked()] == [24, 32, 16]


def test_who_diverged_ranks_last(tmp_path, results):
    leader = results.candidates[1]
    del leader.losses[20]
    leader.diverged = 20
    results.save(tmp_path, [10, 20, 40])
    assert load_results(tmp_path, LLAMA_8B) == results
    assert [c.shape.arch.num_layers for c in results.ranked()] == [32, 16, 24]
    lines = (tmp_path / "search.md").read_text().splitlines()
    assert lines[2].endswith("| 3.0000 | 2.0000 | - | - |")
    assert lines[4].endswith("| 4.0000 | 1.5000 | diverged | - |")


def test_the_table(tmp_path, results):
    results.save(tmp_path, [10, 20])
    lines = (tmp_path / "search.md").read_text().splitlines()
    assert lines[0] == "| rank | shape | params | latency, s | pruned | step 10 | step 20 |"
    assert lines[2] == "| 1 | L24-h4096-f14336-n32-g8 | 6.29B | 0.024 | 4.0000 | 1.5000 | 1.2500 |"
    assert lines[3].endswith("| 3.0000 | 2.0000 | - |")
    assert lines[4].endswith("| 5.0000 | - | - |")
    assert lines[-1].endswith("after so many steps of distillation; the source's is 1.0000.")
    text = results.table([10, 20]).splitlines()
    assert text[2].split() == lines[2].replace("|", " ").split()


def test_before_anything_is_measured_only_costs_are_shown(results):
    results.source_loss = None
    for candidate in results.candidates:
        candidate.pruned_loss, candidate.losses = None, {}
    assert results.table(()).splitlines()[0].split() == ["rank", "shape", "params", "latency,", "s"]
    assert "Losses" not in results.table(())


def test_ranks_are_among_those_that_still_run(tmp_path, results):
    names = [candidate.name for candidate in results.candidates]
    assert ranks(results.candidates) == {
        names[0]: {0: 1, 10: 2},
        names[1]: {0: 2, 10: 1},
        names[2]: {},
    }
    plot_race(tmp_path, results.candidates[2:])
    assert not list(tmp_path.iterdir())  # nobody has raced
    plot_race(tmp_path, results.ranked())
    svg = (tmp_path / "ranking.svg").read_text()
    assert "<svg" in svg
