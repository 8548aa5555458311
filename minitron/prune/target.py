"""The shape to reach: what a recipe asks for, made legal, with the arithmetic that led there."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.prune.baselines import Method
from minitron.prune.depth import LayerRanking, kept_layers
from minitron.prune.scores import Aggregation
from minitron.prune.width import GroupReduction, HeadMerge, HeadRanking

_WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_SIZES = (*_WIDTHS, "num_layers", "drop_layers")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The shape to reach, where what is not named stays as it is; and how to choose what stays."""

    hidden_size: int | None = None
    """Embedding channels to keep, the same ones in all layers."""
    ffn_hidden_size: int | None = None
    """Neurons to keep in each MLP."""
    num_attention_heads: int | None = None
    """Query heads to keep in each layer; a multiple of the key/value heads."""
    num_query_groups: int | None = None
    """Key/value heads to keep in each layer. Unless num_attention_heads says otherwise, their query
    heads stay with them."""
    num_layers: int | None = None
    """Layers to keep, a number of them; the lowest in layer_ranking go, and are printed."""
    drop_layers: list[int] | None = None
    """Layers to drop whatever their influence, counted from 1: of 32, the first is 1, the last 32.
    Needs no scores and no data."""
    layer_ranking: LayerRanking = "block_influence"
    """What ranks layers: block_influence; what leaving each out alone does to the loss (lm_loss),
    the logits (logit_distance) or the accuracy on tasks (accuracy); the run of neighbours that is
    best for the loss (window) or the accuracy (window_accuracy); or a greedy search. All but the
    first need trials beside the scores: the depth section of launch/importance.py."""
    method: Method = "activation"
    """What ranks: activations on calibration data, or for comparison the magnitude of weights,
    chance (random), or the position (first); these need no scores and no data."""
    batch_aggregation: Aggregation = "l2"
    """How scores over calibration samples become one: mean, l2 or var."""
    sequence_aggregation: Aggregation = "mean"
    """How activations over a sample's sequence become one score: mean, l2 or var."""
    head_ranking: HeadRanking = "group"
    """Rank query heads inside their group, or across the groups of a layer: the best heads then
    fill the groups, with a copy of their key/value head where one group's heads fill several."""
    group_reduction: GroupReduction = "select"
    """How num_query_groups is reached: select the best key/value heads, or take the mean of
    neighbouring ones, which keeps all query heads."""
    merge_heads: HeadMerge = "none"
    """Add to the query projection of kept heads its difference to that of pruned ones, with this
    sign: plus is the paper's formula, minus puts the pruned head in the place of the kept one. No
    published model uses either; measure before you trust it. No effect where all heads stay."""
    multiple: int = 1
    """Round the hidden size, and the neurons of each rank, to a multiple that suits kernels, such
    as 64 or 128. The arithmetic is printed."""
    target_tensor_parallel_size: int = 1
    """Round every width to one that so many tensor-parallel ranks can share."""
    rounds: int = 1
    """Rounds in which the shape is to be reached, this one included: only that part of the way is
    gone now, rounded to what can be built. The next round starts from the result, with one less."""

    def __post_init__(self) -> None:
        if all(getattr(self, name) in (None, []) for name in _SIZES):
            keys = ", ".join(f"prune.{name}" for name in _SIZES)
            raise MinitronError(f"nothing to prune; give at least one of {keys}")
        for name in ("multiple", "target_tensor_parallel_size", "rounds"):
            if getattr(self, name) < 1:
                raise MinitronError(f"prune.{name}={getattr(self, name)} must be at least 1")
        if self.rounds > 1 and self.drop_layers:
            raise MinitronError(
                f"prune.rounds={self.rounds} cannot split prune.drop_layers={self.drop_layers}; "
                "give prune.num_layers"
            )

    def target(self, source: Architecture) -> Architecture:
        """The shape of the pruned model.

        Raises:
            MinitronError: it is larger than the source, or no valid Llama.
        """
        return self._plan(source)[0]

    def arithmetic(self, source: Architecture) -> list[str]:
        """How each width was rounded, a line each; none unless rounding was asked for.

        Raises:
            MinitronError: as `target` does.
        """
        return self._plan(source)[1]

    def _plan(self, source: Architecture) -> tuple[Architecture, list[str]]:
        asked = {name: getattr(self, name) for name in (*_WIDTHS, "num_layers")}
        asked = {name: size for name, size in asked.items() if size is not None}
        for name, size in asked.items():
            largest = getattr(source, name)
            if not 1 <= size <= largest:
                raise MinitronError(
                    f"prune.{name}={size}, but the model has {largest}; choose 1 to {largest}"
                )
        if self.rounds > 1:
            for name, size in asked.items():
                way = getattr(source, name) - size
                asked[name] = size + way - round(way / self.rounds)
        sizes = {name: getattr(source, name) for name in (*_WIDTHS, "num_layers")} | asked
        tp = self.target_tensor_parallel_size
        is_rounded = self.multiple > 1 or tp > 1 or self.rounds > 1
        lines: list[str] = []

        def settle(name: str, choices: list[int], reason: str) -> None:
            """Round to the nearest choice, the larger of two."""
            if not is_rounded:
                return
            if not choices:
                raise MinitronError(
                    f"prune.{name}={sizes[name]} cannot be rounded: the model has "
                    f"{getattr(source, name)}, and no smaller size is a {reason}; lower "
                    "prune.multiple or prune.target_tensor_parallel_size"
                )
            nearest = min(choices, key=lambda size: (abs(size - sizes[name]), -size))
            lines.append(f"{name}: {sizes[name]} -> {nearest}, a {reason}")
            sizes[name] = nearest

        all_groups = source.num_query_groups
        merges = self.group_reduction == "mean"
        divisors = [g for g in range(1, all_groups + 1) if all_groups % g == 0]
        possible = divisors if merges else list(range(1, all_groups + 1))
        settle(
            "num_query_groups",
            [g for g in possible if g % tp == 0 or tp % g == 0],
            f"multiple or divisor of {tp} ranks",
        )
        groups = sizes["num_query_groups"]
        if merges and groups not in divisors:
            raise MinitronError(
                f"prune.num_query_groups={groups} does not divide the model's {all_groups} "
                "key/value heads, whose neighbours prune.group_reduction=mean averages; choose "
                f"{_listed(divisors)}"
            )
        share = source.num_attention_heads // all_groups
        most = source.num_attention_heads if merges else groups * share
        if "num_attention_heads" not in asked:
            sizes["num_attention_heads"] = most
        unit = math.lcm(groups, tp)
        settle(
            "num_attention_heads",
            list(range(unit, most + 1, unit)),
            f"multiple of {unit} = lcm({groups} key/value heads, {tp} ranks)",
        )
        heads = sizes["num_attention_heads"]
        self._check_heads(heads, groups, most)
        unit = math.lcm(self.multiple, heads)
        settle(
            "hidden_size",
            list(range(unit, source.hidden_size + 1, unit)),
            f"multiple of {unit} = lcm({self.multiple}, {heads} heads, which transformers demands)",
        )
        unit = self.multiple * tp
        settle(
            "ffn_hidden_size",
            list(range(unit, source.ffn_hidden_size + 1, unit)),
            f"multiple of {unit} = {self.multiple} x {tp} ranks",
        )
        if self.drop_layers:
            left = len(kept_layers(source.num_layers, self.drop_layers))
            if asked.get("num_layers", left) != left:
                raise MinitronError(
                    f"prune.num_layers={asked['num_layers']} contradicts prune.drop_layers, which "
                    f"leaves {source.num_layers} - {len(self.drop_layers)} = {left}; "
                    "give one of the two"
                )
            sizes["num_layers"] = left
        target = dataclasses.replace(source, **sizes)
        hf.check_shape(target)
        return target, lines

    def _check_heads(self, heads: int, groups: int, most: int) -> None:
        if heads % groups:
            below = heads // groups * groups
            whose = "the model's " if self.num_query_groups is None else "prune.num_query_groups="
            raise MinitronError(
                f"prune.num_attention_heads={heads} is not a multiple of {whose}{groups} "
                f"key/value heads, each of which keeps the same number of query heads; choose "
                f"{f'{below} or ' if below else ''}{below + groups}"
            )
        if heads > most:
            raise MinitronError(
                f"prune.num_attention_heads={heads} in prune.num_query_groups={groups} are "
                f"{heads // groups} query heads each, but a key/value head of the model has "
                f"{most // groups}; choose at most {groups} x {most // groups} = {most}, or "
                "prune.group_reduction=mean"
            )


def _listed(numbers: list[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last
