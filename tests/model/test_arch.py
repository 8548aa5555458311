import dataclasses

import pytest
from transformers import LlamaForCausalLM

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture, RopeScaling
from tests.tiny import VARIANTS, tiny_config

LLAMA_31_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
)
SMALL = Architecture(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=61,
)


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({}, 8_030_261_248),
        ({"hidden_size": 3072, "ffn_hidden_size": 9216}, 4_512_746_496),
        ({"num_layers": 16}, 4_540_469_248),
        (
            {"num_layers": 40, "ffn_hidden_size": 11520, "vocab_size": 131072},
            8_414_105_600,
        ),
        (
            {
                "num_layers": 16,
                "hidden_size": 2048,
                "ffn_hidden_size": 8192,
                "kv_channels": 64,
                "share_embeddings_and_output_weights": True,
            },
            1_235_814_400,
        ),
        (
            {"ffn_hidden_size": 11008, "num_query_groups": 32, "vocab_size": 32000},
            6_738_415_616,
        ),
    ],
    ids=["llama-3.1-8b", "4b-width", "4b-depth", "mn-minitron-8b", "llama-3.2-1b", "llama-2-7b"],
)
def test_published_parameter_counts(changes, total):
    assert dataclasses.replace(LLAMA_31_8B, **changes).num_parameters == total


def test_parameters_without_embeddings_leave_out_both_tables():
    assert LLAMA_31_8B.num_non_embedding_parameters == 8_030_261_248 - 2 * 128256 * 4096
    assert LLAMA_31_8B.num_embedding_parameters == 2 * 128256 * 4096


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_parameter_count_equals_that_of_transformers(overrides):
    config = tiny_config(**overrides)
    arch = hf.architecture_from_config(config.to_dict())
    assert arch.num_parameters == LlamaForCausalLM(config).num_parameters()


@pytest.mark.parametrize(
    "name",
    [
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [0, -8, 8.0, "8", None])
def test_a_size_must_be_a_positive_whole_number(name, value):
    with pytest.raises(MinitronError, match=f"{name}={value!r} must be a whole number"):
        dataclasses.replace(SMALL, **{name: value})


def test_samples_may_fill_the_context_and_no_more():
    """Llama 3.1's scaled context counts whole, not the 8192 tokens that it was scaled from."""
    arch = dataclasses.replace(
        LLAMA_31_8B, max_position_embeddings=131072, rope_scaling=RopeScaling()
    )
    arch.check_seq_length(131072)
    with pytest.raises(MinitronError, match=r"data.seq_length=131073 is .* at most .*=131072, or"):
        arch.check_seq_length(131073)


def test_heads_must_divide_into_groups():
    with pytest.raises(MinitronError, match=r"num_attention_heads=8 .* num_query_groups=3"):
        dataclasses.replace(SMALL, num_query_groups=3)


def test_rope_needs_an_even_head_dimension():
    with pytest.raises(MinitronError, match="kv_channels=5 is odd"):
        dataclasses.replace(SMALL, kv_channels=5)
