import dataclasses
import itertools

import pytest
import torch

from minitron.model import hf
from minitron.model.initial import InitialWeights
from tests.tiny import tiny_config

SMALL = hf.architecture_from_config(tiny_config().to_dict())


def test_initial_weights_follow_the_seed_and_the_name():
    arch = dataclasses.replace(SMALL, add_mlp_bias=True, add_qkv_bias=True)
    first, again, other = (InitialWeights(arch, seed=seed) for seed in (1, 1, 2))
    names = list(first.infos)
    forwards = {name: first.read(name) for name in names}
    torch.manual_seed(5)  # the global generator has no say
    for name in reversed(names):  # nor has the order of reading
        assert torch.equal(again.read(name), forwards[name])
        assert forwards[name].shape == hf.tensor_infos(arch, torch.float32)[name].shape
    matrices = {name: t for name, t in forwards.items() if t.dim() == 2}
    assert not any(torch.equal(other.read(name), t) for name, t in matrices.items())
    pairs = list(itertools.combinations(matrices.values(), 2))
    assert any(a.shape == b.shape for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_a_slice_of_initial_weights_is_a_slice_of_the_whole():
    weights = InitialWeights(dataclasses.replace(SMALL, add_mlp_bias=True), seed=3)
    name = hf.layer_tensor(2, "mlp.down_proj.weight")
    assert torch.equal(
        weights.read(name, slice(4, 8), slice(10, 20)), weights.read(name)[4:8, 10:20]
    )
    assert weights.read(hf.FINAL_NORM, slice(3, 9)).shape == (6,)
    assert weights.read(hf.layer_tensor(0, "mlp.up_proj.bias"), slice(0, 5)).shape == (5,)


def test_initial_weights_have_the_documented_statistics():
    arch = dataclasses.replace(
        SMALL, hidden_size=256, ffn_hidden_size=512, add_qkv_bias=True, num_layers=8
    )
    weights = InitialWeights(arch, seed=0, init_method_std=0.05)
    for name in weights.infos:
        tensor = weights.read(name)
        if name.endswith(".bias"):
            assert torch.equal(tensor, torch.zeros_like(tensor))
        elif "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        else:
            into_residual = "o_proj" in name or "down_proj" in name
            expected = 0.05 / 4 if into_residual else 0.05  # sqrt(2 * 8 layers) = 4
            assert tensor.std().item() == pytest.approx(expected, rel=0.05)
            assert abs(tensor.mean().item()) < expected / 10
