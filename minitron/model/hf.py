"""Hugging Face's names for a Llama: its config, its tensors, and what each dimension counts.

The only file that knows them. One table, `tensor_axes`, drives everything that looks at a tensor
from outside: shapes and parameter counts, the layout of files, pruning. How a rank's Megatron
parameters are cut from these tensors is `sharding.py`.

Both spellings of RoPE are read and written: transformers 4 has `rope_theta` and `rope_scaling`,
transformers 5 nests them in `rope_parameters` and silently falls back to theta 10000 in the
other direction.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from minitron import artifact
from minitron.errors import MinitronError
from minitron.model.arch import Architecture, RopeScaling
from minitron.model.weights import TensorInfo, WeightReader

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")

Axis = Literal["vocab", "hidden", "ffn", "query", "kv"]
"""What a dimension counts; `query` is heads x head dimension, `kv` groups x head dimension."""

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

_LAYER_AXES: dict[str, tuple[Axis, ...]] = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("kv",),
    "self_attn.v_proj.bias": ("kv",),
    "self_attn.o_proj.bias": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("ffn", "hidden"),
    "mlp.up_proj.weight": ("ffn", "hidden"),
    "mlp.down_proj.weight": ("hidden", "ffn"),
    "mlp.gate_proj.bias": ("ffn",),
    "mlp.up_proj.bias": ("ffn",),
    "mlp.down_proj.bias": ("hidden",),
}


def layer_tensor(layer: int, suffix: str) -> str:
    """Full name of a layer's tensor; layers count from 0."""
    return f"model.layers.{layer}.{suffix}"


def split_layer_tensor(name: str) -> tuple[int | None, str]:
    """The layer of a tensor and the rest of its name; None for a tensor outside the layers."""
    if not name.startswith("model.layers."):
        return None, name
    layer, suffix = name.removeprefix("model.layers.").split(".", 1)
    return int(layer), suffix


def tensor_axes(arch: Architecture) -> dict[str, tuple[Axis, ...]]:
    """Every tensor of the model, in file order, with what each of its dimensions counts."""
    axes: dict[str, tuple[Axis, ...]] = {EMBEDDING: ("vocab", "hidden")}
    for layer in range(arch.num_layers):
        for suffix, suffix_axes in _LAYER_AXES.items():
            if suffix.endswith(".bias"):
                has_bias = arch.add_mlp_bias if suffix.startswith("mlp.") else arch.add_qkv_bias
                if not has_bias:
                    continue
            axes[layer_tensor(layer, suffix)] = suffix_axes
    axes[FINAL_NORM] = ("hidden",)
    if not arch.share_embeddings_and_output_weights:
        axes[LM_HEAD] = ("vocab", "hidden")
    return axes


def axis_size(arch: Architecture, axis: Axis) -> int:
    """Length of a dimension that counts `axis`."""
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "query": arch.query_size,
        "kv": arch.kv_size,
    }[axis]


def tensor_infos(arch: Architecture, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Shape and dtype of every tensor of the model, in file order."""
    return {
        name: TensorInfo(tuple(axis_size(arch, axis) for axis in axes), dtype)
        for name, axes in tensor_axes(arch).items()
    }


def read_architecture(directory: Path) -> Architecture:
    """The architecture that a model directory's `config.json` describes.

    Raises:
        MinitronError: the directory or its config is missing, or asks for something that is not
            a Llama (another model type, activation or RoPE variant).
    """
    if not directory.is_dir():
        raise MinitronError(f"{directory} is not a directory; give a Hugging Face model directory")
    if not (directory / CONFIG_FILE).exists():
        raise MinitronError(
            f"{directory} has no {CONFIG_FILE}; give a Hugging Face model directory "
            "(launch/export.py makes one of a run's checkpoint)"
        )
    config = artifact.read_json(directory / CONFIG_FILE)
    try:
        return architecture_from_config(config)
    except KeyError as error:
        raise MinitronError(f"{directory / CONFIG_FILE} lacks the key {error}") from None
    except (AttributeError, TypeError, ValueError) as error:
        raise MinitronError(
            f"{directory / CONFIG_FILE} holds a value of the wrong type ({error})"
        ) from None
    except MinitronError as error:
        raise MinitronError(f"{directory / CONFIG_FILE}: {error}") from None


def read_dtype(directory: Path) -> torch.dtype:
    """The dtype that a model directory's `config.json` names; fp32 if it names none."""
    config = artifact.read_json(directory / CONFIG_FILE)
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise MinitronError(f"{directory / CONFIG_FILE}: dtype={name!r} is no floating-point type")
    return dtype


def architecture_from_config(config: Mapping[str, Any]) -> Architecture:
    """Translate a Llama `config.json`, in the spelling of transformers 4 or 5."""
    for key, supported in (("model_type", "llama"), ("hidden_act", "silu")):
        if config.get(key, supported) != supported:
            raise MinitronError(f"{key}={config[key]!r} is not supported; only {supported!r} is")
    if config.get("quantization_config"):
        raise MinitronError("the checkpoint is quantised; give the unquantised model")
    # transformers 5 lets the old spelling win where both are given.
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    rotated = rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    if rotated != 1.0:
        raise MinitronError(f"partial_rotary_factor={rotated} is not supported; only 1.0 is")
    heads = config["num_attention_heads"]
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        share_embeddings_and_output_weights=config.get("tie_word_embeddings", False),
        add_qkv_bias=config.get("attention_bias", False),
        add_mlp_bias=config.get("mlp_bias", False),
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
        rotary_base=float(theta),
        rope_scaling=_rope_scaling(rope),
    )


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise MinitronError(f"RoPE type {kind!r} is not supported; 'default' and 'llama3' are")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def check_shape(arch: Architecture) -> None:
    """Refuse a shape whose config transformers would refuse, even with an explicit `head_dim`.

    Raises:
        MinitronError: the hidden size is not a multiple of the number of heads.
    """
    heads, remainder = arch.num_attention_heads, arch.hidden_size % arch.num_attention_heads
    if remainder:
        below = arch.hidden_size - remainder
        raise MinitronError(
            f"hidden_size={arch.hidden_size} is not a multiple of num_attention_heads={heads}, "
            f"which transformers demands; choose {f'{below} or ' if below else ''}{below + heads}"
        )


