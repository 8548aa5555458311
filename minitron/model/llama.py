"""Llama as megatron-core's GPTModel: tensor-, sequence- and pipeline-parallel.

`build_llama` makes this rank's part of a model and fills it from a weight source; `build_chunks`
does so for the interleaved schedule, which gives a rank several parts. On the last
pipeline stage the model's output is the *final hidden state* rather than logits: whoever needs
logits asks for them (`LlamaModel.logits`), and a distillation step can keep the hidden states of a
teacher, which are some thirty times smaller than its logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from minitron import platform
from minitron.errors import MinitronError
from minitron.model import sharding
from minitron.model.arch import Architecture
from minitron.model.attention import CausalAttention
from minitron.model.norm import RMSNorm
from minitron.model.weights import WeightSource
from minitron.parallel import Topology
from minitron.sections.parallel import ParallelConfig

Recompute = Literal["none", "selective", "full"]


class LlamaModel(GPTModel):
    """This rank's stage of a Llama, or a chunk of it; made by `build_llama` or `build_chunks`."""

    arch: Architecture
    topology: Topology
    companion: torch.nn.Module
    """Trained and saved in checkpoints with the model, no part of it; absent unless given to it."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # GPTModel goes on to the logits and the loss here; see the module docstring.
        return hidden_states

    def hidden_states(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Run this stage.

        Args:
            tokens: [b, s] token ids (used on the first stage).
            position_ids: [b, s].

        Returns:
            [s, b, h], or [s/t, b, h] under sequence parallelism: the stage's output; on the last
            stage after the final norm.
        """
        return self(tokens, position_ids, None)

    def logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary-parallel logits [s, b, v/t] of final hidden states [s, b, h] or [s/t, b, h].

        The last `padded - vocab_size` columns of the last ranks are padding: see `valid_columns`.
        """
        return self.output_layer(hidden, weight=self.head)[0]

    @property
    def head(self) -> Tensor:
        """This rank's rows [v/t, h] of the matrix that turns hidden states into logits."""
        shared = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if shared else self.output_layer.weight

    @property
    def valid_columns(self) -> int:
        """Columns of this rank's logits that stand for a token; the rest pad the vocabulary."""
        return self.columns_of(self.arch.vocab_size)

    def columns_of(self, vocab_size: int) -> int:
        """Columns of this rank's logits that stand for one of the first `vocab_size` tokens."""
        width = self.vocab_size // self.topology.tp_size
        return min(max(vocab_size - self.topology.tp_rank * width, 0), width)


def check_parallel(arch: Architecture, config: ParallelConfig) -> None:
    """Refuse a model that the tensor- or pipeline-parallel size does not divide.

    Raises:
        MinitronError: with the sizes and those that would do.
    """
    tp = config.tensor_model_parallel_size
    for name in ("num_attention_heads", "ffn_hidden_size"):
        size = getattr(arch, name)
        if size % tp:
            raise MinitronError(
                f"{name}={size} is not divisible by parallel.tensor_model_parallel_size={tp}; "
                f"use {_divisors(size)}"
            )
    groups = arch.num_query_groups
    if groups % tp and tp % groups:
        raise MinitronError(
            f"num_query_groups={groups} is neither a multiple nor a divisor of "
            f"parallel.tensor_model_parallel_size={tp}; use {_divisors(groups)}"
        )
    config.split_layers(arch.num_layers)


