"""Width pruning: which channels, neurons and heads stay, and the slice of a tensor that keeps them.

Embedding channels run through the whole residual stream, so one set, ranked by the scores summed
over the layers, holds for every tensor. Neurons and heads are each layer's own. Heads are ranked
inside their key/value group, because the heads of a group share its keys and values: every group
keeps the same number, and the groups and the head dimension stay as they are.

What a dimension counts is all that slicing needs to know about a tensor (`hf.tensor_axes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.model.arch import Architecture
from minitron.model.hf import Axis
from minitron.model.weights import WeightSource
from minitron.prune.scores import ImportanceScores, top_indices


@dataclass(frozen=True, kw_only=True, eq=False)
class WidthPlan:
    """Positions to keep along each axis, ascending; None where an axis is kept whole."""

    hidden: Tensor | None = None
    """[h'] embedding channels."""
    ffn: Tensor | None = None
    """[L, f'] neurons of each source layer."""
    heads: Tensor | None = None
    """[L, n'] query heads of each source layer."""
    kv_channels: int
    """Dimension of one head."""

    def kept(self, axis: Axis, layer: int | None) -> Tensor | None:
        """Positions to keep along a dimension that counts `axis`; None keeps all.

        Args:
            axis: what the dimension counts.
            layer: the source layer that the tensor belongs to, counted from 0, or None.
        """
        if axis == "hidden":
            return self.hidden
        if axis == "ffn" and self.ffn is not None:
            return self.ffn[layer]
        if axis == "query" and self.heads is not None:
            channels = torch.arange(self.kv_channels)
            return (self.heads[layer][:, None] * self.kv_channels + channels).flatten()  # [n' d]
        return None


def plan_width(
    source: Architecture, target: Architecture, scores: ImportanceScores | None
) -> WidthPlan:
    """Rank what the target has less of, and keep the best.

    Args:
        source: the shape that was scored.
        target: the shape to reach; no wider than `source`.
        scores: needed unless the two are equally wide.
    """
    if same_width(source, target):
        return WidthPlan(kv_channels=source.kv_channels)
    assert scores is not None, "another width needs scores"
    hidden = ffn = heads = None
    if target.hidden_size != source.hidden_size:
        # In fp64, so that the order of the sum cannot decide between two channels.
        hidden = top_indices(scores.hidden.double().sum(dim=0), target.hidden_size)
    if target.ffn_hidden_size != source.ffn_hidden_size:
        ffn = top_indices(scores.ffn, target.ffn_hidden_size)
    if target.num_attention_heads != source.num_attention_heads:
        groups = source.num_query_groups
        grouped = scores.heads.unflatten(1, (groups, -1))  # [L, g, n/g]
        best = top_indices(grouped, target.num_attention_heads // groups)  # [L, g, n'/g]
        first = torch.arange(groups) * grouped.shape[-1]
        heads = (best + first[:, None]).flatten(1)  # [L, n']
    return WidthPlan(hidden=hidden, ffn=ffn, heads=heads, kv_channels=source.kv_channels)


def same_width(source: Architecture, target: Architecture) -> bool:
    """True where the target keeps every channel, neuron and head."""
    return (source.hidden_size, source.ffn_hidden_size, source.num_attention_heads) == (
        target.hidden_size,
        target.ffn_hidden_size,
        target.num_attention_heads,
    )


def slice_tensor(
    weights: WeightSource, name: str, axes: Sequence[Axis], plan: WidthPlan, layer: int | None
) -> Tensor:
    """Read the part of a tensor that the plan keeps.

    From the disk comes, in each dimension, the range from the first kept position to the last.

    Args:
        weights: where the full tensor lies.
        name: its name there.
        axes: what each of its dimensions counts.
        plan: the positions to keep.
        layer: the source layer that it belongs to, counted from 0, or None.
    """
    positions = [plan.kept(axis, layer) for axis in axes]
    tensor = weights.read(
        name, *(slice(None) if p is None else slice(int(p[0]), int(p[-1]) + 1) for p in positions)
    )
    for dim, kept in enumerate(positions):
        if kept is not None and len(kept) != tensor.shape[dim]:
            tensor = tensor.index_select(dim, kept - kept[0])
    return tensor
