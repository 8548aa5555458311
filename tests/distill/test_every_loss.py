"""Every loss under every parallelism: values and gradients are those of one fp64 process.

The ranks run the training loop's own step, with an optimizer that leaves the gradients where they
are. Each compares all it holds with its part of what is expected, so that a copy of a gradient that
differs from another rank's is seen too.
"""

import contextlib
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from minitron.distill import losses, states
from minitron.distill.intermediate import IntermediateDistillation
from minitron.distill.losses import LogitDistillation
from minitron.distill.offline.objective import StoredDistillation
from minitron.distill.offline.store import LogitStore
from minitron.distill.offline.teacher import StoredTeacher
from minitron.distill.teacher import Teacher, teacher_topology
from minitron.model.llama import build_chunks, build_llama
from minitron.model.sharding import load_weights, open_model, packed_parameters
from minitron.ops import linear_kl
from minitron.parallel import initialize
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from minitron.sections.train import TrainConfig
from minitron.train import loop
from minitron.train.checkpoint import Position
from tests.distill.every_loss import CASES, TEMPERATURE, Oracle
from tests.distill.offline.stores import write_store
from tests.distill.pairs import save_pair
from tests.runs import MEASURED, SEED, SEQ_LENGTH, VOCAB, open_batches, run_on

# isort: split
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

# Relative: errors of a value, or of a gradient's norm. In fp64, where everything runs in PyTorch,
# they come to 1e-14, fifty roundings of 2e-16. In fp32, where the kernels run, fifty of 1e-7 leave
# 4e-6 of the gradients that have come furthest, and 1e-7 of the values. A store holds fp32, of a
# teacher that ran in fp32.
FP64, FP32, STORED = 1e-12, 1e-5, 1e-5
CONFIG = TrainConfig(global_batch_size=4, micro_batch_size=2)
TOPOLOGIES = ("tp1", "tp2", "tp2+sp", "tp4", "pp2", "pp2 vpp2", "dp2", "tp2 pp2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "head_dim": 6}
    run = save_pair(root, CONFIG, student={}, teacher=sizes)
    data = DataConfig(path=[str(root / "tokens")], seq_length=SEQ_LENGTH)
    stores = {"full": {"top_k": VOCAB}, "top_k": {"top_k": 20}, "draws": {"draws": 30}}
    for name, kept in stores.items():
        cache = CacheConfig(floats="fp32", temperature=TEMPERATURE, **kept)
        run_on("tp2", write_store, root / "teacher", data, cache, root / name, SEED)
    return run


@pytest.fixture(scope="module")
def expected(run):
    """Where it lies what every case's last step says of itself, and its gradients."""
    oracle = Oracle(run, run.out)
    path = run.out / "expected.pt"
    torch.save({name: oracle.expect(case) for name, case in CASES.items()}, path)
    return path


class _KeptTeacher(Teacher):
    """Goes forward once: its weights and the micro-batches stay."""

    _has_run = False

    def run(self, microbatches):
        if not self._has_run:
            super().run(microbatches)
        self._has_run = True

    def take(self, index):
        return self._states[index]


class _NoOptimizer:
    """Leaves weights and gradients where they are."""

    param_groups = ()

    def __init__(self, model, _):
        schedule = model[0].config
        schedule.grad_scale_func = lambda loss: loss
        schedule.no_sync_func = [c.no_sync for c in model] if len(model) > 1 else model[0].no_sync
        schedule.finalize_model_grads_func = finalize_model_grads

    def zero_grad(self):
        pass

    def step(self):
        return True, 0.0, None


def _wrap(chunk):
    """Data parallelism with gradients in the model's precision, whole on every rank."""
    return DistributedDataParallel(
        config=chunk.config,
        ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=False),
        module=chunk,
        pg_collection=chunk.topology.groups,
    )


