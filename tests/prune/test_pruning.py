import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.weights import INDEX_FILE, SINGLE_FILE, WeightWriter
from minitron.prune.pruning import (
    PRUNING_FILE,
    plan_pruning,
    prune_model,
)
from minitron.prune.target import PruneConfig
from tests.prune.scored import random_scores
from tests.tiny import VARIANTS, logits, save_llama, tiny_config

ARCH = hf.architecture_from_config(tiny_config().to_dict())  # 4 layers, 32, 48, 8 heads, 2 groups


def prune(source, out, *, scores=None, **keys):
    """What the launcher does, without its recipe; returns the pruned model of transformers."""
    config = PruneConfig(**keys)
    arch = hf.read_architecture(source)
    how = {k: v for k, v in keys.items() if k in ("head_ranking", "group_reduction", "merge_heads")}
    plan = plan_pruning(arch, config.target(arch), scores, config.drop_layers, **how)
    out.mkdir()
    prune_model(source, out, plan)
    model, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not any(report.values())
    return model


def best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def prune_by_hand(model, scores, layers, hidden, ffn, heads):
    """An independent pruner: indexes a state dict, knowing each tensor by its name."""
    config = model.config
    d, groups = config.head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    channels = best(scores.hidden.double().sum(0).tolist(), hidden)
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            state[name] = tensor[..., channels]  # embedding, head, final norm
            continue
        old, suffix = name.removeprefix("model.layers.").split(".", 1)
        if int(old) not in layers:
            continue
        neurons = best(scores.ffn[int(old)].tolist(), ffn)
        rows = []
        for group in range(groups):
            first = group * per_group
            ranked = scores.heads[int(old)][first : first + per_group].tolist()
            for head in best(ranked, heads // groups):
                rows += range((first + head) * d, (first + head + 1) * d)
        kind = suffix.rsplit(".", 1)[1]
        if "norm" in suffix or suffix in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
            tensor = tensor[channels]
        elif "q_proj" in suffix:
            tensor = tensor[rows][:, channels] if kind == "weight" else tensor[rows]
        elif "k_proj" in suffix or "v_proj" in suffix:
            tensor = tensor[:, channels] if kind == "weight" else tensor
        elif "o_proj" in suffix:
            tensor = tensor[channels][:, rows]
        elif "down_proj" in suffix:
            tensor = tensor[channels][:, neurons]
        else:
            tensor = tensor[neurons][:, channels] if kind == "weight" else tensor[neurons]
        state[f"model.layers.{layers.index(int(old))}.{suffix}"] = tensor
    smaller = LlamaConfig(
        **config.to_dict()
        | {
            "hidden_size": hidden,
            "intermediate_size": ffn,
            "num_attention_heads": heads,
            "num_hidden_layers": len(layers),
        }
    )
    result = LlamaForCausalLM(smaller).eval()
    result.load_state_dict(state)
    return result


def assert_same_model(found, expected):
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(logits(found), logits(expected))


# Against transformers.


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_width_equals_a_model_sliced_by_hand(tmp_path, overrides, shard):
    overrides = {"head_dim": 4} | overrides
    model = save_llama(tmp_path / "model", shard=shard, **overrides)
    arch = hf.read_architecture(tmp_path / "model")
    scores = random_scores(arch)
    heads = 8 if arch.num_query_groups == 8 else 4
    pruned = prune(
        tmp_path / "model",
        tmp_path / "out",
        scores=scores,
        hidden_size=24,
        ffn_hidden_size=29,
        num_attention_heads=heads,
    )
    assert_same_model(pruned, prune_by_hand(model, scores, [0, 1, 2, 3], 24, 29, heads))


@pytest.mark.parametrize(
    ("sizes", "by_hand"),
    [
        ({"hidden_size": 16}, (16, 48, 8)),
        ({"ffn_hidden_size": 1}, (32, 1, 8)),
        ({"num_attention_heads": 2}, (32, 48, 2)),
    ],
)
def test_one_axis_alone(tmp_path, sizes, by_hand):
    model = save_llama(tmp_path / "model")
    scores = random_scores(ARCH, seed=3)
    pruned = prune(tmp_path / "model", tmp_path / "out", scores=scores, **sizes)
    expected = prune_by_hand(model, scores, [0, 1, 2, 3], *by_hand)
    expected.config.head_dim = 4
    assert_same_model(pruned, expected)


def test_depth_and_width_together(tmp_path):
    """Channels are ranked by all layers; neurons and heads are those of the kept layers."""
    model = save_llama(tmp_path / "model", head_dim=4)
    scores = random_scores(ARCH)
    scores.hidden[2] *= 10  # the dropped layer decides which channels stay
    sizes = {"hidden_size": 16, "ffn_hidden_size": 20, "num_attention_heads": 4}
    pruned = prune(
        tmp_path / "model", tmp_path / "explicit", scores=scores, drop_layers=[3], **sizes
    )
    assert_same_model(pruned, prune_by_hand(model, scores, [0, 1, 3], 16, 20, 4))
    scores.block_influence[:] = torch.tensor([0.2, 0.4, 0.1, 0.3])
    ranked = prune(tmp_path / "model", tmp_path / "ranked", scores=scores, num_layers=3, **sizes)
    assert_same_model(ranked, pruned)


@pytest.mark.parametrize("drop_layers", [[1], [4], [2, 3], [3, 1]])
def test_dropped_layers_equal_the_model_with_them_taken_out(tmp_path, drop_layers):
    model = save_llama(tmp_path / "model", attention_bias=True)
    pruned = prune(tmp_path / "model", tmp_path / "out", drop_layers=drop_layers)
    for layer in sorted(drop_layers, reverse=True):
        del model.model.layers[layer - 1]
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    model.config.num_hidden_layers = len(model.model.layers)
    assert torch.equal(logits(pruned), logits(model))


# Key/value heads and query heads, layer by layer, on a model whose attention is taken apart.


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


# Properties.


@pytest.mark.parametrize("overrides", [VARIANTS["gqa"], VARIANTS["everything"]])
def test_pruning_to_the_same_size_is_the_identity(tmp_path, overrides):
    save_llama(tmp_path / "model", **overrides)
    arch = hf.read_architecture(tmp_path / "model")
    prune(
        tmp_path / "model",
        tmp_path / "out",
        scores=random_scores(arch),
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=8,
        num_layers=4,
    )
    before = load_file(tmp_path / "model" / SINGLE_FILE)
    after = load_file(tmp_path / "out" / SINGLE_FILE)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_positions_of_the_source_do_not_matter(tmp_path):
    """Permuting neurons together with their scores gives the same neurons in another order."""
    save_llama(tmp_path / "model")
    (tmp_path / "permuted").mkdir()
    scores = random_scores(ARCH)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    tensors = load_file(tmp_path / "model" / SINGLE_FILE)
    for name, tensor in tensors.items():
        if "gate_proj" in name or "up_proj" in name:
            tensors[name] = tensor[order].contiguous()
        elif "down_proj" in name:
            tensors[name] = tensor[:, order].contiguous()
    save_file(tensors, tmp_path / "permuted" / SINGLE_FILE)
    config = (tmp_path / "model" / hf.CONFIG_FILE).read_text()
    (tmp_path / "permuted" / hf.CONFIG_FILE).write_text(config)
    permuted = dataclasses.replace(scores, ffn=scores.ffn[:, order])
    first = prune(tmp_path / "model", tmp_path / "1", scores=scores, ffn_hidden_size=20)
    second = prune(tmp_path / "permuted", tmp_path / "2", scores=permuted, ffn_hidden_size=20)
    torch.testing.assert_close(logits(first), logits(second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overrides", [VARIANTS["gqa"], VARIANTS["everything"]])
def test_sorting_by_importance_leaves_the_function_as_it_was(tmp_path, overrides):
    """Permuting every axis by its scores, best first, and its weights along, changes no logit."""
    model = save_llama(tmp_path / "model", **overrides)
    arch = hf.read_architecture(tmp_path / "model")
    scores = random_scores(arch)
    d, groups = arch.kv_channels, arch.num_query_groups

    def channels(heads):
        return (heads[:, None] * d + torch.arange(d)).flatten()

    hidden = scores.hidden.sum(0).argsort(descending=True)
    state = load_file(tmp_path / "model" / SINGLE_FILE)
    axes = hf.tensor_axes(arch)
    for name, tensor in state.items():
        layer, _ = hf.split_layer_tensor(name)
        if layer is None:
            state[name] = tensor[..., hidden]
            continue
        group = scores.query_groups[layer].argsort(descending=True)
        inside = scores.heads[layer].view(groups, -1).argsort(descending=True)
        heads = (inside + torch.arange(groups)[:, None] * inside.shape[1])[group].flatten()
        order = {
            "hidden": hidden,
            "ffn": scores.ffn[layer].argsort(descending=True),
            "query": channels(heads),
            "kv": channels(group),
        }
        for dim, axis in enumerate(axes[name]):
            tensor = tensor.index_select(dim, order[axis])
        state[name] = tensor.contiguous()
    before = logits(model)
    model.load_state_dict(state, strict=False)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_width_in_two_steps_equals_one_step(tmp_path):
    save_llama(tmp_path / "model", head_dim=4)
    scores = random_scores(ARCH)
    middle = {"hidden_size": 24, "ffn_hidden_size": 30, "num_attention_heads": 4}
    last = {"hidden_size": 16, "ffn_hidden_size": 12, "num_attention_heads": 2}
    arch = PruneConfig(**middle).target(ARCH)
    width = plan_pruning(ARCH, arch, scores).width
    kept = dataclasses.replace(
        scores,
        hidden=scores.hidden[:, width.hidden],
        ffn=scores.ffn.gather(1, width.ffn),
        heads=scores.heads.gather(1, width.heads),
    )
    prune(tmp_path / "model", tmp_path / "middle", scores=scores, **middle)
    config = json.loads((tmp_path / "middle" / hf.CONFIG_FILE).read_text())
    assert config["num_attention_heads"] == 4
    twice = prune(tmp_path / "middle", tmp_path / "twice", scores=kept, **last)
    once = prune(tmp_path / "model", tmp_path / "once", scores=scores, **last)
    assert_same_model(twice, once)


def test_every_tensor_keeps_its_dtype(tmp_path):
    model = save_llama(tmp_path / "model").bfloat16()
    tensors = {
        name: tensor.float() if "norm" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(tensors, tmp_path / "model" / SINGLE_FILE)
    prune(tmp_path / "model", tmp_path / "out", scores=random_scores(ARCH), hidden_size=8)
    pruned = load_file(tmp_path / "out" / SINGLE_FILE)
    assert {name: t.dtype for name, t in pruned.items()} == {n: t.dtype for n, t in tensors.items()}
    config = json.loads((tmp_path / "out" / hf.CONFIG_FILE).read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"


def test_the_rest_of_the_directory(tmp_path):
    save_llama(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"\xfftokenizer\r\n")
    scores = random_scores(ARCH)
    prune(
        tmp_path / "model",
        tmp_path / "out",
        scores=scores,
        num_attention_heads=4,
        ffn_hidden_size=9,
        drop_layers=[2],
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"\xfftokenizer\r\n"
    config = json.loads((tmp_path / "out" / hf.CONFIG_FILE).read_text())
    assert config["eos_token_id"] == [2, 7]
    assert config["head_dim"] == 4
    record = json.loads((tmp_path / "out" / PRUNING_FILE).read_text())
    assert record["layers"] == [0, 2, 3]
    assert record["hidden"] is None
    assert [len(row) for row in record["ffn"]] == [9, 9, 9]
    before = load_file(tmp_path / "model" / SINGLE_FILE)
    after = load_file(tmp_path / "out" / SINGLE_FILE)
    for new, old in enumerate(record["layers"]):
        name = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(after[name.format(new)], before[name.format(old)][record["ffn"][new]])
        heads = before[f"model.layers.{old}.self_attn.q_proj.weight"].view(8, 4, 32)
        kept = after[f"model.layers.{new}.self_attn.q_proj.weight"].view(4, 4, 32)
        assert torch.equal(kept, heads[record["heads"][new]])


def test_dropped_layers_are_not_read(tmp_path):
    """A model whose dropped layers are broken can be repaired by dropping them."""
    save_llama(tmp_path / "model")
    break_tensor(tmp_path / "model", "model.layers.1.mlp.up_proj.weight", float("nan"))
    prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_a_disk_that_loses_what_was_written(tmp_path, monkeypatch):
    save_llama(tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    write = WeightWriter.write

    def lose(self, tensor_name, tensor):
        write(self, tensor_name, tensor.roll(1, 0) if tensor_name == name else tensor)

    monkeypatch.setattr(WeightWriter, "write", lose)
    with pytest.raises(MinitronError, match=f"out: {name} does not hold what was written"):
        prune(tmp_path / "model", tmp_path / "out", scores=random_scores(ARCH), hidden_size=8)


# Broken sources.


def break_tensor(directory, name, value):
    tensors = load_file(directory / SINGLE_FILE)
    tensors[name][...] = value
    save_file(tensors, directory / SINGLE_FILE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tensor_that_is_not_finite(tmp_path, value):
    save_llama(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / SINGLE_FILE)
    tensors["lm_head.weight"][3, 4] = value
    save_file(tensors, tmp_path / "model" / SINGLE_FILE)
    with pytest.raises(MinitronError, match=r"model: lm_head.weight holds NaN or infinity"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_tensor_of_zeros(tmp_path):
    save_llama(tmp_path / "model")
    break_tensor(tmp_path / "model", "model.layers.3.mlp.up_proj.weight", 0.0)
    with pytest.raises(MinitronError, match=r"kept of model.layers.3.mlp.up_proj.weight is all ze"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_biases_may_be_zero(tmp_path):
    save_llama(tmp_path / "model", mlp_bias=True)
    break_tensor(tmp_path / "model", "model.layers.3.mlp.up_proj.bias", 0.0)
    prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_missing_shard(tmp_path):
    save_llama(tmp_path / "model", shard="20KB")
    index = json.loads((tmp_path / "model" / INDEX_FILE).read_text())
    (tmp_path / "model" / index["weight_map"]["model.norm.weight"]).unlink()
    with pytest.raises(MinitronError, match="is missing; restore the file"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])


def test_flipped_bit_in_a_model_with_a_manifest(tmp_path):
    save_llama(tmp_path / "model")
    artifact.write_manifest(tmp_path / "model", stage="train", recipe={}, parents={})
    path = tmp_path / "model" / SINGLE_FILE
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(MinitronError, match=r"model.safetensors does not match its SHA-256"):
        prune(tmp_path / "model", tmp_path / "out", drop_layers=[2])
