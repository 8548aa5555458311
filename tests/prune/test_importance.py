"""Importance scores against hooks on transformers' model, and the same on every topology."""

import re
from dataclasses import asdict

import pytest
import torch

from minitron.data.batches import DataConfig
from minitron.data.indexed import TokenStream
from minitron.errors import MinitronError
from minitron.prune.importance import ImportanceConfig, measure_importance
from tests.runs import SEQ_LENGTH, VOCAB, run_on, write_tokens
from tests.tiny import save_llama

NUM_SAMPLES = 7


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
    """The four scores by their definitions, in fp64, from one sample after the other."""
    layers = range(len(model.model.layers))
    tokens = torch.from_numpy(TokenStream(prefix).read(0, num_samples * SEQ_LENGTH))
    seen, hooks = _watch(model.model.layers)
    squares = {"input norm": 0, "mlp norm": 0, "ffn": 0, "heads": 0}
    cosines = []
    for sample in tokens.view(num_samples, 1, SEQ_LENGTH):
        with torch.no_grad():
            model(sample)

        def mean(rows):  # [L] of [s, c] -> [L, c]
            return torch.stack(list(rows)).abs().mean(1)

        heads = (seen["attention output", i][0].unflatten(-1, (8, -1)).norm(dim=-1) for i in layers)
        squares["input norm"] += mean(seen["input norm", i][1] for i in layers).square()
        squares["mlp norm"] += mean(seen["mlp norm", i][1] for i in layers).square()
        squares["ffn"] += mean(seen["mlp output", i][0] for i in layers).square()
        squares["heads"] += mean(heads).square()
        cosines.append(
            torch.stack([torch.cosine_similarity(*seen["layer", i], dim=-1) for i in layers])
        )
    for hook in hooks:
        hook.remove()
    return {
        "hidden": squares["input norm"].sqrt() + squares["mlp norm"].sqrt(),
        "ffn": squares["ffn"].sqrt(),
        "heads": squares["heads"].sqrt(),
        "block_influence": 1 - torch.cat(cosines, 1).mean(1),
    }


def _measure(parallel, directory, prefix, samples, micro_batch_size):
    scores = measure_importance(
        directory,
        data=DataConfig(path=[str(prefix)], seq_length=SEQ_LENGTH),
        importance=ImportanceConfig(samples=samples, micro_batch_size=micro_batch_size),
        parallel=parallel,
        precision="fp32",
    )
    return asdict(scores)


@pytest.mark.parametrize(
    ("topology", "samples", "micro_batch_size"),
    [
        ("tp1", 1024, 1),  # more than there are
        ("tp1", 7, 3),
        ("tp1", 5, 3),  # the first five alone
        ("tp2", 7, 2),
        ("tp2+sp", 7, 2),
        ("pp2", 7, 1),
        ("pp2 uneven", 5, 2),
        ("dp2", 7, 2),
        ("dp2", 5, 3),
        ("tp2 pp2", 7, 2),
        ("tp2+sp pp2", 7, 2),
        ("pp2 dp2", 6, 4),  # the second rank's micro-batch is half padding
    ],
)
def test_scores_are_those_of_the_definition(model, tokens, topology, samples, micro_batch_size):
    directory, reference = model
    expected = _definition(reference, tokens, min(samples, NUM_SAMPLES))
    ranks = run_on(topology, _measure, directory, tokens, samples, micro_batch_size)
    for scores in ranks:
        assert scores.keys() == expected.keys()
        for name, tensor in scores.items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, ranks[0][name])
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["samples", "micro_batch_size"])
def test_sizes_below_one_are_refused(name):
    message = f"importance.{name}=0 must be at least 1"
    with pytest.raises(MinitronError, match=re.escape(message)):
        ImportanceConfig(**{name: 0})
