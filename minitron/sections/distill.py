"""The teacher, the losses, and what a store keeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The model to learn from, and how it shares the ranks with the student; or what is stored of
    it."""

    path: Path | None = None
    """Its Hugging Face directory."""
    logits: Path | None = None
    """Instead of the model: a store of its outputs, the `out` of launch/cache_logits.py."""
    window: int | None = None
    """Micro-batches whose teacher states exist at a time, `window · s · b · h_teacher` floats on
    each rank of the last stage; null takes as many as fit in 1 GiB, with the states of intermediate
    losses on the rank that has most, and at least four for each pipeline stage, or all of a step if
    they are offloaded. The result is the same for all."""
    offload_states: bool = False
    """Keep the states, those of intermediate losses too, in host memory until the student's loss
    asks for them."""
    placement: Literal["resident", "offload"] = "resident"
    """Where the teacher's weights are while the student trains: on the device, or in host memory,
    from which every window fetches them. The output head stays on the last stage's device."""
    layers_per_stage: list[int] | None = None
    """Teacher layers of each pipeline stage; null spreads them evenly."""
    allow_untrained: bool = False
    """Learn even from a teacher that predicts the training data no better than chance."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.logits is None):
            found = "both were given" if self.path is not None else "neither was given"
            raise MinitronError(f"give either --teacher.path or --teacher.logits; {found}")
        of_model = ("window", "offload_states", "placement", "layers_per_stage", "allow_untrained")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = [name for name in of_model if getattr(self, name) != defaults[name]]
        if self.logits is not None and given:
            raise MinitronError(
                f"teacher.{given[0]} is of a teacher at hand, not of the store {self.logits}; "
                "leave it out, or give --teacher.path"
            )
        if self.window is not None and self.window < 1:
            raise MinitronError(f"teacher.window={self.window} must be at least 1")

    @property
    def source(self) -> Path:
        """What the student learns from: the model or the store."""
        source = self.path or self.logits
        assert source is not None
        return source


StateName = Literal["embedding", "block_output", "mlp_input", "attention_relation"]


@dataclass(frozen=True, kw_only=True)
class IntermediateConfig:
    """Losses between states inside the models, besides the one between their logits."""

    states: list[StateName] = field(default_factory=list)
    """What to compare, each after a layer norm: the embedding, the output of a layer, the input of
    its MLP, the relations among its queries, keys and values; none switches the losses off."""
    layers: list[tuple[int, int]] = field(default_factory=lambda: [(-3, -3)])
    """Pairs of a student's and a teacher's layer, counted from 0, or from the end if negative:
    [[13, 29], [15, 31]]."""
    loss: Literal["cosine", "mse"] = "cosine"
    """Of all states but the relations, which have a KL divergence."""
    weight: Literal["dynamic"] | float = "dynamic"
    """Factor of their sum; dynamic makes it as large as the loss of the logits."""

    def __post_init__(self) -> None:
        for name in ("states", "layers"):
            values = getattr(self, name)
            if len(set(map(str, values))) < len(values):
                raise MinitronError(
                    f"distill.intermediate.{name}={[*values]} names something twice; leave one"
                )
        if self.weight != "dynamic" and self.weight < 0:
            raise MinitronError(f"distill.intermediate.weight={self.weight} must not be negative")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What the student learns from the teacher."""

    loss: Literal[
        "forward_kl",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "tvd",
        "mse",
        "cosine",
        "top_k",
        "top_p",
    ] = "forward_kl"
    """Between the next-token distributions. `forward_kl` is KL(teacher || student) over the whole
    vocabulary; `top_k` and `top_p` over the teacher's most probable tokens and one bin for all
    others; `mse` and `cosine` compare logits less their mean over the vocabulary."""
    temperature: float = 1.0
    """Divides the logits of both (the cosine does not depend on it)."""
    temperature_power: float = 0.0
    """The loss is multiplied by this power of the temperature; 2 keeps gradients comparable."""
    lm_weight: float = 0.0
    """What the cross-entropy with the data counts beside the loss."""
    jsd_beta: float = 0.5
    """The teacher's share of the mixture in `jsd`; the forward KL is near 0, the reverse near 1."""
    skew_alpha: float = 0.1
    """How much of itself the first distribution of `skew_kl` and `skew_reverse_kl` finds mixed into
    the second; 0 would be the plain KL."""
    top_k: int = 256
    """Tokens of the teacher that `top_k` compares one by one, and at most so many in `top_p`."""
    top_p: float = 0.95
    """Probability that the tokens compared one by one in `top_p` have together."""
    intermediate: IntermediateConfig = field(default_factory=IntermediateConfig)
    """Losses between states inside the models, added to that of the logits."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise MinitronError(f"distill.temperature={self.temperature} must be positive")
        if self.lm_weight < 0:
            raise MinitronError(f"distill.lm_weight={self.lm_weight} must not be negative")
        if not 0 < self.jsd_beta < 1:
            raise MinitronError(
                f"distill.jsd_beta={self.jsd_beta} must lie between 0 and 1; at the ends take "
                "distill.loss=forward_kl or reverse_kl"
            )
        if not 0 < self.skew_alpha < 1:
            raise MinitronError(
                f"distill.skew_alpha={self.skew_alpha} must lie between 0 and 1; for 0 take "
                "distill.loss=forward_kl or reverse_kl"
            )
        if self.top_k < 1:
            raise MinitronError(f"distill.top_k={self.top_k} must be at least 1")
        if not 0 < self.top_p <= 1:
            raise MinitronError(f"distill.top_p={self.top_p} must lie in (0, 1]")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse to compare more tokens than both models know.

        Raises:
            MinitronError: with the size.
        """
        if self.loss == "top_k" and self.top_k > vocab_size:
            raise MinitronError(
                f"distill.top_k={self.top_k} is more than the vocabulary of {vocab_size}; lower "
                "it, or set distill.loss=forward_kl for all of it"
            )


FloatType = Literal["fp16", "fp32"]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What to keep of the teacher's distribution at each token: `top_k` or `draws`."""

    top_k: int | None = None
    """The most probable successors, with the probability of all others as one more number."""
    draws: int | None = None
    """Successors drawn in proportion to their probability, an unbiased estimate of all of it; the
    KL divergence that it gives may be below zero."""
    temperature: float = 1.0
    """Divides the logits; has to be the `distill.temperature` of the students."""
    max_samples: int | None = None
    """Only the training samples that a run with the same data and seed visits first, validation
    not counted; null for all."""
    floats: FloatType = "fp16"
    """Of stored logarithms."""
    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""

    def __post_init__(self) -> None:
        if (self.top_k is None) == (self.draws is None):
            given = "both were given" if self.top_k is not None else "neither was given"
            raise MinitronError(f"give either --cache.top_k or --cache.draws; {given}")
        for name in ("top_k", "draws", "max_samples", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MinitronError(f"cache.{name}={value} must be at least 1")
        if self.draws is not None and self.draws >= 1 << 16:
            raise MinitronError(f"cache.draws={self.draws} must be below {1 << 16}")
        if self.temperature <= 0:
            raise MinitronError(f"cache.temperature={self.temperature} must be positive")
