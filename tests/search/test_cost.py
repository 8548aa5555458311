"""Memory against tensors counted one by one; latency as a sum of what was timed."""

import pytest
import torch

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.search import cost
from minitron.search.cost import LatencyMeter, memory_gb
from minitron.sections.search import DeploymentConfig
from tests.search.test_space import LLAMA_8B
from tests.tiny import save_llama, tiny_config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_is_that_of_the_tensors_and_the_cache(tmp_path, tied, dtype):
    model = save_llama(tmp_path, tie_word_embeddings=tied, num_key_value_heads=4)
    weights = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        cache = model(torch.zeros(3, 17, dtype=torch.long), use_cache=True).past_key_values
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    use = DeploymentConfig(dtype=dtype, batch_size=3, context=17, generated=5)
    found = memory_gb(hf.read_architecture(tmp_path), use)
    size = {"fp32": 4, "bf16": 2}[dtype]
    assert found == pytest.approx(size * (weights + cached) / 1e9, rel=1e-12)


def test_memory_of_llama_8b():
    """16.06 GB of bf16 weights, and the 128 KiB a token that everybody quotes."""
    use = DeploymentConfig(batch_size=1, context=8192)
    expected = 2 * 8_030_261_248 + 8192 * 128 * 1024
    assert memory_gb(LLAMA_8B, use) == pytest.approx(expected / 1e9, rel=1e-12)


def test_latency_is_the_sum_of_its_layers_each_width_timed_once(monkeypatch):
    config = tiny_config()
    arch = hf.architecture_from_config(config.to_dict())
    shapes = []

    def clock(run):
        shapes.append(tuple(run().shape))
        return {1: 10.0, 2: 1.0, 0: 0.1}[len(shapes) % 3]  # prompt, token, head

    monkeypatch.setattr(cost, "_median_seconds", clock)
    use = DeploymentConfig(dtype="fp32", batch_size=2, context=24, generated=4)
    meter = LatencyMeter(use)
    assert meter.seconds(arch) == pytest.approx(4 * (10.0 + 3 * 1.0) + 4 * 0.1)
    assert shapes == [(2, 20, 32), (2, 1, 32), (2, 61)]
    shallow = hf.architecture_from_config({**config.to_dict(), "num_hidden_layers": 1})
    assert meter.seconds(shallow) == pytest.approx(10.0 + 3 * 1.0 + 4 * 0.1)
    assert len(shapes) == 3


def test_a_token_attends_to_the_whole_cache_and_a_prompt_only_back():
    """Against transformers, without RoPE: positions are all zero."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = tiny_config(attn_implementation="eager", rms_norm_eps=torch.finfo(torch.float32).eps)
    reference = LlamaDecoderLayer(config, 0).eval()
    arch = hf.architecture_from_config(config.to_dict())
    layer = cost._Layer(arch, lambda *shape: torch.empty(shape))
    attention, mlp = reference.self_attn, reference.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    layer._qkv = torch.cat([p.weight for p in projections])
    layer._proj = attention.o_proj.weight
    layer._fc1 = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    layer._fc2 = mlp.down_proj.weight
    layer._norms = torch.ones(2, 32)
    x = torch.randn(2, 7, 32)
    nowhere = LlamaRotaryEmbedding(config)(x, torch.zeros(2, 7, dtype=torch.long))
    mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = reference(x, attention_mask=mask, position_embeddings=nowhere)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert torch.allclose(layer(x), expected, atol=1e-5)
        normed = torch.nn.functional.rms_norm(x, (32,))
        cache = tuple(p(normed).unflatten(2, (2, 4)).transpose(1, 2) for p in projections[1:])
        assert torch.allclose(layer(x[:, -1:], cache=cache), expected[:, -1:], atol=1e-5)


def test_a_clock_runs():
    arch = hf.architecture_from_config(tiny_config().to_dict())
    use = DeploymentConfig(context=16, generated=2)
    assert 0 < LatencyMeter(use).seconds(arch) < 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "deployment.batch_size=0 must be at least 1"),
        (
            {"context": 64, "generated": 64},
            "deployment.generated=64 must be at least 1 and below deployment.context=64, which "
            "holds the prompt too",
        ),
        (
            {"generated": 0},
            "deployment.generated=0 must be at least 1 and below deployment.context=4096, which "
            "holds the prompt too",
        ),
    ],
)
def test_uses_that_make_no_sense_are_refused(values, message):
    with pytest.raises(MinitronError) as caught:
        DeploymentConfig(**values)
    assert str(caught.value) == message
