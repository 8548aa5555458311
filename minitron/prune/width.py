"""Width pruning: which channels, neurons and heads stay, and the slice of a tensor that keeps them.

Embedding channels run through the whole residual stream, so one set, ranked by the scores summed
over the layers, holds for every tensor. Neurons and heads are each layer's own. The query heads of
a group share its key/value head, and every group keeps the same number of them, so attention is
pruned in two steps: which key/value heads fill the target's groups, and which query heads each of
them serves. The head dimension stays as it is.

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
from minitron.sections.prune import GroupReduction, HeadMerge, HeadRanking


@dataclass(frozen=True, kw_only=True, eq=False)
class WidthPlan:
    """Positions to keep along each axis, ascending; None where an axis is kept whole."""

    hidden: Tensor | None = None
    """[h'] embedding channels."""
    ffn: Tensor | None = None
    """[L, f'] neurons of each source layer."""
    heads: Tensor | None = None
    """[L, n'] query heads of each source layer."""
    groups: Tensor | None = None
    """[L, g'] key/value heads of each source layer, after pooling; one may be named twice."""
    pooled: int = 1
    """Neighbouring key/value heads that are averaged into one."""
    partners: Tensor | None = None
    """[L, n'] pruned head that each kept head is merged with, itself where there is none."""
    merge_sign: int = 1
    """Sign of the difference that a merge adds."""
    merge_keys: bool = False
    """True where every query head has its own key/value head, which is then merged like it."""
    kv_channels: int
    """Dimension of one head."""

    def kept(self, axis: Axis, layer: int | None) -> Tensor | None:
        """Positions to keep along a dimension that counts `axis`; None keeps all.

        Args:
            axis: what the dimension counts; `kv` after pooling.
            layer: the source layer that the tensor belongs to, counted from 0, or None.
        """
        if axis == "hidden":
            return self.hidden
        if axis == "ffn" and self.ffn is not None:
            return self.ffn[layer]
        if axis == "query" and self.heads is not None:
            return self._channels(self.heads[layer])
        if axis == "kv" and self.groups is not None:
            return self._channels(self.groups[layer])
        return None

    def merged_with(self, axis: Axis, layer: int | None) -> Tensor | None:
        """The position that each kept one is merged with; None where nothing is merged."""
        if self.partners is None or not (axis == "query" or (axis == "kv" and self.merge_keys)):
            return None
        return self._channels(self.partners[layer])

    def _channels(self, heads: Tensor) -> Tensor:
        """Positions of whole heads: [n'] → [n' d]."""
        return (heads[:, None] * self.kv_channels + torch.arange(self.kv_channels)).flatten()


def plan_width(
    source: Architecture,
    target: Architecture,
    scores: ImportanceScores | None,
    *,
    head_ranking: HeadRanking = "group",
    group_reduction: GroupReduction = "select",
    merge_heads: HeadMerge = "none",
) -> WidthPlan:
    """Rank what the target has less of, and keep the best.

    Args:
        source: the shape that was scored.
        target: the shape to reach; no wider than `source`.
        scores: needed unless the two are equally wide.
        head_ranking: see `choose_heads`.
        group_reduction: `select` keeps the best key/value heads with their query heads, `mean`
            averages neighbouring ones, which then serve the query heads of both.
        merge_heads: see `merge_partners`.
    """
    if same_width(source, target):
        return WidthPlan(kv_channels=source.kv_channels)
    assert scores is not None, "another width needs scores"
    hidden = ffn = heads = groups = partners = None
    pooled, independent = 1, False
    if target.hidden_size != source.hidden_size:
        # In fp64, so that the order of the sum cannot decide between two channels.
        hidden = top_indices(scores.hidden.double().sum(dim=0), target.hidden_size)
    if target.ffn_hidden_size != source.ffn_hidden_size:
        ffn = top_indices(scores.ffn, target.ffn_hidden_size)
    if (source.num_attention_heads, source.num_query_groups) != (
        target.num_attention_heads,
        target.num_query_groups,
    ):
        if group_reduction == "mean":
            pooled = source.num_query_groups // target.num_query_groups
        group_scores = scores.query_groups.unflatten(1, (-1, pooled)).sum(-1)
        heads, groups = choose_heads(
            scores.heads,
            group_scores,
            num_groups=target.num_query_groups,
            heads_per_group=target.num_attention_heads // target.num_query_groups,
            ranking=head_ranking,
        )
        # Where heads share nothing, all of a layer can take each other's place.
        independent = group_scores.shape[1] == source.num_attention_heads
        if merge_heads != "none":
            parts = 1 if independent else group_scores.shape[1]
            partners = merge_partners(scores.heads, heads, parts)
        if torch.equal(groups, torch.arange(group_scores.shape[1]).expand(len(groups), -1)):
            groups = None  # all stay
    return WidthPlan(
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        groups=groups,
        pooled=pooled,
        partners=partners,
        merge_sign=-1 if merge_heads == "minus" else 1,
        merge_keys=independent,
        kv_channels=source.kv_channels,
    )


def choose_heads(
    head_scores: Tensor,
    group_scores: Tensor,
    *,
    num_groups: int,
    heads_per_group: int,
    ranking: HeadRanking,
) -> tuple[Tensor, Tensor]:
    """Query heads to keep, and the key/value head of each of their groups.

    `group` keeps the groups of the highest scores, and in each its best heads. `across` lets the
    heads of all groups compete: a group's heads, best first, fill as many of the target's groups as
    they win, each with a copy of their key/value head. Of all choices that give every group the
    same number of heads with one key/value head, it has the highest sum of head scores.

    Args:
        head_scores: [L, n].
        group_scores: [L, g].
        num_groups: groups to fill.
        heads_per_group: heads in each; no more than n / g.
        ranking: how groups are chosen.

    Returns:
        [L, n'] heads and [L, g'] groups, both ascending.
    """
    groups = group_scores.shape[1]
    grouped = head_scores.unflatten(1, (groups, -1))  # [L, g, n/g]
    size = grouped.shape[2]
    first = torch.arange(groups)[:, None] * size
    if ranking == "group":
        best = top_indices(grouped, heads_per_group) + first  # [L, g, n'/g']
        kept = top_indices(group_scores, num_groups)  # [L, g']
        heads = best.gather(1, kept[:, :, None].expand(-1, -1, heads_per_group))
        return heads.flatten(1), kept
    ranked = grouped.sort(dim=2, descending=True, stable=True)
    fills = size // heads_per_group  # groups that one group's heads can fill
    used = fills * heads_per_group
    bids = ranked.values[:, :, :used].double().unflatten(2, (fills, -1)).sum(3)  # [L, g, fills]
    # A group's bids fall, so that the winners are always its best heads.
    winners = top_indices(bids.flatten(1), num_groups)  # [L, g']
    teams = (ranked.indices[:, :, :used] + first).unflatten(2, (fills, -1)).flatten(1, 2)
    heads = teams.gather(1, winners[:, :, None].expand(-1, -1, heads_per_group))  # [L, g', n'/g']
    heads = heads.flatten(1).sort(dim=1).values
    return heads, heads[:, ::heads_per_group] // size


def merge_partners(head_scores: Tensor, heads: Tensor, groups: int) -> Tensor:
    """The pruned head that each kept head is merged with, itself for none.

    Of L heads ranked 1 to L of which K are kept, i in [2K - L + 1, K] is merged with 2K - i + 1:
    the last kept one with the first pruned one, and so on outwards. The paper prints the range from
    K - (L - K), whose partner would be head L + 1. Heads ranked after 2K have no partner.

    Args:
        head_scores: [L, n].
        heads: [L, n'] kept.
        groups: parts of a layer's heads that are ranked by themselves.

    Returns:
        [L, n'].

    Source: arXiv:2407.14679 §2.3.
    """
    partners = heads.clone()
    size = head_scores.shape[1] // groups
    for layer, row in enumerate(heads.tolist()):
        scores = head_scores[layer].tolist()
        for first in range(0, len(scores), size):
            members = range(first, first + size)
            kept = sorted((i for i in members if i in row), key=lambda i: (-scores[i], i))
            gone = sorted((i for i in members if i not in row), key=lambda i: (-scores[i], i))
            for head, partner in zip(reversed(kept), gone, strict=False):
                partners[layer, row.index(head)] = partner
    return partners


def same_width(source: Architecture, target: Architecture) -> bool:
    """True where the target keeps every channel, neuron, query head and key/value head."""
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
    return all(getattr(source, name) == getattr(target, name) for name in names)


def slice_tensor(
    weights: WeightSource,
    name: str,
    axes: Sequence[Axis],
    plan: WidthPlan,
    layer: int | None,
    *index: slice,
) -> Tensor:
    """Read the part of a tensor that the plan keeps, or a part of that.

    From the disk comes, in each dimension, the range from the first kept position to the last.

    Args:
        weights: where the full tensor lies.
        name: its name there.
        axes: what each of its dimensions counts.
        plan: the positions to keep.
        layer: the source layer that it belongs to, counted from 0, or None.
        index: what to read of the kept part, one slice a dimension; all without.
    """
    if "kv" in axes and plan.pooled > 1:
        weights = _Pooled(weights, plan)
    index = (*index, *[slice(None)] * (len(axes) - len(index)))

    def parts(positions: Sequence[Tensor | None]) -> list[Tensor | slice]:
        return [
            part if kept is None else kept[part]
            for kept, part in zip(positions, index, strict=True)
        ]

    positions = parts([plan.kept(axis, layer) for axis in axes])
    partners = [plan.merged_with(axis, layer) for axis in axes]
    tensor = _select(weights, name, positions)
    if partners[0] is not None:  # rows of a projection into heads; columns of others stay
        other = _select(weights, name, [partners[0][index[0]], *positions[1:]])
        difference = tensor.float() - other.float()
        tensor = (tensor.float() + plan.merge_sign * difference).to(tensor.dtype)
    return tensor


def _select(weights: WeightSource, name: str, positions: Sequence[Tensor | slice]) -> Tensor:
    bounds = [
        p if isinstance(p, slice) else slice(int(p.min()), int(p.max()) + 1) for p in positions
    ]
    tensor = weights.read(name, *bounds)
    for dim, (kept, bound) in enumerate(zip(positions, bounds, strict=True)):
        if isinstance(kept, slice):
            continue
        if not torch.equal(kept, torch.arange(bound.start, bound.stop)):
            tensor = _take(tensor, dim, kept - bound.start)
    return tensor


def _take(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    """`index_select`, which copies rows fast; columns `gather` takes in a sixth of its time."""
    if dim == 0:
        return tensor.index_select(0, positions)
    return tensor.gather(1, positions.expand(len(tensor), -1))


class _Pooled:
    """Key or value projections whose neighbouring heads are averaged."""

    def __init__(self, weights: WeightSource, plan: WidthPlan) -> None:
        self._weights = weights
        self._plan = plan

    def read(self, name: str, *index: slice) -> Tensor:
        """The averaged projection, or the part of it that `index` selects; only that is read."""
        rows = index[0] if index else slice(None)
        size, pooled = self._plan.kv_channels, self._plan.pooled
        start, stop = rows.start or 0, rows.stop
        first = start // size  # head
        last = None if stop is None else -(-stop // size) * pooled * size
        members = self._weights.read(name, slice(first * pooled * size, last), *index[1:])
        heads = members.unflatten(0, (-1, pooled, size)).float().mean(1).flatten(0, 1)
        begin = start - first * size
        end = None if stop is None else begin + stop - start
        return heads.to(members.dtype)[begin:end]
