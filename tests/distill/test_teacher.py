"""How the teacher shares the ranks with the student: nothing of it may change the result."""

from dataclasses import fields, replace
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from minitron import platform
from minitron.data.batches import Batch
from minitron.distill import teacher as teacher_module
from minitron.distill.teacher import Teacher
from minitron.errors import MinitronError
from minitron.metrics import read_metrics
from minitron.model.schedule import split_windows
from minitron.parallel import initialize
from minitron.sections.distill import TeacherConfig
from minitron.sections.train import TrainConfig
from tests import runs
from tests.runs import SEQ_LENGTH, VOCAB, Run, build_teacher, load_tensors, run_on, write_tokens
from tests.tiny import save_llama

# Seven micro-batches on a rank: windows of two leave a shorter one.
CONFIG = TrainConfig(
    steps=2, lr=1e-3, global_batch_size=7, micro_batch_size=1, checkpoint_interval=0
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "student", vocab_size=VOCAB)
    save_llama(
        root / "teacher",
        seed=1,
        vocab_size=VOCAB,
        hidden_size=48,
        num_attention_heads=4,
        num_hidden_layers=5,
        tie_word_embeddings=True,
    )
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=write_tokens(root / "tokens", 40 * SEQ_LENGTH + 1),
        valid=write_tokens(root / "valid", 5 * SEQ_LENGTH + 1, seed=1),
        out=root / "out",
        train=CONFIG,
    )


def outcome(out):
    """What a run said and made, without its speed."""
    records = [
        {
            k: v
            for k, v in record.items()
            if k not in ("tokens_per_second", "peak_memory_gb", "time")
        }
        for record in read_metrics(out / "metrics.jsonl")
    ]
    return records, load_tensors(out / "model")


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(tensor, expected[1][name]) for name, tensor in found[1].items())


@pytest.fixture(scope="module")
def expected(run):
    """One rank, all states of a step at once."""
    run_on("tp1", runs.train, run)
    return outcome(run.out)


def _train_counting_states(parallel, run):
    """Train; the most states of the teacher that this rank ever held."""
    most = 0
    hidden = teacher_module.Teacher.take

    def take(self, index):
        nonlocal most
        most = max(most, len(self._states))
        return hidden(self, index)

    teacher_module.Teacher.take = take
    try:
        runs.train(parallel, run)
    finally:
        teacher_module.Teacher.take = hidden
    return most


@pytest.mark.parametrize("window", [1, 2, 3, 6])
def test_a_window_changes_no_bit(run, expected, tmp_path, window):
    run = replace(run, out=tmp_path, teacher=replace(run.teacher, window=window))
    (most,) = run_on("tp1", _train_counting_states, run)
    assert most == min(window, 4)  # seven are cut in 4 + 3 rather than 6 + 1
    assert_same(outcome(tmp_path), expected)


@pytest.mark.parametrize("topology", ["dp2", "tp2+sp pp2", "pp2 dp2", "pp2 vpp2"])
def test_a_window_changes_nothing_on_several_ranks(run, tmp_path, topology):
    """Gradients are reduced once, and scaled by the tokens of all windows."""
    run = replace(run, train=replace(CONFIG, global_batch_size=8))
    found = []
    for window in (None, 2):
        out = tmp_path / str(window)
        windowed = replace(run.teacher, window=window)
        run_on(topology, runs.train, replace(run, out=out, teacher=windowed))
        found.append(outcome(out))
    assert_same(*found)


class FarHost(platform.HostCopy):
    """Host memory of its own, as beside a GPU; remembers its tensors on the device."""

    on_device: ClassVar[list[tuple[StorageWeakRef, int]]] = []

    def __init__(self, tensor):
        super().__init__(tensor.clone())

    def begin(self):
        if self._back is None:
            self._back = self._host.clone()
            storage = self._back.untyped_storage()
            self.on_device.append((StorageWeakRef(storage), storage.nbytes()))

    def fetch(self):
        self.begin()
        tensor, self._back = self._back, None
        return tensor

    @classmethod
    def bytes_on_device(cls):
        return sum(size for storage, size in cls.on_device if not storage.expired())


def _train_offloaded(parallel, run):
    """Train; bytes that were fetched and not let go: during passes of the teacher, and between."""
    inside, between, empty = [], [], []
    schedule, take = teacher_module.run_schedule, Teacher.take

    def in_pass(*args, **options):
        inside.append(FarHost.bytes_on_device())
        schedule(*args, **options)

    def counted_take(self, index):
        state = take(self, index)
        between.append(FarHost.bytes_on_device())
        empty.extend(p.numel() == 0 for p in self.model.parameters())
        return state

    FarHost.on_device.clear()
    with (
        mock.patch.object(platform, "HostCopy", FarHost),
        mock.patch.object(teacher_module, "run_schedule", in_pass),
        mock.patch.object(Teacher, "take", counted_take),
    ):
        runs.train(parallel, run)
    return max(inside), max(between, default=0), empty.count(False), len(between)


