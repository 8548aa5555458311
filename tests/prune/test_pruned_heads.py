"""Key/value heads and query heads, layer by layer, on a model whose attention is taken apart."""

import json

import pytest
import torch

from minitron.model import hf
from minitron.prune.pruning import PRUNING_FILE
from tests.prune.pruned import ARCH, best, prune
from tests.prune.scored import random_scores
from tests.tiny import VARIANTS, logits, save_llama


def attention(model, layer):
    """The three projections into heads of a layer, by head: [n, d, h], [g, d, h], [g, d, h]."""
    attn = model.model.layers[layer].self_attn
    return [p.weight.unflatten(0, (-1, 4)) for p in (attn.q_proj, attn.k_proj, attn.v_proj)]


def output_heads(model, layer):
    """The output projection of a layer by head, [h, n, d]."""
    return model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (-1, 4))


@pytest.mark.parametrize("overrides", [{"num_key_value_heads": 4}, VARIANTS["mha"]])
def test_selected_groups_equal_their_heads_alone(tmp_path, overrides):
    """Dropped groups contribute nothing: the same as a model whose other outputs are zeroed."""
    model = save_llama(tmp_path / "model", **overrides)
    arch = hf.read_architecture(tmp_path / "model")
    scores = random_scores(arch, seed=2)
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=scores, num_query_groups=2)
    share = 8 // arch.num_query_groups
    assert pruned.config.num_key_value_heads == 2
    assert pruned.config.num_attention_heads == 2 * share
    for layer in range(4):
        gone = set(range(arch.num_query_groups)) - set(best(scores.query_groups[layer].tolist(), 2))
        for group in gone:
            output_heads(model, layer).data[:, group * share : (group + 1) * share] = 0
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)


def test_averaged_groups_keep_all_query_heads(tmp_path):
    """The same as a model in which both key/value heads of a pair were set to their mean."""
    model = save_llama(tmp_path / "model", num_key_value_heads=4, attention_bias=True)
    arch = hf.read_architecture(tmp_path / "model")
    keys = {"num_query_groups": 2, "group_reduction": "mean"}
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=random_scores(arch), **keys)
    assert pruned.config.num_key_value_heads == 2
    assert pruned.config.num_attention_heads == 8
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            for parameter in (projection.weight, projection.bias):
                pairs = parameter.data.unflatten(0, (2, 2, 4))
                pairs.copy_(pairs.mean(1, keepdim=True).expand_as(pairs))
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)


def test_heads_across_groups_equal_the_same_heads_alone(tmp_path):
    model = save_llama(tmp_path / "model")
    scores = random_scores(ARCH)
    scores.heads[:] = torch.tensor([8.0, 7, 6, 5, 1, 3, 2, 4])  # the best four share a group
    keys = {"num_attention_heads": 4, "head_ranking": "across"}
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=scores, **keys)
    record = json.loads((tmp_path / "out" / PRUNING_FILE).read_text())
    assert record["heads"] == [[0, 1, 2, 3]] * 4
    assert record["query_groups"] == [[0, 0]] * 4
    assert record["merged_heads"] is record["merge_sign"] is None
    for layer in range(4):
        output_heads(model, layer).data[:, 4:] = 0
    torch.testing.assert_close(logits(pruned), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("merge", "sign"), [("plus", 1), ("minus", -1)])
def test_merged_heads_follow_the_formula(tmp_path, merge, sign):
    model = save_llama(tmp_path / "model")
    scores = random_scores(ARCH)
    scores.heads[:] = torch.tensor([8.0, 7, 6, 5, 1, 3, 2, 4])
    keys = {"num_attention_heads": 4, "merge_heads": merge}
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=scores, **keys)
    record = json.loads((tmp_path / "out" / PRUNING_FILE).read_text())
    assert record["merged_heads"] == [[3, 2, 6, 4]] * 4
    assert record["merge_sign"] == sign
    for layer in range(4):
        q, k, v = attention(model, layer)
        heads, partners = [0, 1, 5, 7], [3, 2, 6, 4]  # best with worst, second with third
        kept = q[heads] + sign * (q[heads] - q[partners])
        found = attention(pruned, layer)
        torch.testing.assert_close(found[0], kept)
        assert torch.equal(found[1], k)
        assert torch.equal(found[2], v)
        assert torch.equal(output_heads(pruned, layer), output_heads(model, layer)[:, heads])


def test_merged_heads_take_their_keys_and_values_along_where_they_share_none(tmp_path):
    model = save_llama(tmp_path / "model", **VARIANTS["mha"])
    arch = hf.read_architecture(tmp_path / "model")
    scores = random_scores(arch)
    order = torch.tensor([8.0, 7, 6, 5, 1, 3, 2, 4])
    scores.heads[:], scores.query_groups[:] = order, order
    keys = {"num_query_groups": 4, "merge_heads": "plus"}
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=scores, **keys)
    for layer in range(4):
        pairs = zip(attention(pruned, layer), attention(model, layer), strict=True)
        for found, source in pairs:
            kept, partners = source[[0, 1, 2, 3]], source[[4, 6, 5, 7]]
            torch.testing.assert_close(found, 2 * kept - partners)
