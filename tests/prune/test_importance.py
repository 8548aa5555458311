"""Importance scores against hooks on transformers' model, and the same on every topology."""

import re
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.parallel import initialize
from minitron.prune import importance
from minitron.prune.importance import measure_importance, open_calibration
from minitron.prune.scores import SCORES_FILE, Importance, save_scores
from minitron.sections.data import DataConfig
from minitron.sections.prune import ImportanceConfig
from tests.runs import SEQ_LENGTH, VOCAB, run_on, write_tokens
from tests.tiny import save_llama

HOOKS = ("_see_norm", "_see_neurons", "_see_heads", "_see_layer", "_end_microbatch")
HOST_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero")
NUM_SAMPLES = 7
# Over samples [mean, L2, variance] of [mean, L2, variance] over the sequence. What is squared once
# more has twice the relative error, and no errors that cancel.
TOLERANCE = 1e-6 * torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 3.0], [3.0, 3.0, 6.0]])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, save_llama(directory, vocab_size=VOCAB, head_dim=6, attention_bias=True)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Seven whole samples and a shorter one, which does not count."""
    prefix = tmp_path_factory.mktemp("data") / "tokens"
    return write_tokens(prefix, NUM_SAMPLES * SEQ_LENGTH + 1 + 5)


def _watch(layers):
    """Hooks that note input and output [s, ...] of what the scores are made of, layer by layer."""
    seen = {}

    def watch(name, i, module):
        def hook(_, args, output):
            seen[name, i] = args[0][0].double(), output[0].double()

        return module.register_forward_hook(hook)

    hooks = []
    for i, layer in enumerate(layers):
        hooks += [
            watch("layer", i, layer),
            watch("input norm", i, layer.input_layernorm),
            watch("mlp norm", i, layer.post_attention_layernorm),
            watch("attention output", i, layer.self_attn.o_proj),
            watch("mlp output", i, layer.mlp.down_proj),
        ]
    return seen, hooks


def _definition(model, prefix, num_samples):
    """All scores by their definitions, in fp64, from one sample after the other.

    Also what each is measured against: a variance, which is a difference, against the mean square
    that it is a part of, anything else against itself.
    """
    layers = range(len(model.model.layers))
    tokens = torch.from_numpy(TokenStream(prefix).read(0, num_samples * SEQ_LENGTH))
    seen, hooks = _watch(model.model.layers)
    samples = {name: [] for name in ("input norm", "mlp norm", "ffn", "heads", "query_groups")}
    cosines = []
    for sample in tokens.view(num_samples, 1, SEQ_LENGTH):
        with torch.no_grad():
            model(sample)
        outputs = torch.stack([seen["attention output", i][0] for i in layers])  # [L, s, n d]
        units = {
            "input norm": torch.stack([seen["input norm", i][1] for i in layers]),
            "mlp norm": torch.stack([seen["mlp norm", i][1] for i in layers]),
            "ffn": torch.stack([seen["mlp output", i][0] for i in layers]),
            "heads": outputs.unflatten(-1, (8, -1)).norm(dim=-1),
            "query_groups": outputs.unflatten(-1, (2, -1)).norm(dim=-1),
        }
        for name, x in units.items():  # [L, s, c]
            rows = x.abs().mean(1), x.norm(dim=1), x.var(1, correction=0), x.square().mean(1)
            samples[name].append(torch.stack(rows))
        cosines.append(
            torch.stack([torch.cosine_similarity(*seen["layer", i], dim=-1) for i in layers])
        )
    for hook in hooks:
        hook.remove()
    scores, scales = {}, {}
    for name, rows in samples.items():
        x = torch.stack(rows)  # [N, 4, L, c]
        mean, l2 = x.mean(0), x.norm(dim=0)
        scores[name] = torch.stack([mean, l2, x.var(0, correction=0)])[:, :3]
        scales[name] = torch.stack([mean, l2, x.square().mean(0)])[:, [0, 1, 3]]
    for found in (scores, scales):
        found["hidden"] = found.pop("input norm") + found.pop("mlp norm")
    scores["block_influence"] = 1 - torch.cat(cosines, 1).mean(1)
    return scores, scales


def _measure(parallel, directory, prefix, samples, micro_batch_size, precision="fp32"):
    scores, calibration = measure_importance(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=samples, micro_batch_size=micro_batch_size),
        parallel=parallel,
        precision=precision,
    )
    return asdict(scores), calibration


@pytest.mark.parametrize(
    ("topology", "samples", "micro_batch_size"),
    [
        ("tp1", 1024, 1),  # more than there are
        ("tp1", 7, 3),
        ("tp1", 5, 3),  # the first five alone
        ("tp2", 7, 2),
        ("tp2+sp", 7, 2),
        ("tp4", 7, 2),  # two ranks share a key/value head
        ("tp4+sp", 5, 2),
        ("pp2", 7, 1),
        ("pp2 uneven", 5, 2),
        ("dp2", 7, 2),
        ("dp2", 5, 3),
        ("tp2 pp2", 7, 2),
        ("tp2+sp pp2", 7, 2),
        ("tp2 dp2", 7, 2),
        ("pp2 dp2", 6, 4),  # the second rank's micro-batch is half padding
    ],
)
def test_scores_are_those_of_the_definition(model, tokens, topology, samples, micro_batch_size):
    directory, reference = model
    count = min(samples, NUM_SAMPLES)
    expected, scales = _definition(reference, tokens, count)
    ranks = run_on(topology, _measure, directory, tokens, samples, micro_batch_size)
    for scores, calibration in ranks:
        assert calibration.samples == count
        assert scores.keys() == expected.keys()
        for name, tensor in scores.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, ranks[0][0][name])
            if name == "block_influence":
                torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=0)
            else:
                errors = (tensor.double() - expected[name]).abs() / scales[name]
                assert (errors.amax((2, 3)) <= TOLERANCE).all(), (name, errors.amax((2, 3)))


@pytest.mark.parametrize("topology", ["tp2", "tp4+sp", "tp2+sp pp2", "dp2"])
def test_in_fp64_scores_agree_to_the_last_bit(model, tokens, topology):
    """Variances too, each relative to itself."""
    (expected, _), (found, _) = (
        run_on(ranks, _measure, model[0], tokens, NUM_SAMPLES, 2, "fp64")[0]
        for ranks in ("tp1", topology)
    )
    for name, scores in expected.items():
        torch.testing.assert_close(found[name], scores, rtol=2**-23, atol=0)


def test_files_of_one_rank_and_of_two_hold_the_same(model, tokens, tmp_path):
    """In fp64, all nine aggregations."""
    stored = []
    for topology in ("tp1", "tp2"):
        ((scores, calibration), *_) = run_on(topology, _measure, model[0], tokens, 7, 2, "fp64")
        save_scores(tmp_path, Importance(**scores), model_dir=model[0], calibration=calibration)
        stored.append(load_file(tmp_path / SCORES_FILE))
    assert stored[0].keys() == stored[1].keys()
    for name, tensor in stored[0].items():
        assert torch.equal(stored[1][name], tensor), name


@pytest.mark.parametrize(
    ("topology", "precision"),
    [
        ("pp2", "fp32"),
        ("pp2 uneven", "fp32"),
        ("dp2", "fp32"),
        ("pp2 dp2", "fp32"),
        ("pp2 dp2", "bf16"),
    ],
)
def test_without_tensor_parallelism_no_bit_differs(model, tokens, topology, precision):
    (expected, _), (found, _) = (
        run_on(ranks, _measure, model[0], tokens, NUM_SAMPLES, 2, precision)[0]
        for ranks in ("tp1", topology)
    )
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("topology", ["tp1", "tp4+sp", "tp2+sp pp2"])
def test_half_precision_costs_no_more_than_its_rounding(model, tokens, topology):
    """A bf16 number has 8 bits: scores are off from the fp32 model's by a few thousandths."""
    expected, scales = _definition(model[1], tokens, NUM_SAMPLES)
    found, _ = run_on(topology, _measure, model[0], tokens, NUM_SAMPLES, 2, "bf16")[0]
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        scale = scales.get(name, expected[name])
        errors = (tensor.double() - expected[name]).abs() / scale
        assert errors.mean() <= 0.01, name


