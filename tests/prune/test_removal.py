"""What scores claim against what happens: every neuron, head and group is really taken out.

With down-projections of unit columns and orthogonal output projections, the L2 norm over samples
and sequence of a unit's activations is how far its layer's output moves when the unit goes.
"""

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
    model.save_pretrained(directory / "model")
    prefix = write_tokens(directory / "tokens", SAMPLES * SEQ_LENGTH + 1)
    (measured,) = run_on("tp1", _measure, directory / "model", prefix)
    return directory, model, measured


def _measure(parallel: ParallelConfig, directory, prefix):
    measured, _ = measure_importance(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=SAMPLES),
        parallel=parallel,
        precision="fp32",
    )
    return measured


def movement(model, tokens, module, projection, columns):
    """How far a module's output moves when columns of its projection go."""
    outputs = []
    handle = module.register_forward_hook(
        lambda _, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    kept = projection.weight.detach().clone()
    with torch.no_grad():
        model(tokens)
        projection.weight[:, columns] = 0
        model(tokens)
        projection.weight.copy_(kept)
    handle.remove()
    return (outputs[1] - outputs[0]).double().norm().float()


@pytest.mark.parametrize(
    ("axis", "size", "wide"), [("ffn", 48, 1), ("heads", 8, 4), ("query_groups", 2, 16)]
)
def test_scores_are_what_removal_costs_the_layer(world, axis, size, wide):
    directory, model, measured = world
    tokens = torch.from_numpy(TokenStream(directory / "tokens").read(0, SAMPLES * SEQ_LENGTH))
    tokens = tokens.view(SAMPLES, SEQ_LENGTH)
    scores = getattr(measured.scores("l2", "l2"), axis)
    for i, layer in enumerate(model.model.layers):
        module = layer.mlp if axis == "ffn" else layer.self_attn
        projection = module.down_proj if axis == "ffn" else module.o_proj
        moved = [
            movement(model, tokens, module, projection, slice(unit * wide, (unit + 1) * wide))
            for unit in range(size)
        ]
        torch.testing.assert_close(scores[i], torch.stack(moved), rtol=1e-4, atol=1e-5)


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
