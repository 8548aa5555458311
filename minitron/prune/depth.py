"""Depth pruning: which layers go.

Layers are dropped whole and the rest is renumbered in its old order. Users count layers from 1, as
the Minitron papers do (dropping 16 to 31 of 32 keeps the first fifteen and the last); code counts
from 0. `kept_layers` is the step from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from minitron.errors import MinitronError
from minitron.prune.scores import top_indices


def layers_to_drop(block_influence: Tensor, num_layers: int) -> tuple[int, ...]:
    """The least influential layers, counted from 1, such that `num_layers` remain.

    Of two equally influential layers the later one goes.

    Args:
        block_influence: [L].
        num_layers: layers to keep.

    Raises:
        MinitronError: there are fewer than `num_layers` layers.

    Source: arXiv:2403.03853; arXiv:2407.14679 §2.2.
    """
    total = len(block_influence)
    if not 1 <= num_layers <= total:
        raise MinitronError(f"cannot keep {num_layers} of {total} layers; keep 1 to {total}")
    kept = set(top_indices(block_influence, num_layers).tolist())
    return tuple(layer + 1 for layer in range(total) if layer not in kept)


def kept_layers(num_layers: int, drop_layers: Sequence[int]) -> tuple[int, ...]:
    """The layers that remain, counted from 0: layer i of the result was `kept_layers(...)[i]`.

    Args:
        num_layers: layers of the source model.
        drop_layers: layers to drop, counted from 1.

    Raises:
        MinitronError: a layer does not exist or is named twice, or none would remain.
    """
    unknown = [layer for layer in drop_layers if not 1 <= layer <= num_layers]
    if unknown:
        raise MinitronError(
            f"drop_layers names layer {unknown[0]}; the model has layers 1 to {num_layers}, "
            "counted from 1"
        )
    repeated = [layer for layer in drop_layers if list(drop_layers).count(layer) > 1]
    if repeated:
        raise MinitronError(f"drop_layers names layer {repeated[0]} twice; name each layer once")
    if len(drop_layers) == num_layers:
        raise MinitronError(f"drop_layers names all {num_layers} layers; keep at least one")
    return tuple(layer for layer in range(num_layers) if layer + 1 not in drop_layers)
