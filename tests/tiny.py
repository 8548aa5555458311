"""Tiny Llamas that transformers builds and saves, for tests that compare with it."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# One entry a feature that a Llama's shape may have; keys are LlamaConfig's.
VARIANTS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 10},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    "everything": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 6,
        "num_key_value_heads": 4,
        "rope_parameters": LLAMA3_ROPE,
    },
}


def tiny_config(**overrides) -> LlamaConfig:
    """A config of 4 layers, 32 channels, 48 neurons and 8 heads in 2 groups."""
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "eos_token_id": [2, 7],
    }
    return LlamaConfig(**(values | overrides))


def random_llama(config: LlamaConfig, *, seed: int = 0) -> LlamaForCausalLM:
    """A model whose norms and biases are random too, so that no mistake in them goes unnoticed."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name else 0.0
            parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    return model


def save_llama(directory: Path, *, seed: int = 0, shard: str = "5GB", **overrides):
    """Save a random tiny model as transformers does, and return it."""
    model = random_llama(tiny_config(**overrides), seed=seed)
    model.save_pretrained(directory, max_shard_size=shard)
    return model


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    """[2, 24, v] logits of fixed tokens."""
    generator = torch.Generator().manual_seed(99)
    tokens = torch.randint(model.config.vocab_size, (2, 24), generator=generator)
    with torch.no_grad():
        return model(tokens).logits
