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


def oracle(model, prefix, num_samples):
    """The four scores by their definitions, one sample after the other, in fp64."""
    seen = {}

    def record(name, value):
        seen.setdefault(name, []).append(value.detach().double()[0])  # [s, ...]

    hooks = []
    for i, layer in enumerate(model.model.layers):
        for name, module in (
            ("input norm", layer.input_layernorm),
            ("mlp norm", layer.post_attention_layernorm),
        ):
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out, key=(name, i): record(key, out)
                )
            )
        for name, module in (("heads", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, key=(name, i): record(key, args[0]))
            )
        hooks.append(
            layer.register_forward_hook(
                lambda _, args, out, i=i: (
                    record(("before", i), args[0]),
                    record(("after", i), out),
                )
            )
        )
    sample_tokens = torch.from_numpy(TokenStream(prefix).read(0, num_samples * SEQ_LENGTH))
    with torch.no_grad():
        for sample in sample_tokens.view(num_samples, 1, SEQ_LENGTH):
            model(sample)
    for hook in hooks:
        hook.remove()

    def l2_of_means(values):  # samples of [s, c] -> [c]
        return torch.stack([value.mean(0) for value in values]).square().sum(0).sqrt()

    layers = range(len(model.model.layers))
    size = model.config.head_dim
    return {
        "hidden": torch.stack(
            [
                l2_of_means([x.abs() for x in seen["input norm", i]])
                + l2_of_means([x.abs() for x in seen["mlp norm", i]])
                for i in layers
            ]
        ),
        "ffn": torch.stack([l2_of_means([x.abs() for x in seen["ffn", i]]) for i in layers]),
        "heads": torch.stack(
            [l2_of_means([x.unflatten(-1, (-1, size)).norm(dim=-1) for x in seen["heads", i]]) for i in layers]
        ),
        "block_influence": torch.stack(
            [
                1
                - torch.cosine_similarity(
                    torch.cat(seen["before", i]), torch.cat(seen["after", i]), dim=-1
                ).mean()
                for i in layers
            ]
        ),
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
    expected = oracle(reference, tokens, min(samples, NUM_SAMPLES))
    ranks = run_on(topology, _measure, directory, tokens, samples, micro_batch_size)
    for scores in ranks:
        assert scores.keys() == expected.keys()
        for name, tensor in scores.items():
            assert tensor.dtype == torch.float32
            d=((tensor.double()-expected[name])/expected[name]).abs().max().item()
            print(topology, name, d)
            assert torch.equal(tensor, ranks[0][name])
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["samples", "micro_batch_size"])
def test_sizes_below_one_are_refused(name):
    message = f"importance.{name}=0 must be at least 1"
    with pytest.raises(MinitronError, match=re.escape(message)):
        ImportanceConfig(**{name: 0})
