"""Which states are compared, and how many of them a window holds."""

import re
from dataclasses import fields, replace

import pytest
import torch

from minitron.data.batches import Batch
from minitron.distill.intermediate import find_pairs
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.parallel import initialize
from minitron.sections.distill import IntermediateConfig
from tests.distill.intermediate.one_step import ALL_STATES
from tests.runs import build_chunks_of, build_objective, run_on
from tests.tiny import tiny_config

STUDENT = hf.architecture_from_config(tiny_config().to_dict())
TEACHER = hf.architecture_from_config(tiny_config(num_hidden_layers=6).to_dict())


def test_the_default_is_the_papers_pair():
    config = IntermediateConfig(states=["block_output", "embedding"])
    assert [pair.name for pair in find_pairs(config, STUDENT, TEACHER)] == [
        "intermediate/block_output_1",
        "intermediate/embedding",
    ]
    assert find_pairs(config, STUDENT, TEACHER)[0].teacher.layer == 3
    assert find_pairs(IntermediateConfig(), STUDENT, TEACHER) == []


def test_layers_that_nothing_is_compared_at_need_not_exist():
    shallow = hf.architecture_from_config(tiny_config(num_hidden_layers=1).to_dict())
    assert find_pairs(IntermediateConfig(), shallow, TEACHER) == []
    (pair,) = find_pairs(IntermediateConfig(states=["embedding"]), shallow, TEACHER)
    assert pair.name == "intermediate/embedding"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"layers": [(4, 0)]},
            "distill.intermediate.layers=[[4, 0]] names layer 4 of the student, which has 4; "
            "use -4 to 3",
        ),
        (
            {"layers": [(0, 0), (3, -7)]},
            "distill.intermediate.layers=[[0, 0], [3, -7]] names layer -7 of the teacher, which "
            "has 6; use -6 to 5",
        ),
        ({"weight": -0.5}, "distill.intermediate.weight=-0.5 must not be negative"),
        (
            {"states": ["mlp_input", "mlp_input"]},
            "distill.intermediate.states=['mlp_input', 'mlp_input'] names something twice; "
            "leave one",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        find_pairs(IntermediateConfig(**{"states": ["block_output"], **values}), STUDENT, TEACHER)


def _window(parallel, run, seq_length):
    topology = initialize(parallel)
    objective = build_objective(run, build_chunks_of(run.model, topology))
    tokens = torch.zeros(1).expand(2, seq_length)  # without the memory
    return objective.window([Batch(*(tokens for _ in fields(Batch)))])


@pytest.mark.parametrize(
    ("topology", "states", "floats"),
    [
        # final states, embedding, three outputs, three inputs, and q, k, v of 8, 2 and 2 heads
        ("tp1", ALL_STATES, 48 * (1 + 1 + 3 + 3) + 3 * 12 * 6),
        ("tp2+sp", ALL_STATES, 48 * (1 + 1 + 3 + 3) / 2 + 3 * 12 * 6 / 2),
        ("pp2", ["embedding"], 48),  # beside the final states on another stage
    ],
)
def test_the_default_window_counts_all_states(run, topology, states, floats):
    run = replace(run, intermediate=replace(run.intermediate, states=states))
    expected = int(2**30 // (2 * 2**14 * floats * 4))
    assert set(run_on(topology, _window, run, 2**14)) == {expected}
