"""What is measured of a model, the shape to reach, and the check of what came out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from minitron.errors import MinitronError
from minitron.sections.parallel import Precision

ScoringPrecision = Precision | Literal["fp64"]


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """The calibration pass."""

    samples: int = 1024
    """Samples of `data.seq_length` tokens, taken from the start of the data in order."""
    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""

    def __post_init__(self) -> None:
        for name in ("samples", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise MinitronError(f"importance.{name}={getattr(self, name)} must be at least 1")


DepthCriterion = Literal["lm_loss", "logit_distance", "accuracy"]


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Layers to leave out on trial; each trial is a forward pass."""

    layers: bool = False
    """Every layer by itself: a pass for each, and one of the whole model."""
    windows: list[int] = field(default_factory=list)
    """Every run of so many neighbouring layers, a pass for each; several lengths may be given."""
    greedy: int = 0
    """Layers to take out one after the other, each time the one that costs least then. The first is
    found among the trials of `layers`, which this includes; each further one takes a pass for every
    layer that is left, and one of the whole model."""
    criterion: DepthCriterion = "lm_loss"
    """What the greedy search keeps low: lm_loss or logit_distance; or high: accuracy on tasks."""
    metric: str = "acc"
    """What tasks call their accuracy, such as acc or acc_norm; the mean over tasks counts."""
    samples: int = 128
    """Samples of each pass: the first of the calibration data."""

    def __post_init__(self) -> None:
        for name, lowest in (("greedy", 0), ("samples", 1)):
            if getattr(self, name) < lowest:
                raise MinitronError(f"depth.{name}={getattr(self, name)} must be at least {lowest}")
        if self.criterion != "lm_loss" and not self.greedy:
            raise MinitronError(
                f"depth.criterion={self.criterion} is of the greedy search, but depth.greedy=0; "
                "add --depth.greedy, or leave it out: other trials serve every ranking"
            )

    @property
    def is_empty(self) -> bool:
        """True where nothing is tried."""
        return not (self.layers or self.windows or self.greedy)

    def check(self, num_layers: int) -> None:
        """Refuse to leave out what the model does not have.

        Raises:
            MinitronError: a window or the greedy search would leave no layer.
        """
        for length in self.windows:
            if not 1 <= length < num_layers:
                raise MinitronError(
                    f"depth.windows={length}, but the model has {num_layers} layers; choose 1 to "
                    f"{num_layers - 1}"
                )
        if self.greedy >= num_layers:
            raise MinitronError(
                f"depth.greedy={self.greedy} leaves none of the model's {num_layers} layers; "
                f"choose at most {num_layers - 1}"
            )


LayerRanking = Literal[
    "block_influence",
    "lm_loss",
    "logit_distance",
    "accuracy",
    "window",
    "window_logit_distance",
    "window_accuracy",
    "greedy",
]
Method = Literal["activation", "magnitude", "random", "first"]
Aggregation = Literal["mean", "l2", "var"]


HeadRanking = Literal["group", "across"]
GroupReduction = Literal["select", "mean"]


HeadMerge = Literal["none", "plus", "minus"]

WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_SIZES = (*WIDTHS, "num_layers", "drop_layers")


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """The sizes to reach; what is not named stays as it is."""

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


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """How to choose what stays."""

    layer_ranking: LayerRanking = "block_influence"
    """What ranks layers: block_influence; what leaving each out alone does to the loss (lm_loss),
    the logits (logit_distance) or the accuracy on tasks (accuracy); the run of neighbours that is
    best for the loss (window), the logits (window_logit_distance) or the accuracy
    (window_accuracy); or a greedy search (greedy) for what its depth.criterion named. All but the
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


@dataclass(frozen=True, kw_only=True)
class PruneConfig(SelectionConfig, SizesConfig):
    """The shape to reach, where what is not named stays as it is; and how to choose what stays."""

    multiple: int = 1
    """Round the hidden size, and the neurons of each rank, to a multiple that suits kernels, such
    as 64 or 128. Only sizes that are given are rounded; the arithmetic is printed."""
    target_tensor_parallel_size: int = 1
    """Round the widths that are given to what so many tensor-parallel ranks can share; one that is
    not given, and that they cannot share, is refused."""
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


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The forward pass that checks the pruned model."""

    samples: int = 16
    """Samples of data that it runs on; 0 for no check at all."""
    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""

    def __post_init__(self) -> None:
        for name, lowest in (("samples", 0), ("micro_batch_size", 1)):
            if getattr(self, name) < lowest:
                raise MinitronError(f"check.{name}={getattr(self, name)} must be at least {lowest}")
