import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minitron.errors import MinitronError
from minitron.parallel import barrier, initialize, is_rank_zero, on_rank_zero, publish
from minitron.sections.parallel import ParallelConfig
from tests.harness import run_distributed
from tests.runs import run_on

ROOT = Path(__file__).parents[1]


# Sizes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tensor_model_parallel_size": 0},
            "parallel.tensor_model_parallel_size=0 must be at least 1",
        ),
        (
            {"pipeline_model_parallel_size": -2},
            "parallel.pipeline_model_parallel_size=-2 must be at least 1",
        ),
        (
            {"virtual_pipeline_model_parallel_size": 2},
            "parallel.virtual_pipeline_model_parallel_size=2 interleaves the chunks of several "
            "stages, but parallel.pipeline_model_parallel_size=1; give it 2 or more stages, or 1 "
            "chunk",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "layers_per_stage": [4, 4],
            },
            "parallel.layers_per_stage=[4, 4] names 2 stages, but "
            "parallel.pipeline_model_parallel_size x "
            "parallel.virtual_pipeline_model_parallel_size = 2 x 2 = 4",
        ),
        ({"timeout_minutes": 0}, "parallel.timeout_minutes=0 must be at least 1"),
        (
            {"pipeline_model_parallel_size": 2, "layers_per_stage": [4, 4, 4]},
            "parallel.layers_per_stage=[4, 4, 4] names 3 stages, but "
            "parallel.pipeline_model_parallel_size=2",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(values, message):
    with pytest.raises(MinitronError) as caught:
        ParallelConfig(**values)
    assert str(caught.value) == message


def test_data_parallelism_takes_the_rest():
    config = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    assert config.data_parallel_size(6) == 1
    assert config.data_parallel_size(24) == 4
    with pytest.raises(MinitronError) as caught:
        config.data_parallel_size(8)
    assert str(caught.value) == (
        "the number of ranks, 8, does not divide into groups of "
        "parallel.tensor_model_parallel_size=2 x "
        "parallel.pipeline_model_parallel_size=3 = 6; start a multiple of 6 ranks "
        "(torchrun --nproc-per-node)"
    )


@pytest.mark.parametrize(
    ("stages", "num_layers", "expected"),
    [(1, 5, [5]), (2, 4, [2, 2]), (2, 5, [3, 2]), (4, 11, [3, 3, 3, 2]), (3, 3, [1, 1, 1])],
)
def test_layers_are_spread_evenly(stages, num_layers, expected):
    assert ParallelConfig(pipeline_model_parallel_size=stages).split_layers(num_layers) == expected


def test_layers_are_spread_as_told():
    config = ParallelConfig(pipeline_model_parallel_size=3, layers_per_stage=[1, 5, 2])
    assert config.split_layers(8) == [1, 5, 2]


@pytest.mark.parametrize(
    ("stages", "given", "message"),
    [
        (5, None, "4 layers do not fill parallel.pipeline_model_parallel_size=5 stages; use at"),
        (2, [2, 3], r"parallel.layers_per_stage=\[2, 3\] adds up to 5 layers, the model has 4"),
        (2, [0, 4], r"parallel.layers_per_stage=\[0, 4\] .* no stage may be empty"),
        (3, [-1, 4, 1], r"parallel.layers_per_stage=\[-1, 4, 1\] .* no stage may be empty"),
    ],
)
def test_layers_that_do_not_fill_the_stages_are_refused(stages, given, message):
    config = ParallelConfig(pipeline_model_parallel_size=stages, layers_per_stage=given)
    with pytest.raises(MinitronError, match=message):
        config.split_layers(4)


INTERLEAVED = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)


def test_layers_go_to_chunks_in_the_models_order():
    assert INTERLEAVED.split_layers(8) == [2, 2, 1, 1, 1, 1]
    uneven = replace(INTERLEAVED, layers_per_stage=[1, 2, 3, 4, 5, 6])
    assert uneven.without_interleaving().split_layers(21) == [1 + 3 + 5, 2 + 4 + 6]
    assert INTERLEAVED.without_interleaving().split_layers(8) == [4, 4]
    with pytest.raises(MinitronError) as caught:
        INTERLEAVED.split_layers(5)
    assert str(caught.value) == (
        "5 layers do not fill parallel.pipeline_model_parallel_size x "
        "parallel.virtual_pipeline_model_parallel_size = 2 x 3 = 6 stages; use at most 5"
    )