class _Bench:
    """Models of a run on this rank, and the step that takes a case's loss through them."""

    def __init__(self, run, topology, dtype):
        self._run, self._topology, self._dtype = run, topology, dtype
        self._arch, self._weights = open_model(run.model)
        self._teacher_arch, self._teacher_weights = open_model(run.teacher.source)
        self._mirror = self._build_student()  # to hold the gradients that are expected
        self._teacher = self._build_teacher(_KeptTeacher)

    def _build_student(self):
        return build_chunks(self._arch, self._topology, self._weights, dtype=self._dtype)

    def _build_teacher(self, kind):
        config = self._run.teacher
        topology = teacher_topology(config, self._topology, self._teacher_arch.num_layers)
        model = build_llama(self._teacher_arch, topology, self._teacher_weights, dtype=self._dtype)
        return kind(model, config)

    def errors(self, case, expected):
        """Relative errors of a case's last step, by what it logs and the tensors of gradients."""
        student = self._build_student()
        if case.store is not None:
            store = LogitStore(self._run.out / case.store)
            teacher = StoredTeacher(
                store, vocab_size=VOCAB, is_last_stage=self._topology.is_last_stage
            )
            objective = StoredDistillation(teacher, case.distill)
        elif case.intermediate.states:  # whose hooks stay on the models
            teacher = self._build_teacher(Teacher)
            objective = IntermediateDistillation(
                LogitDistillation(teacher, case.distill),
                student,
                teacher,
                case.intermediate,
                lm_weight=case.distill.lm_weight,
                seed=SEED,
            )
        else:
            objective = LogitDistillation(self._teacher, case.distill)
        record = self._step(student, objective, case.steps)
        assert record.keys() == expected.record.keys()
        values = {
            name: abs(record[name] - value) / (abs(value) or 1.0)
            for name, value in expected.record.items()
        }
        return values | self._gradient_errors(student, expected.gradients)

    def _step(self, student, objective, steps):
        ranks = {"rank": self._topology.dp_rank, "size": self._topology.dp_size}
        batches = open_batches(self._run, **ranks)
        trainer = loop.Trainer(student, objective, batches, None, self._run.train, self._run.out)
        with contextlib.closing(trainer):
            for _ in range(steps):
                trainer.position = Position()
                record = trainer.train_step()
        return {
            name: value
            for name, value in record.items()
            if name not in ("step", "lr", "grad_norm", "tokens", *MEASURED)
        }

    def _gradient_errors(self, student, gradients):
        found = {}
        for chunk, mirror in zip(student, self._mirror, strict=True):
            load_weights(mirror, self._arch, self._topology, _Tensors(gradients))
            ours = packed_parameters(chunk, self._arch)
            theirs = packed_parameters(mirror, self._arch)
            for (parameter, packing), (wanted, _) in zip(ours, theirs, strict=True):
                whole = torch.cat([gradients[name].flatten() for name in packing.sources])
                error = (parameter.main_grad - wanted.detach()).norm() / whole.norm()
                found[" ".join(packing.sources)] = error.item()
        companion = getattr(student[0], "companion", None)
        if companion is not None and companion.weight is not None:
            wanted = gradients["map"]
            found["map"] = ((companion.weight.main_grad - wanted).norm() / wanted.norm()).item()
        return found


class _Tensors:
    """A source of weights in memory."""

    def __init__(self, tensors):
        self._tensors = tensors

    def read(self, name, *index):
        return self._tensors[name][index or slice(None)]


def _errors(parallel, run, path, dtype, names, scaled=False):
    """Errors of every case on this rank."""
    topology = initialize(parallel)
    # Few collectives for many ranks, else several micro-batches.
    run = replace(run, train=replace(run.train, micro_batch_size=4 if topology.tp_size == 4 else 2))
    expected = torch.load(path, weights_only=False)
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (loop, "wrap_chunk", _wrap),
            (loop, "build_optimizer", _NoOptimizer),
            (linear_kl, "CHUNK_TOKENS_ON_CPU", 20),  # so that there are several
            *(_wrong_by(topology.tp_size) if scaled else ()),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        bench = _Bench(run, topology, dtype)
        return {name: bench.errors(CASES[name], expected[name]) for name in names}


def _wrong_by(factor):
    """Patches that scale the gradient of every loss, and leave the loss as it is."""
    attach, compare = states.attach_loss, losses.linear_kl

    def scaled_attach(output, loss):
        return attach(output, factor * loss)

    def scaled_compare(*args, **options):
        found = compare(*args, **options)
        constant = found.loss.detach()
        return found._replace(loss=constant + factor * (found.loss - constant))

    return (states, "attach_loss", scaled_attach), (losses, "linear_kl", scaled_compare)


def _beyond(ranks, tolerance):
    """Errors beyond the tolerance on any rank, by case."""
    found = {}
    for errors in ranks:
        for case, of_case in errors.items():
            limit = STORED if CASES[case].store else tolerance
            for name, error in of_case.items():
                if not error < limit:  # or NaN
                    found.setdefault(case, {})[name] = error
    return found


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_loss_in_fp64(run, expected, topology):
    ranks = run_on(topology, _errors, run, expected, torch.float64, [*CASES])
    assert _beyond(ranks, FP64) == {}


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_loss_in_fp32(run, expected, topology):
    names = [name for name, case in CASES.items() if case.runs_kernels]
    ranks = run_on(topology, _errors, run, expected, torch.float32, names)
    assert _beyond(ranks, FP32) == {}


def test_a_gradient_that_is_wrong_by_the_number_of_ranks_is_seen_in_every_loss(run, expected):
    """As where autograd sums a collective over its ranks: no loss differs, and all gradients do."""
    ranks = run_on("tp2", _errors, run, expected, torch.float64, [*CASES], True)
    for case, errors in ranks[0].items():
        gradients = {name for name in errors if "weight" in name or name == "map"}
        assert len(gradients) >= 6 * 4 + 3
        for name in errors:
            error = math.hypot(*(rank[case][name] for rank in ranks))  # parts of one, or copies
            least, most = (0.999, 1.415) if name in gradients else (0.0, STORED)
            assert least <= error < most, (case, name)
