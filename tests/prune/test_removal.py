"""What scores claim against what happens: every channel, neuron, head, group is really taken out.

With down-projections of unit columns and orthogonal output projections, the L2 norm over samples
and sequence of a unit's activations is how far its layer's output moves when the unit goes. With
unit columns in all that reads a norm, a channel's is how far these readers' outputs move.
"""

import itertools

import pytest
import torch
from transformers import LlamaForCausalLM

from minitron.data.indexed import TokenStream
from minitron.model import hf
from minitron.prune.importance import measure_importance
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.target import target_shape
from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import ImportanceConfig, PruneConfig
from tests.runs import SEQ_LENGTH, VOCAB, run_on, write_tokens
from tests.tiny import random_llama, tiny_config

SAMPLES = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model whose layers have one silent neuron and one silent group, its tokens, its scores."""
    directory = tmp_path_factory.mktemp("world")
    model = random_llama(tiny_config(vocab_size=VOCAB))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight /= layer.mlp.down_proj.weight.norm(dim=0)
            torch.nn.init.orthogonal_(layer.self_attn.o_proj.weight)
            layer.mlp.gate_proj.weight[5] = 0
            layer.self_attn.v_proj.weight[:4] = 0
            for readers in readers_of_norms(layer):
                columns = torch.cat([reader.weight for reader in readers]).norm(dim=0)
                for reader in readers:
                    reader.weight /= columns
    model.save_pretrained(directory / "model")
    prefix = write_tokens(directory / "tokens", SAMPLES * SEQ_LENGTH + 1)
    (measured,) = run_on("tp1", _measure, directory / "model", prefix)
    return directory, model, measured


def readers_of_norms(layer):
    """The matrices that read each of a layer's norms."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]


def _measure(parallel: ParallelConfig, directory, prefix):
    measured, _ = measure_importance(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=SAMPLES),
        parallel=parallel,
        precision="fp32",
    )
    return measured


def movements(model, tokens, watched, projections, width):
    """How far the outputs of modules move when columns of projections go, `width` at a time."""
    outputs = []
    handles = [
        module.register_forward_hook(
            lambda _, args, output: outputs.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for module in watched
    ]

    def run():
        outputs.clear()
        model(tokens)
        return torch.cat(outputs, -1).double()

    moved = []
    with torch.no_grad():
        before = run()
        for first in range(0, projections[0].in_features, width):
            kept = [projection.weight.clone() for projection in projections]
            for projection in projections:
                projection.weight[:, first : first + width] = 0
            moved.append((run() - before).norm().float())
            for projection, weight in zip(projections, kept, strict=True):
                projection.weight.copy_(weight)
    for handle in handles:
        handle.remove()
    return torch.stack(moved)


@pytest.mark.parametrize("axis", ["hidden", "ffn", "heads", "query_groups"])
def test_scores_are_what_removal_costs_the_layer(world, axis):
    directory, model, measured = world
    tokens = torch.from_numpy(TokenStream(directory / "tokens").read(0, SAMPLES * SEQ_LENGTH))
    tokens = tokens.view(SAMPLES, SEQ_LENGTH)
    scores = getattr(measured.scores("l2", "l2"), axis)
    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        removals = {
            "hidden": [(readers, readers, 1) for readers in readers_of_norms(layer)],
            "ffn": [([mlp], [mlp.down_proj], 1)],
            "heads": [([attention], [attention.o_proj], 4)],
            "query_groups": [([attention], [attention.o_proj], 16)],
        }
        moved = sum(movements(model, tokens, *removal) for removal in removals[axis])
        torch.testing.assert_close(scores[i], moved, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"ffn_hidden_size": 47}, {"num_query_groups": 1}])
def test_what_contributes_nothing_goes_first_and_is_not_missed(world, tmp_path, sizes):
    directory, model, measured = world
    arch = hf.read_architecture(directory / "model")
    for batch in ("mean", "l2", "var"):
        for sequence in ("mean", "l2", "var"):
            scores = measured.scores(batch, sequence)
            assert scores.ffn.argmin(1).tolist() == [5] * 4
            assert scores.query_groups.argmin(1).tolist() == [0] * 4
    plan = plan_pruning(arch, target_shape(PruneConfig(**sizes), arch), measured.scores())
    prune_model(directory / "model", tmp_path, plan)
    tokens = torch.arange(SEQ_LENGTH)[None]
    with torch.no_grad():
        found = LlamaForCausalLM.from_pretrained(tmp_path)(tokens).logits
        expected = model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_channels_that_stay_zero_go_first_and_are_not_missed(tmp_path):
    """Without them a norm divides by fewer channels, which is all that differs."""
    dead, num_dead = torch.tensor([3, 4, 9, 14, 15, 16, 22, 31]), 8
    model = random_llama(tiny_config(vocab_size=VOCAB, rms_norm_eps=1e-12))
    with torch.no_grad():
        model.model.embed_tokens.weight[:, dead] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[dead] = 0
            layer.mlp.down_proj.weight[dead] = 0
    model.save_pretrained(tmp_path / "model")
    prefix = write_tokens(tmp_path / "tokens", SAMPLES * SEQ_LENGTH + 1)
    (measured,) = run_on("tp1", _measure, tmp_path / "model", prefix)
    arch = hf.read_architecture(tmp_path / "model")
    target = target_shape(PruneConfig(hidden_size=32 - num_dead), arch)
    for aggregations in itertools.product(("mean", "l2", "var"), repeat=2):
        scores = measured.scores(*aggregations)
        total = scores.hidden.sum(0)
        assert total.argsort(stable=True)[:num_dead].sort().values.tolist() == dead.tolist()
    (tmp_path / "pruned").mkdir()
    prune_model(tmp_path / "model", tmp_path / "pruned", plan_pruning(arch, target, scores))
    tokens = torch.arange(SEQ_LENGTH)[None]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight *= (1 - num_dead / 32) ** 0.5
        found = LlamaForCausalLM.from_pretrained(tmp_path / "pruned")(tokens).logits
        torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)