def config_from_architecture(
    arch: Architecture, *, dtype: torch.dtype, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A `config.json` that transformers 4 and 5, vLLM, TensorRT-LLM and llama.cpp read alike.

    Args:
        arch: the shape to describe.
        dtype: dtype of the tensors beside it.
        base: the config of the model this one comes from; keys that the shape does not decide
            (token ids, initializer range) are kept.

    Raises:
        MinitronError: transformers would refuse the shape.
    """
    check_shape(arch)
    scaling: dict[str, Any] | None = None
    if arch.rope_scaling is not None:
        scaling = {
            "rope_type": "llama3",
            "factor": arch.rope_scaling.factor,
            "low_freq_factor": arch.rope_scaling.low_freq_factor,
            "high_freq_factor": arch.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": arch.rope_scaling.original_max_position_embeddings,
        }
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        **(base or {}),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_position_embeddings,
        "rms_norm_eps": arch.layernorm_epsilon,
        "attention_bias": arch.add_qkv_bias,
        "mlp_bias": arch.add_mlp_bias,
        "tie_word_embeddings": arch.share_embeddings_and_output_weights,
        "rope_theta": arch.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {
            "rope_theta": arch.rotary_base,
            **(scaling or {"rope_type": "default"}),
        },
        "torch_dtype": dtype_name,
        "dtype": dtype_name,
    }


def open_weights(directory: Path, arch: Architecture) -> WeightReader:
    """Open a model directory and check that it holds exactly the tensors that `arch` needs.

    Two kinds of surplus change nothing and pass: the rotary frequencies that old checkpoints hold,
    and a tied output head that equals the embedding table.

    Raises:
        MinitronError: a file is damaged, or a tensor is missing, unknown or of another shape.
    """
    reader = WeightReader(directory)
    for name, info in tensor_infos(arch, torch.float32).items():
        if name not in reader:
            remedy = "set tie_word_embeddings if it is tied" if name == LM_HEAD else "restore it"
            raise MinitronError(f"{directory} lacks the tensor {name}; {remedy}")
        if reader.infos[name].shape != info.shape:
            raise MinitronError(
                f"{directory}: {name} has shape {list(reader.infos[name].shape)}, "
                f"{CONFIG_FILE} implies {list(info.shape)}; correct the one that is wrong"
            )
    for name in reader.infos.keys() - tensor_axes(arch).keys():
        if name == LM_HEAD:
            if not _equal(reader, LM_HEAD, EMBEDDING):
                raise MinitronError(
                    f"{directory}: {LM_HEAD} differs from {EMBEDDING}, {CONFIG_FILE} says that "
                    "they are tied; set tie_word_embeddings to false"
                )
        elif not name.endswith("rotary_emb.inv_freq"):
            raise MinitronError(
                f"{directory} holds {name}, which the model that {CONFIG_FILE} describes does not "
                "have; correct the config"
            )
    return reader


def _equal(reader: WeightReader, first: str, second: str) -> bool:
    rows = reader.infos[first].shape[0]
    return reader.infos[first] == reader.infos[second] and all(
        torch.equal(reader.read(first, part), reader.read(second, part))
        for part in (slice(row, row + 8192) for row in range(0, rows, 8192))
    )


def write_config(
    directory: Path,
    arch: Architecture,
    *,
    dtype: torch.dtype,
    base_dir: Path | None = None,
) -> None:
    """Write `config.json`; what else the model this one comes from has is copied byte for byte.

    Re-saving a tokenizer through transformers 5 makes it unreadable for transformers 4; copies
    stay what they were.

    Args:
        directory: the model directory.
        arch: its shape.
        dtype: dtype of its tensors.
        base_dir: the model this one comes from, for the rest of its config, its tokenizer and its
            generation config.
    """
    base = artifact.read_json(base_dir / CONFIG_FILE) if base_dir else None
    config = config_from_architecture(arch, dtype=dtype, base=base)
    artifact.write_json(directory / CONFIG_FILE, config)
    if base_dir is not None:
        for name in COPIED_FILES:
            if (base_dir / name).exists():
                shutil.copyfile(base_dir / name, directory / name)
