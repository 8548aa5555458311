"""Our Llama against transformers': logits, weights on disk and gradients, on every topology."""

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from minitron.errors import MinitronError
from minitron.model import hf, sharding
from minitron.model.llama import build_llama, check_parallel
from minitron.model.sharding import open_model, save_model
from minitron.model.weights import INDEX_FILE, WeightWriter
from minitron.parallel import initialize
from minitron.sections.parallel import ParallelConfig
from tests.model.round_trip import (
    assert_same_tensors,
    batch_of,
    check_round_trip,
    logits_and_copies,
)
from tests.runs import VOCAB, load_tensors, run_on, save_gradients
from tests.tiny import VARIANTS, random_llama, save_llama, tiny_config

SHAPES = {name: {"vocab_size": VOCAB, **variant} for name, variant in VARIANTS.items()} | {
    "small vocabulary": {"vocab_size": 61},  # the first tensor-parallel rank has all of it
    # Wavelengths below, between and above the limits; no factor is a default of megatron-core's.
    "rope factors": {
        "vocab_size": VOCAB,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 2.0,
            "high_freq_factor": 6.0,
            "original_max_position_embeddings": 96,
        },
    },
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Every shape: its directory and the model that transformers saved there."""
    root = tmp_path_factory.mktemp("models")
    return {name: (root / name, save_llama(root / name, **shape)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(
    "topology", ["tp1", "tp2", "tp2+sp", "tp4", "tp4+sp", "pp2", "pp2 uneven", "tp2+sp pp2"]
)
def test_logits_and_weights_are_those_of_transformers(models, tmp_path, topology):
    directories = [directory for directory, _ in models.values()]
    ranks = run_on(topology, logits_and_copies, directories, tmp_path)
    for directory, model in models.values():
        check_round_trip(directory, model, ranks, tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "everything")
    _, model = models["everything"]
    tokens = batch_of(VOCAB).tokens
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def _copy(parallel, directory, out, dtype, max_shard_bytes):
    topology = initialize(parallel)
    arch, weights = open_model(directory)
    model = build_llama(arch, topology, weights, dtype=dtype)
    out.mkdir(exist_ok=True)
    writer = functools.partial(WeightWriter, max_shard_bytes=max_shard_bytes)
    with mock.patch.object(sharding, "WeightWriter", writer):
        save_model([model], out, dtype=hf.read_dtype(directory), base_dir=directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("topology", ["tp1", "tp4", "tp2+sp pp2"])
def test_bf16_weights_in_many_shards_come_back_bit_for_bit(tmp_path, topology, dtype):
    source, copy = tmp_path / "source", tmp_path / "copy"
    model = random_llama(tiny_config(**SHAPES["attention_bias"])).to(torch.bfloat16)
    model.save_pretrained(source, max_shard_size="20KB")
    run_on(topology, _copy, source, copy, dtype, 6_000)
    assert_same_tensors(source, copy)
    shards = [len(list(d.glob("*.safetensors"))) for d in (source, copy)]
    assert 2 < shards[0] < shards[1]
    assert (copy / INDEX_FILE).exists()


def _gradients(parallel, directory, out, recompute):
    topology = initialize(parallel)
    arch, weights = open_model(directory)
    model = build_llama(arch, topology, weights, dtype=torch.float32, recompute=recompute)
    batch = batch_of(arch.vocab_size)
    logits = model.logits(model.hidden_states(batch.tokens, batch.position_ids))
    F.cross_entropy(
        logits[..., : arch.vocab_size].flatten(0, 1), batch.labels.t().flatten()
    ).backward()
    save_gradients([model], out)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["everything", "head_dim"])
def test_gradients_are_those_of_transformers(models, tmp_path, name, recompute):
    directory, model = models[name]
    run_on("tp1", _gradients, directory, tmp_path, recompute)
    batch = batch_of(VOCAB)
    model.zero_grad()
    F.cross_entropy(model(batch.tokens).logits.flatten(0, 1), batch.labels.flatten()).backward()
    found = load_tensors(tmp_path)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.count_nonzero() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)


ARCH = hf.architecture_from_config(
    tiny_config(
        hidden_size=48, num_attention_heads=12, num_key_value_heads=3, intermediate_size=50
    ).to_dict()
)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"tensor_model_parallel_size": 8},
            "num_attention_heads=12 is not divisible by parallel.tensor_model_parallel_size=8; "
            "use 1, 2, 3, 4, 6 or 12",
        ),
        (
            {"tensor_model_parallel_size": 4},
            "ffn_hidden_size=50 is not divisible by parallel.tensor_model_parallel_size=4; "
            "use 1, 2, 5, 10, 25 or 50",
        ),
        (
            {"tensor_model_parallel_size": 2},
            "num_query_groups=3 is neither a multiple nor a divisor of "
            "parallel.tensor_model_parallel_size=2; use 1 or 3",
        ),
        (
            {"pipeline_model_parallel_size": 5},
            "4 layers do not fill parallel.pipeline_model_parallel_size=5 stages; use at most 4",
        ),
        (
            {"pipeline_model_parallel_size": 2, "layers_per_stage": [3, 2]},
            "parallel.layers_per_stage=[3, 2] adds up to 5 layers, the model has 4, "
            "and no stage may be empty",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(parallel, message):
    with pytest.raises(MinitronError) as caught:
        check_parallel(ARCH, ParallelConfig(**parallel))
    assert str(caught.value) == message
