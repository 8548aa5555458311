"""The shapes to choose from, their budgets, and the race between them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Literal

from minitron.errors import MinitronError
from minitron.sections.parallel import Precision

SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
)
"""What a search may change."""


Preset = Literal["minitron_8b", "minitron_4b", "llama3.1_4b"]


@dataclass(frozen=True, kw_only=True)
class GridConfig:
    """The sizes to combine, each with all of the others; an axis without any stays as it is."""

    preset: Preset | None = None
    """A grid whose axes hold where none is given here: the paper's for Minitron 8B and for Minitron
    4B, or what lies between the two Llama-3.1-Minitron-4B, Width and Depth."""
    num_layers: list[int] | None = None
    """Layers to keep."""
    hidden_size: list[int] | None = None
    """Embedding channels to keep."""
    ffn_hidden_size: list[int] | None = None
    """Neurons of each MLP to keep."""
    ffn_multiples: list[float] | None = None
    """The same as multiples of the hidden size; one of the two."""
    num_attention_heads: list[int] | None = None
    """Query heads to keep."""
    num_query_groups: list[int] | None = None
    """Key/value heads to keep. Unless num_attention_heads says otherwise, their query heads stay
    with them; all query heads if prune.group_reduction is mean."""

    def __post_init__(self) -> None:
        if self.ffn_hidden_size is not None and self.ffn_multiples is not None:
            raise MinitronError(
                f"grid.ffn_hidden_size={self.ffn_hidden_size} and "
                f"grid.ffn_multiples={self.ffn_multiples} both say how many neurons; give one"
            )
        for name in (*SIZES, "ffn_multiples"):
            sizes = getattr(self, name)
            if sizes == [] or any(size <= 0 for size in sizes or ()):
                raise MinitronError(f"grid.{name}={sizes} must name one or more sizes above 0")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Limits of a shape. One number is the most that it may take, two are the least and the
    most.
    """

    params: list[float] | None = None
    """Parameters, such as [4.3e9, 4.7e9]."""
    non_embedding_params: list[float] | None = None
    """Parameters without the embedding table and the output head."""
    memory_gb: list[float] | None = None
    """Gigabytes, 1e9 bytes each, of the weights and the key/value cache in the deployment."""
    latency: list[float] | None = None
    """Seconds that one batch of requests takes in the deployment, on one device of this machine.
    Layers of random weights are timed: prompt first, then token by token; only where this is
    given."""

    def __post_init__(self) -> None:
        for name in self.given():
            limits = getattr(self, name)
            if len(limits) not in (1, 2) or min(limits) < 0 or limits != sorted(limits):
                raise MinitronError(
                    f"budget.{name}={limits} is no limit; give the most, or the least and the most"
                )

    def given(self) -> list[str]:
        """What is limited."""
        names = (field.name for field in dataclasses.fields(self))
        return [name for name in names if getattr(self, name) is not None]

    def allows(self, name: str, cost: float) -> bool:
        """Whether a cost is within its limits; one that is not limited always is."""
        limits = getattr(self, name)
        if limits is None:
            return True
        least = limits[0] if len(limits) == 2 else 0.0
        return least <= cost <= limits[-1]


@dataclass(frozen=True, kw_only=True)
class DeploymentConfig:
    """The use for which memory and latency are counted."""

    dtype: Precision = "bf16"
    """Of the weights and of the key/value cache."""
    batch_size: int = 1
    """Requests at a time."""
    context: int = 4096
    """Tokens of a request, prompt and answer; each is kept in the key/value cache."""
    generated: int = 128
    """Tokens of the answer, of those."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise MinitronError(f"deployment.batch_size={self.batch_size} must be at least 1")
        if not 1 <= self.generated < self.context:
            raise MinitronError(
                f"deployment.generated={self.generated} must be at least 1 and below "
                f"deployment.context={self.context}, which holds the prompt too"
            )


@dataclass(frozen=True, kw_only=True)
class RaceConfig:
    """Who is distilled for how long before the worse part drops out."""

    entrants: int = 8
    """Shapes that start: those with the lowest loss right after pruning."""
    rungs: list[int] = field(default_factory=lambda: [100, 200])
    """Steps after which some drop out; the rest goes on to train.steps. The learning rate is that
    of all train.steps for everybody. The paper saw ranks settle near step 300 only: earlier rungs,
    such as the default's, save training and may drop the best shape; [300] is safer."""
    keep: float = 0.5
    """Part that stays at each rung, rounded up."""

    def __post_init__(self) -> None:
        if self.entrants < 1:
            raise MinitronError(f"race.entrants={self.entrants} must be at least 1")
        if not 0 < self.keep <= 1:
            raise MinitronError(f"race.keep={self.keep} must be above 0 and at most 1")
        if any(later <= earlier for earlier, later in itertools.pairwise([0, *self.rungs])):
            raise MinitronError(f"race.rungs={self.rungs} must be steps above 0 that rise")

    def all_rungs(self, steps: int) -> list[int]:
        """The rungs and the last step.

        Raises:
            MinitronError: a rung is not before the last step.
        """
        if steps <= max(self.rungs, default=0):
            raise MinitronError(
                f"race.rungs={self.rungs} must lie before the last step, train.steps={steps}"
            )
        return [*self.rungs, steps]
