"""How a model answers."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are drawn from the model's distribution."""

    max_new_tokens: int = 512
    """Most tokens of a response; it is also cut where the model's context ends."""
    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 1.0
    """Draw among the fewest tokens that have this probability together."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MinitronError(f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise MinitronError(f"sampling.temperature={self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise MinitronError(f"sampling.top_p={self.top_p} must be above 0 and at most 1")
