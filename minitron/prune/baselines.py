"""Importance without activations: what activation importance is compared with.

Weight magnitude, chance and position give scores of the same form, so that every other step of
pruning is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.weights import WeightSource
from minitron.prune.scores import ImportanceScores
from minitron.sections.prune import Method


def baseline_scores(
    method: Method, arch: Architecture, *, seed: int, weights: WeightSource | None = None
) -> ImportanceScores:
    """Scores that need no data.

    Args:
        method: `magnitude`, `random` or `first` (the lower the position, the better).
        arch: the model's shape.
        seed: of `random`.
        weights: the model's tensors, for `magnitude`.
    """
    if method == "magnitude":
        assert weights is not None, "magnitude reads weights"
        return magnitude_scores(arch, weights)
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return _filled(arch, lambda *shape: 1 - torch.rand(shape, generator=generator))
    assert method == "first", method
    return _filled(arch, lambda *shape: torch.arange(shape[-1], 0.0, -1).expand(shape))


def magnitude_scores(arch: Architecture, weights: WeightSource) -> ImportanceScores:
    """The L2 norm of all weights that belong to a unit.

    A unit's weights are its rows and columns in every tensor of the layer; those of a key/value
    head are its keys and values. A layer's influence is the norm of all its weights.
    """
    squares = {
        axis: torch.zeros(arch.num_layers, hf.axis_size(arch, axis), dtype=torch.float64)
        for axis in ("hidden", "ffn", "query", "kv")
    }
    total = torch.zeros(arch.num_layers, dtype=torch.float64)
    for name, axes in hf.tensor_axes(arch).items():
        layer, _ = hf.split_layer_tensor(name)
        if layer is None:
            continue
        square = weights.read(name).float().square()
        total[layer] += square.sum()
        for dim, axis in enumerate(axes):
            others = [d for d in range(square.dim()) if d != dim]
            squares[axis][layer] += square.sum(others) if others else square

    def norms(axis: hf.Axis, channels: int = 1) -> Tensor:
        return squares[axis].unflatten(1, (-1, channels)).sum(2).sqrt().float()

    return ImportanceScores(
        hidden=norms("hidden"),
        ffn=norms("ffn"),
        heads=norms("query", arch.kv_channels),
        query_groups=norms("kv", arch.kv_channels),
        block_influence=total.sqrt().float(),
    )


def _filled(arch: Architecture, draw: Callable[..., Tensor]) -> ImportanceScores:
    layers = arch.num_layers
    return ImportanceScores(
        hidden=draw(layers, arch.hidden_size),
        ffn=draw(layers, arch.ffn_hidden_size),
        heads=draw(layers, arch.num_attention_heads),
        query_groups=draw(layers, arch.num_query_groups),
        block_influence=draw(layers),
    )
