"""Scores without activations, against norms taken from transformers' modules."""

import dataclasses

import torch

from minitron.model import hf
from minitron.prune.baselines import baseline_scores
from minitron.prune.scores import check_scores
from minitron.prune.width import plan_width
from tests.tiny import save_llama, tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())


def test_magnitude_is_the_norm_of_all_weights_of_a_unit(tmp_path):
    model = save_llama(tmp_path, attention_bias=True, mlp_bias=True)
    arch = hf.read_architecture(tmp_path)
    scores = baseline_scores("magnitude", arch, seed=0, weights=hf.open_weights(tmp_path, arch))
    check_scores(scores, arch)
    for i, layer in enumerate(model.model.layers):
        mlp, attn = layer.mlp, layer.self_attn
        neuron = torch.cat(
            [
                mlp.gate_proj.weight[7],
                mlp.up_proj.weight[7],
                mlp.down_proj.weight[:, 7],
                mlp.gate_proj.bias[7:8],
                mlp.up_proj.bias[7:8],
            ]
        )
        rows = slice(3 * 4, 4 * 4)
        head = [attn.q_proj.weight[rows], attn.q_proj.bias[rows], attn.o_proj.weight[:, rows]]
        group = [p.weight[4:] for p in (attn.k_proj, attn.v_proj)]
        group += [p.bias[4:] for p in (attn.k_proj, attn.v_proj)]
        inputs = (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj)
        outputs = (attn.o_proj, mlp.down_proj)
        channel = [p.weight[:, 5] for p in inputs] + [p.weight[5] for p in outputs]
        channel += [p.bias[5:6] for p in outputs]
        channel += [layer.input_layernorm.weight[5:6], layer.post_attention_layernorm.weight[5:6]]
        for found, expected in (
            (scores.ffn[i, 7], [neuron]),
            (scores.heads[i, 3], head),
            (scores.query_groups[i, 1], group),
            (scores.hidden[i, 5], channel),
            (scores.block_influence[i], list(layer.parameters())),
        ):
            flat = torch.cat([part.detach().flatten() for part in expected])
            torch.testing.assert_close(found, flat.norm())


def test_first_keeps_the_first():
    scores = baseline_scores("first", ARCH, seed=0)
    check_scores(scores, ARCH)
    target = dataclasses.replace(ARCH, hidden_size=16, ffn_hidden_size=5, num_attention_heads=4)
    plan = plan_width(ARCH, target, scores)
    assert plan.hidden.tolist() == list(range(16))
    assert plan.ffn.tolist() == [list(range(5))] * 4
    assert plan.heads.tolist() == [[0, 1, 4, 5]] * 4


def test_random_follows_the_seed():
    draws = [baseline_scores("random", ARCH, seed=seed) for seed in (1, 1, 2)]
    for scores in draws:
        check_scores(scores, ARCH)
    assert torch.equal(draws[0].ffn, draws[1].ffn)
    assert not torch.equal(draws[0].ffn, draws[2].ffn)