def _divisors(size: int) -> str:
    *rest, last = [str(d) for d in range(1, min(size, 64) + 1) if size % d == 0]
    return f"{', '.join(rest)} or {last}" if rest else last


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding table inside the model: a multiple of 128 on every rank."""
    multiple = 128 * tp_size
    return -(-vocab_size // multiple) * multiple


def build_llama(
    arch: Architecture,
    topology: Topology,
    source: WeightSource | None,
    *,
    dtype: torch.dtype,
    transformer_impl: Literal["auto", "local"] = "auto",
    recompute: Recompute = "none",
    padded_vocab: int | None = None,
) -> LlamaModel:
    """Build this rank's part of a Llama on its device and read its slices of the weights.

    A stage is one chunk here, whatever the recipe says of training.

    Args:
        arch: the model's shape.
        topology: this rank's place.
        source: where the weights come from, of which only this rank's slices are read; None leaves
            the parameters to the caller.
        dtype: of the parameters and activations.
        transformer_impl: `auto` takes Transformer Engine's layers where they work, `local` always
            takes the plain ones, whose norms can be hooked.
        recompute: activations to recompute in backward: none, attention's, or whole layers.
        padded_vocab: rows of the embedding table inside the model; None for the least that does.

    Raises:
        MinitronError: the sizes do not divide, or a tensor is missing or damaged.
    """
    (model,) = build_chunks(
        arch,
        dataclasses.replace(topology, config=topology.config.without_interleaving()),
        source,
        dtype=dtype,
        transformer_impl=transformer_impl,
        recompute=recompute,
        padded_vocab=padded_vocab,
    )
    return model


def build_chunks(
    arch: Architecture,
    topology: Topology,
    source: WeightSource | None,
    *,
    dtype: torch.dtype,
    transformer_impl: Literal["auto", "local"] = "auto",
    recompute: Recompute = "none",
    padded_vocab: int | None = None,
) -> list[LlamaModel]:
    """Build this rank's chunks of a Llama, in the model's order; arguments as of `build_llama`.

    There is one, unless `parallel.virtual_pipeline_model_parallel_size` asks for more.
    """
    check_parallel(arch, topology.config)
    use_te = transformer_impl == "auto" and platform.has_transformer_engine()
    config = _transformer_config(arch, topology, dtype, recompute)
    layer = _te_layer_spec(arch) if use_te else _local_layer_spec(arch)
    layers = topology.config.split_layers(arch.num_layers)[topology.pp_rank :: topology.pp_size]
    chunks = []
    for vp_stage, num_layers in enumerate(layers):
        chunk = LlamaModel(
            config,
            layer if use_te else _block_spec(layer, num_layers),
            vocab_size=padded_vocab or padded_vocab_size(arch.vocab_size, topology.tp_size),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=topology.is_first_stage and vp_stage == 0,
            post_process=topology.is_last_stage and vp_stage == len(layers) - 1,
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            rotary_base=arch.rotary_base,
            pg_collection=topology.groups,
            vp_stage=vp_stage,
        )
        _finish(chunk, arch, topology, source)
        chunks.append(chunk)
    return chunks


def _finish(
    model: LlamaModel, arch: Architecture, topology: Topology, source: WeightSource | None
) -> None:
    """Complete what GPTModel has built, and fill it."""
    model.arch, model.topology = arch, topology
    rope = model.rotary_pos_emb
    if arch.rope_scaling is not None:
        # The constructor takes the factor alone; the other three are the model's too.
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **dataclasses.asdict(arch.rope_scaling))
    model.to(platform.device())
    sharding.mark_partitions(model, arch)
    if source is not None:
        sharding.load_weights(model, arch, topology, source)


def freeze(model: LlamaModel) -> LlamaModel:
    """Make a model read-only: no gradients, evaluation mode."""
    model.requires_grad_(False)
    return model.eval()


def _transformer_config(
    arch: Architecture, topology: Topology, dtype: torch.dtype, recompute: Recompute
) -> TransformerConfig:
    cuda = platform.has_cuda()
    stages = topology.config.split_layers(arch.num_layers)
    layout = [["decoder"] * n for n in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    extra: dict[str, Any] = {}
    if recompute == "full":
        extra = {"recompute_method": "uniform", "recompute_num_layers": 1}
    if topology.config.is_interleaved:
        # Batched sends do not say whether they are activations or gradients, and between two stages
        # both go both ways: one is taken for the other.
        extra |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        add_qkv_bias=arch.add_qkv_bias,
        add_bias_linear=False,  # the layer specs say which matrices have one
        normalization="RMSNorm",
        layernorm_epsilon=arch.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # The fusions are torch.compile'd: worth it on a GPU, a minute of compiling on a CPU.
        bias_activation_fusion=cuda,
        bias_dropout_fusion=cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every parameter is loaded
        use_cpu_initialization=not cuda,
        tensor_model_parallel_size=topology.tp_size,
        pipeline_model_parallel_size=topology.pp_size,
        pipeline_model_parallel_layout=layout if topology.pp_size > 1 else None,
        sequence_parallel=topology.config.sequence_parallel and topology.tp_size > 1,
        calculate_per_token_loss=True,
        recompute_granularity=None if recompute == "none" else recompute,
        **extra,
    )


def _with_bias(linear: type, bias: bool) -> Callable[..., torch.nn.Module]:
    """`linear` with a bias or none: megatron-core's switches do not tell these matrices apart."""

    class Linear(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": bias})

    Linear.__name__ = Linear.__qualname__ = linear.__name__
    return Linear


def _local_layer_spec(arch: Architecture) -> ModuleSpec:
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=CausalAttention,
        linear_proj=_with_bias(RowParallelLinear, arch.add_qkv_bias),
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    mlp = MLPSubmodules(
        linear_fc1=_with_bias(ColumnParallelLinear, arch.add_mlp_bias),
        linear_fc2=_with_bias(RowParallelLinear, arch.add_mlp_bias),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            # Checkpoints name the norms as Transformer Engine's fused layers do.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _te_layer_spec(arch: Architecture) -> ModuleSpec:
    spec = get_gpt_layer_with_transformer_engine_spec()
    attention = spec.submodules.self_attention.submodules
    attention.linear_proj = _with_bias(attention.linear_proj, arch.add_qkv_bias)
    mlp = spec.submodules.mlp.submodules
    mlp.linear_fc1 = _with_bias(mlp.linear_fc1, arch.add_mlp_bias)
    mlp.linear_fc2 = _with_bias(mlp.linear_fc2, arch.add_mlp_bias)
    return spec


def _block_spec(layer: ModuleSpec, num_layers: int) -> TransformerBlockSubmodules:
    """A chunk's layers under our final norm (a bare layer spec brings megatron-core's own)."""
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
