"""Random importance scores for tests."""

from pathlib import Path

import torch

from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.prune.scores import Calibration, Importance, ImportanceScores, save_scores


def random_importance(arch: Architecture, *, seed: int = 0) -> Importance:
    """Positive scores without ties, others for every aggregation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator) + 0.1

    return Importance(
        hidden=draw(3, 3, arch.num_layers, arch.hidden_size),
        ffn=draw(3, 3, arch.num_layers, arch.ffn_hidden_size),
        heads=draw(3, 3, arch.num_layers, arch.num_attention_heads),
        query_groups=draw(3, 3, arch.num_layers, arch.num_query_groups),
        block_influence=draw(arch.num_layers),
    )


def random_scores(arch: Architecture, *, seed: int = 0) -> ImportanceScores:
    """Positive scores without ties."""
    return random_importance(arch, seed=seed).scores()


def save_random(directory: Path, model: Path, importance: Importance | None = None) -> Importance:
    """Random scores, or those given, as a file that says it is of `model`; returns them."""
    importance = importance or random_importance(hf.read_architecture(model))
    calibration = Calibration(samples=1, tokenizer=None, data={})
    save_scores(directory, importance, model_dir=model, calibration=calibration)
    return importance
