"""RMSNorm for the path without Transformer Engine."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm whose weight's gradient is summed over sequence-parallel ranks.

    megatron-core's own torch norm refuses sequence parallelism; all it takes is that the weight
    says so, since every rank then sees only its part of the sequence.

    Args:
        config: the model's; its `sequence_parallel` and `params_dtype` are used.
        hidden_size: length of the weight.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [s, b, h] over its last dimension."""
        return torch.nn.functional.rms_norm(x, (x.size(-1),), self.weight, self.eps)