def test_micro_batches_that_do_not_fill_the_stages_are_refused():
    INTERLEAVED.check_num_microbatches(4)
    INTERLEAVED.without_interleaving().check_num_microbatches(5)
    with pytest.raises(MinitronError) as caught:
        INTERLEAVED.check_num_microbatches(5)
    assert str(caught.value) == (
        "a step has 5 micro-batches on each rank (train.global_batch_size / "
        "(train.micro_batch_size x data-parallel ranks)), and "
        "parallel.virtual_pipeline_model_parallel_size=3 takes them in groups of "
        "parallel.pipeline_model_parallel_size=2; use a multiple of 2"
    )


# Ranks


def _place(parallel):
    topology = initialize(parallel)
    topology = initialize(parallel)  # once more makes new groups
    return {
        "tp": (topology.tp_rank, topology.tp_size),
        "pp": (topology.pp_rank, topology.pp_size),
        "dp": (topology.dp_rank, topology.dp_size),
        "first": topology.is_first_stage,
        "last": topology.is_last_stage,
        "last stage": topology.last_stage_rank,
    }


@pytest.mark.parametrize(
    ("name", "tp", "dp", "pp"),
    [("tp4", 4, 1, 1), ("tp2 pp2", 2, 1, 2), ("tp2 dp2", 2, 2, 1), ("pp2 dp2", 1, 2, 2)],
)
def test_tensor_parallel_ranks_are_neighbours_and_stages_far_apart(name, tp, dp, pp):
    for rank, place in enumerate(run_on(name, _place)):
        stage = rank // (tp * dp)
        assert place == {
            "tp": (rank % tp, tp),
            "pp": (stage, pp),
            "dp": (rank // tp % dp, dp),
            "first": stage == 0,
            "last": stage == pp - 1,
            "last stage": rank + (pp - 1 - stage) * tp * dp,
        }


def _message(parallel):
    try:
        initialize(parallel)
    except MinitronError as error:
        return str(error)


def test_a_number_of_ranks_that_does_not_divide_is_refused_on_every_rank():
    messages = run_distributed(_message, 3, ParallelConfig(tensor_model_parallel_size=2))
    assert len(set(messages)) == 1
    assert messages[0].startswith("the number of ranks, 3, does not divide into groups of ")


def test_one_process_needs_no_torchrun():
    code = (
        "import json; from minitron.parallel import *\n"
        "t = initialize(ParallelConfig()); on_rank_zero(lambda: None); barrier()\n"
        "print(json.dumps([t.tp_size, t.pp_size, t.dp_size, t.last_stage_rank, is_rank_zero()]))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=180
    )
    assert json.loads(done.stdout) == [1, 1, 1, 0, True], done.stderr.decode()


# One rank for all


def _speak_for_all():
    calls = []

    def answer():
        calls.append(1)
        return {"answer": 42}

    def fail(error):
        raise error

    results = [on_rank_zero(answer)]
    for error in (MinitronError("a=1 is wrong; give 2"), FileNotFoundError(2, "gone", "x.bin")):
        try:
            on_rank_zero(lambda error=error: fail(error))
        except Exception as caught:
            results.append(f"{type(caught).__name__}: {caught}")
    results.append(on_rank_zero(answer))  # still in step
    return results, len(calls), is_rank_zero()


def test_rank_zero_speaks_for_all():
    ranks = run_distributed(_speak_for_all, 3)
    for results, _, _ in ranks:
        assert results == [
            {"answer": 42},
            "MinitronError: a=1 is wrong; give 2",
            "FileNotFoundError: [Errno 2] gone: 'x.bin'",
            {"answer": 42},
        ]
    assert [calls for _, calls, _ in ranks] == [2, 0, 0]
    assert [zero for _, _, zero in ranks] == [True, False, False]


def test_rank_zero_is_known_before_there_is_a_process_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert is_rank_zero()
    monkeypatch.setenv("RANK", "3")
    assert not is_rank_zero()
    assert on_rank_zero(lambda: 7) == 7


def _publish(out, fails):
    rank = int(os.environ["RANK"])
    try:
        with publish(out) as directory:
            (directory / f"{rank}").write_text("x")
            assert not out.exists()
            if fails:
                barrier()  # else the first to fail would take the directory from the other
                raise MinitronError("all ranks meet it")
    except MinitronError as error:
        return str(error)
    return sorted(path.name for path in out.iterdir())


def test_all_ranks_publish_one_directory(tmp_path):
    out = tmp_path / "out"
    assert run_distributed(_publish, 2, out, True) == ["all ranks meet it"] * 2
    assert list(tmp_path.iterdir()) == []
    assert run_distributed(_publish, 2, out, False) == [["0", "1"]] * 2
    messages = run_distributed(_publish, 2, out, False)
    assert messages[0] == messages[1]
    assert re.match(r"--out .*out is not empty", messages[0])
