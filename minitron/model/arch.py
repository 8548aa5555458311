"""The shape of a Llama: exactly what pruning may change, plus what it must keep."""

from __future__ import annotations

from dataclasses import dataclass

from minitron.errors import MinitronError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's frequency-dependent RoPE scaling (`rope_type: llama3`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder-only Llama, in megatron-core's names.

    The query projection has `num_attention_heads * kv_channels` rows, which need not equal
    `hidden_size`: width pruning changes the hidden size and keeps the heads.
    """

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Embedding channels; the width of the residual stream."""
    ffn_hidden_size: int
    """Neurons of the gated MLP."""
    num_attention_heads: int
    """Query heads."""
    num_query_groups: int
    """Key/value heads; each serves num_attention_heads / num_query_groups query heads."""
    kv_channels: int
    """Dimension of one head."""
    vocab_size: int
    """Rows of the embedding table as the tokenizer counts them, without padding."""
    max_position_embeddings: int = 8192
    """Context length that the model was trained for."""
    share_embeddings_and_output_weights: bool = False
    """True where the embedding table is also the output head (tied)."""
    add_qkv_bias: bool = False
    """Biases on the q, k, v and output projections of attention."""
    add_mlp_bias: bool = False
    """Biases on the three matrices of the MLP."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of the RMS norms."""
    rotary_base: float = 10000.0
    """Base period of RoPE."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's RoPE scaling, or None."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MinitronError(f"{name}={value!r} must be a whole number of at least 1")
        if self.num_attention_heads % self.num_query_groups:
            raise MinitronError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; every key/value head serves the same "
                "number of query heads"
            )
        if self.kv_channels % 2:
            raise MinitronError(f"kv_channels={self.kv_channels} is odd; RoPE rotates pairs")

    def check_seq_length(self, seq_length: int) -> None:
        """Refuse samples that are longer than the model's context.

        RoPE scaling needs no room of its own: `max_position_embeddings` counts what it adds.

        Raises:
            MinitronError: with the longest length that would do.
        """
        if seq_length > self.max_position_embeddings:
            raise MinitronError(
                f"data.seq_length={seq_length} is longer than the model's context; use at most "
                f"max_position_embeddings={self.max_position_embeddings}, or raise that in its "
                "config.json to train a longer one"
            )

    @property
    def query_size(self) -> int:
        """Rows of the query projection: heads times head dimension."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_size(self) -> int:
        """Rows of the key (or value) projection: groups times head dimension."""
        return self.num_query_groups * self.kv_channels

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters of the embedding table and, where it is not tied, of the output head."""
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return tables * self.vocab_size * self.hidden_size

    @property
    def num_non_embedding_parameters(self) -> int:
        """Parameters of all layers and the final norm."""
        h, f, q, kv = self.hidden_size, self.ffn_hidden_size, self.query_size, self.kv_size
        attention = h * (q + 2 * kv) + q * h
        mlp = 3 * h * f
        norms = 2 * h
        biases = self.add_qkv_bias * (q + 2 * kv + h) + self.add_mlp_bias * (2 * f + h)
        return self.num_layers * (attention + mlp + norms + biases) + h

    @property
    def num_parameters(self) -> int:
        """All parameters, without any padding of the vocabulary."""
        return self.num_embedding_parameters + self.num_non_embedding_parameters