def test_samples_of_other_aggregations_rank_differently(model, tokens):
    """What the nine tensors hold are nine different rankings, not copies."""
    scores = _definition(model[1], tokens, NUM_SAMPLES)[0]["ffn"].flatten(0, 1)
    orders = {tuple(row.argsort(stable=True).flatten().tolist()) for row in scores}
    assert len(orders) == 9


def _count(parallel, directory, prefix, samples):
    """How many collectives importance itself makes, and how many numbers it holds in the end."""
    counted, held = [], []

    def all_reduce(tensor, group=None):
        counted.append(tensor.numel())
        dist.all_reduce(tensor, group=group)

    model, batches, _ = open_calibration(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=samples),
        topology=initialize(parallel),
        precision="fp32",
    )
    finish = importance._Collector.importance

    def count_held(self, num_samples):
        assert not any(self._seen.values())
        held.append(self._blocks.numel() + sum(x.numel() for x in self._moments.values()))
        return finish(self, num_samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "dist", SimpleNamespace(all_reduce=all_reduce))
        patch.setattr(importance._Collector, "importance", count_held)
        importance.collect_importance(model, batches)
    return len(counted), held[0]


@pytest.mark.parametrize(
    ("topology", "each"), [("tp4+sp", 1), ("tp4", 1), ("tp2+sp", 1), ("tp2", 0)]
)
def test_a_micro_batch_takes_at_most_one_collective_and_no_memory(model, tokens, topology, each):
    few, many = (run_on(topology, _count, model[0], tokens, n)[0] for n in (2, 7))
    assert many[0] - few[0] == 5 * each
    assert many[1] == few[1]


def _waits(parallel, directory, prefix):
    """What hooks do that on a GPU would wait for it, and how often they are called."""
    found, calls = [], []
    model, batches, _ = open_calibration(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(),
        topology=initialize(parallel),
        precision="fp32",
    )

    def noted(name):
        read = getattr(torch.Tensor, name)

        def call(*args, **kwargs):
            found.append(name)
            return read(*args, **kwargs)

        return call

    def watched(name):
        hook = getattr(importance._Collector, name)

        def call(*args):
            calls.append(name)
            with pytest.MonkeyPatch.context() as patch:
                for read in HOST_READS:
                    patch.setattr(torch.Tensor, read, noted(read))
                return hook(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in HOOKS:
            patch.setattr(importance._Collector, name, watched(name))
        importance.collect_importance(model, batches)
    return found, {name: calls.count(name) for name in HOOKS}


@pytest.mark.parametrize("topology", ["tp1", "tp4+sp"])
def test_hooks_read_nothing_on_the_host(model, tokens, topology):
    found, calls = run_on(topology, _waits, model[0], tokens)[0]
    assert found == []
    assert list(calls.values()) == [2 * 4 * 7, 4 * 7, 4 * 7, 4 * 7, 7]


@pytest.mark.parametrize("name", ["samples", "micro_batch_size"])
def test_sizes_below_one_are_refused(name):
    message = f"importance.{name}=0 must be at least 1"
    with pytest.raises(MinitronError, match=re.escape(message)):
        ImportanceConfig(**{name: 0})
