"""The `train` section: steps, batches, AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Steps, batches, AdamW and what is written on the way."""

    steps: int = 100
    """Optimizer steps; 0 writes the model as it starts."""
    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""
    global_batch_size: int = 8
    """Samples of one optimizer step, over all ranks."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the last step of the cosine; null means a tenth of `lr`."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to `lr`."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; norms and biases have none."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.95
    """AdamW's decay of the second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 clips nothing."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to recompute in backward instead of keeping: attention's, or whole layers."""
    valid_interval: int = 100
    """Steps between validations; there is always one before the first and after the last step."""
    checkpoint_interval: int = 500
    """Steps between checkpoints to resume from; 0 writes none."""
    keep_checkpoints: int = 2
    """Checkpoints to keep, the newest ones; 0 keeps all."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise MinitronError(f"train.{name}={getattr(self, name)} must be at least 1")
        for name in (
            "steps",
            "lr",
            "min_lr",
            "warmup_steps",
            "weight_decay",
            "clip_grad",
            "valid_interval",
            "checkpoint_interval",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise MinitronError(f"train.{name}={value} must not be negative")
        if self.final_lr > self.lr:
            raise MinitronError(
                f"train.min_lr={self.min_lr:g} is above train.lr={self.lr:g}; lower it"
            )
        if self.steps and self.warmup_steps > self.steps:
            raise MinitronError(
                f"train.warmup_steps={self.warmup_steps} is more than train.steps={self.steps}; "
                "lower it"
            )

    @property
    def final_lr(self) -> float:
        """Learning rate of the last step."""
        return self.lr / 10 if self.min_lr is None else self.min_lr