STATE_BYTES = SEQ_LENGTH * 48 * 4


@pytest.mark.parametrize("offload", [{"offload_states": True}, {"placement": "offload"}])
@pytest.mark.parametrize("window", [None, 2])
def test_what_waits_in_host_memory_changes_no_bit(run, expected, tmp_path, offload, window):
    config = replace(run.teacher, window=window, **offload)
    run_on("tp1", runs.train, replace(run, out=tmp_path / "near", teacher=config))
    assert_same(outcome(tmp_path / "near"), expected)  # a CPU's own path, without copies
    far = replace(run, out=tmp_path / "far", teacher=config)
    ((inside, between, present, takes),) = run_on("tp1", _train_offloaded, far)
    assert_same(outcome(tmp_path / "far"), expected)

    with torch.device("meta"):
        teacher = LlamaForCausalLM(LlamaConfig.from_pretrained(run.teacher.path))
    weights = 4 * sum(p.numel() for p in teacher.model.layers.parameters())
    weights += teacher.model.norm.weight.nbytes  # the tied embedding is also the head, and stays
    if "placement" in offload:
        assert (inside, between) == (weights, 0)
        assert present == takes  # of all parameters the head alone is there
    else:
        assert (inside, between) == (0, 2 * STATE_BYTES)  # the one in use, and the next


def test_weights_wait_in_host_memory_on_several_ranks(run, tmp_path):
    run = replace(run, train=replace(CONFIG, global_batch_size=6))
    found = []
    for placement in ("resident", "offload"):
        out = tmp_path / placement
        config = replace(run.teacher, placement=placement, offload_states=placement == "offload")
        run_on("tp2+sp pp2", _train_offloaded, replace(run, out=out, teacher=config))
        found.append(outcome(out))
    assert_same(*found)


@pytest.mark.parametrize(
    ("count", "window", "sizes"),
    [(7, 7, [7]), (7, 9, [7]), (7, 6, [3, 4]), (7, 3, [2, 2, 3]), (4, 1, [1, 1, 1, 1])],
)
def test_windows_are_few_and_about_equally_long(count, window, sizes):
    windows = split_windows(range(count), window)
    assert [len(part) for part in windows] == sizes
    assert [index for part in windows for index in part] == list(range(count))


@pytest.mark.parametrize(
    ("count", "window", "sizes"),
    [(12, 12, [12]), (12, 11, [4, 8]), (12, 5, [4, 4, 4]), (12, 1, [4, 4, 4]), (7, 4, [4, 3])],
)
def test_windows_of_several_chunks_fill_the_stages(count, window, sizes):
    windows = split_windows(range(count), window, multiple_of=4)
    assert [len(part) for part in windows] == sizes
    assert [index for part in windows for index in part] == list(range(count))


def _window(parallel, config, seq_length):
    topology = initialize(parallel)
    tokens = torch.zeros(1).expand(2, seq_length)  # without the memory
    batch = Batch(*(tokens for _ in fields(Batch)))
    return build_teacher(config, topology).window([batch])


@pytest.mark.parametrize(
    ("topology", "shared", "stages"),
    [("tp1", 1, 1), ("tp2+sp", 2, 1), ("tp2", 1, 1), ("pp2", 1, 2)],
)
def test_by_default_a_window_fills_a_gibibyte(run, topology, shared, stages):
    state = 2 * 2**20 * 48 * 4  # [s, b, h] in fp32, of 2^20 tokens a sample
    assert set(run_on(topology, _window, run.teacher, 2**20)) == {
        max(2**30 * shared // state, 4 * stages)
    }
    assert set(run_on(topology, _window, run.teacher, 2**30)) == {4 * stages}


def _error(parallel, config):
    try:
        build_teacher(config, initialize(parallel))
    except MinitronError as error:
        return str(error)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [2, 2],
            "teacher.layers_per_stage=[2, 2] adds up to 4 layers, the model has 5, and no stage "
            "may be empty",
        ),
        (
            [5],
            "teacher.layers_per_stage=[5] names 1 stages, but "
            "parallel.pipeline_model_parallel_size=2",
        ),
    ],
)
def test_teacher_layers_that_do_not_fill_the_stages_are_refused(run, stages, message):
    config = replace(run.teacher, layers_per_stage=stages)
    assert run_on("pp2", _error, config) == [message, message]


def test_a_window_that_does_not_fill_interleaved_stages_is_refused(run):
    message = (
        "teacher.window=1 is less than the micro-batches that the student's interleaved stages "
        "take at a time (parallel.pipeline_model_parallel_size=2); use at least 2"
    )
    config = replace(run.teacher, window=1)
    assert run_on("pp2 vpp2", _error, config) == [message, message]


def test_a_window_without_a_micro_batch_is_refused():
    with pytest.raises(MinitronError, match=r"teacher\.window=0 must be at least 1"):
        TeacherConfig(path="teacher", window=0)
