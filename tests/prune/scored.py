"""Random importance scores for tests."""

import torch

from minitron.model.arch import Architecture
from minitron.prune.scores import ImportanceScores


def random_scores(arch: Architecture, *, seed: int = 0) -> ImportanceScores:
    """Positive scores without ties."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator) + 0.1

    return ImportanceScores(
        hidden=draw(arch.num_layers, arch.hidden_size),
        ffn=draw(arch.num_layers, arch.ffn_hidden_size),
        heads=draw(arch.num_layers, arch.num_attention_heads),
        block_influence=draw(arch.num_layers),
    )
