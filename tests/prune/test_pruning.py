import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minitron.model import hf
from minitron.model.weights import SINGLE_FILE
from minitron.prune.pruning import PruningPlan, plan_pruning, prune_model
from minitron.prune.target import target_shape
from minitron.prune.width import WidthPlan
from minitron.sections.prune import PruneConfig
from tests.prune.pruned import ARCH, assert_same_model, best, prune
from tests.prune.scored import random_scores
from tests.tiny import VARIANTS, logits, save_llama


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
    """Pruning to all of every axis, best first instead of in their order, changes no logit."""
    model = save_llama(tmp_path / "model", **overrides)
    arch = hf.read_architecture(tmp_path / "model")
    scores = random_scores(arch)
    groups = scores.query_groups.argsort(descending=True)  # [L, g]
    inside = scores.heads.unflatten(1, (arch.num_query_groups, -1)).argsort(descending=True)
    heads = inside + torch.arange(arch.num_query_groups)[:, None] * inside.shape[2]
    heads = heads.gather(1, groups[:, :, None].expand_as(heads)).flatten(1)
    width = WidthPlan(
        hidden=scores.hidden.sum(0).argsort(descending=True),
        ffn=scores.ffn.argsort(descending=True),
        heads=heads,
        groups=groups,
        kv_channels=arch.kv_channels,
    )
    (tmp_path / "sorted").mkdir()
    plan = PruningPlan(target=arch, layers=tuple(range(arch.num_layers)), width=width)
    prune_model(tmp_path / "model", tmp_path / "sorted", plan)
    found, report = LlamaForCausalLM.from_pretrained(
        tmp_path / "sorted", output_loading_info=True, dtype="auto"
    )
    assert not any(report.values())
    moved = found.state_dict()
    matrices = {name: t for name, t in model.state_dict().items() if t.dim() == 2}
    assert not any(torch.equal(moved[name], tensor) for name, tensor in matrices.items())
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)


def test_width_in_two_steps_equals_one_step(tmp_path):
    save_llama(tmp_path / "model", head_dim=4)
    scores = random_scores(ARCH)
    middle = {"hidden_size": 24, "ffn_hidden_size": 30, "num_attention_heads": 4}
    last = {"hidden_size": 16, "ffn_hidden_size": 12, "num_attention_heads": 2}
    arch = target_shape(PruneConfig(**middle), ARCH)
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
