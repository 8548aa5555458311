"""Core attention for the path without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CausalAttention(torch.nn.Module):
    """Causal grouped-query attention through PyTorch's fused kernels.

    megatron-core's local one materialises the [s, s] scores; this one needs neither them nor a
    mask. Constructor and call follow megatron-core's `core_attention` protocol.

    Raises:
        ValueError: the layer asks for a mask other than the causal one.
    """

    def __init__(
        self, config: TransformerConfig, *, attn_mask_type: AttnMaskType, **_: Any
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"only causal attention is implemented, not {attn_mask_type}")
        self.scale = config.softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, n/t, d]; while decoding, [1, b, n/t, d] of the last of the keys' tokens.
            key: [s, b, g/t, d].
            value: [s, b, g/t, d].
            attention_mask: ignored; the mask is causal.

        Returns:
            [s, b, n/t * d].
        """
        s, b, n, d = query.shape
        out = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),  # [b, n/t, s, d]
            key.permute(1, 2, 0, 3),  # [b, g/t, s, d]
            value.permute(1, 2, 0, 3),  # [b, g/t, s, d]
            is_causal=key.size(0) == s,  # a single query is the last, and sees all keys
            scale=self.scale,
            enable_gqa=key.size(2) != n,
        )
        return out.permute(2, 0, 1, 3).reshape(s, b, n * d)  # [s, b, n/t * d]
