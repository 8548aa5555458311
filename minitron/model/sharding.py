"""Which part of which Hugging Face tensor each rank's Megatron parameter is.

megatron-core packs q, k and v (group by group) and gate and up into one matrix each, cuts along
one dimension for tensor parallelism, and pads the vocabulary. One description, `row_segments`,
says for every rank which rows of which tensors lie where in its parameter; reading copies along it
in one direction and writing in the other, so that a model read and written again is the same bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import artifact, parallel
from minitron.metrics import log
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.weights import WeightReader, WeightSource, WeightWriter
from minitron.parallel import Topology

if TYPE_CHECKING:
    from minitron.model.llama import LlamaModel


@dataclass(frozen=True)
class Packing:
    """How a Megatron parameter is made of Hugging Face tensors.

    One source is taken as it is; two (gate, up) are halves of each rank's rows; three (q, k, v)
    are interleaved group by group.
    """

    sources: tuple[str, ...]
    partition_dim: int | None
    """Dimension cut by tensor parallelism; None where every rank holds the whole."""


def _packings() -> dict[str, Packing]:
    def qkv(kind: str) -> tuple[str, ...]:
        return tuple(f"self_attn.{p}_proj.{kind}" for p in "qkv")

    def gated(kind: str) -> tuple[str, ...]:
        return (f"mlp.gate_proj.{kind}", f"mlp.up_proj.{kind}")

    input_norm = Packing(("input_layernorm.weight",), None)
    mlp_norm = Packing(("post_attention_layernorm.weight",), None)
    return {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.layer_norm_weight": input_norm,  # Transformer Engine's
        "self_attention.linear_qkv.weight": Packing(qkv("weight"), 0),
        "self_attention.linear_qkv.bias": Packing(qkv("bias"), 0),
        "self_attention.linear_proj.weight": Packing(("self_attn.o_proj.weight",), 1),
        "self_attention.linear_proj.bias": Packing(("self_attn.o_proj.bias",), None),
        "pre_mlp_layernorm.weight": mlp_norm,
        "mlp.linear_fc1.layer_norm_weight": mlp_norm,  # Transformer Engine's
        "mlp.linear_fc1.weight": Packing(gated("weight"), 0),
        "mlp.linear_fc1.bias": Packing(gated("bias"), 0),
        "mlp.linear_fc2.weight": Packing(("mlp.down_proj.weight",), 1),
        "mlp.linear_fc2.bias": Packing(("mlp.down_proj.bias",), None),
    }


_LAYER_PACKINGS = _packings()
_LAYER_PARAMETER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def packed_parameters(
    model: LlamaModel, arch: Architecture
) -> Iterator[tuple[torch.nn.Parameter, Packing]]:
    """This rank's parameters in order, each with the full names of the tensors it is made of."""
    tied = arch.share_embeddings_and_output_weights
    outer = {
        "embedding.word_embeddings.weight": Packing((hf.EMBEDDING,), 0),
        "decoder.final_layernorm.weight": Packing((hf.FINAL_NORM,), None),
        "output_layer.weight": Packing((hf.EMBEDDING if tied else hf.LM_HEAD,), 0),
    }
    for name, parameter in model.named_parameters():
        if name.startswith("companion."):
            continue
        match = _LAYER_PARAMETER.fullmatch(name)
        if match is None:
            yield parameter, outer[name]
            continue
        layer = model.decoder.layers[int(match[1])].layer_number - 1
        packing = _LAYER_PACKINGS[match[2]]
        sources = tuple(hf.layer_tensor(layer, source) for source in packing.sources)
        yield parameter, Packing(sources, packing.partition_dim)


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of tensor number `source`."""

    source: int
    start: int
    stop: int


def row_segments(
    arch: Architecture, packing: Packing, num_rows: int, tp_rank: int, tp_size: int
) -> list[Segment]:
    """The tensors' rows that a rank's parameter holds, from top to bottom.

    Args:
        arch: the model's shape.
        packing: of the parameter, cut along dimension 0.
        num_rows: rows of the rank's parameter; they may end in padding that no segment covers.
        tp_rank: the rank.
        tp_size: ranks that share the parameter.
    """
    if len(packing.sources) == 1:  # the vocabulary, the only padded dimension
        start = min(tp_rank * num_rows, arch.vocab_size)
        stop = min(start + num_rows, arch.vocab_size)
        return [Segment(0, start, stop)] if stop > start else []
    if len(packing.sources) == 2:
        half = num_rows // 2
        return [Segment(i, tp_rank * half, (tp_rank + 1) * half) for i in (0, 1)]
    # With fewer groups than ranks a rank's share may begin inside a group, even inside a head.
    first, last = tp_rank * num_rows, (tp_rank + 1) * num_rows
    query = arch.query_size // arch.num_query_groups
    segments = []
    position = 0
    for group in range(arch.num_query_groups):
        for source, size in enumerate((query, arch.kv_channels, arch.kv_channels)):
            low, high = max(first, position), min(last, position + size)
            if low < high:
                offset = group * size - position
                segments.append(Segment(source, low + offset, high + offset))
            position += size
    return segments


def open_model(directory: Path) -> tuple[Architecture, WeightReader]:
    """A model directory's shape and weights, checked against its manifest; call on all ranks.

    Raises:
        MinitronError: the directory is no Llama, or a file is missing or damaged.
    """
    arch = hf.read_architecture(directory)
    log(f"reading {directory}: {arch.num_parameters:,} parameters")
    parallel.on_rank_zero(lambda: artifact.verify(directory))
    return arch, hf.open_weights(directory, arch)


def mark_partitions(model: LlamaModel, arch: Architecture) -> None:
    """Let every parameter say whether tensor parallelism cuts it.

    Gradient norms count one that does not say so only on the first rank of its group.
    """
    for parameter, packing in packed_parameters(model, arch):
        parameter.tensor_model_parallel = packing.partition_dim is not None  # type: ignore[attr-defined]
        parameter.partition_dim = packing.partition_dim  # type: ignore[attr-defined]


def load_weights(
    model: LlamaModel, arch: Architecture, topology: Topology, source: WeightSource
) -> None:
    """Fill this rank's parameters, reading only its slices."""
    with torch.no_grad():
        for parameter, packing in packed_parameters(model, arch):
            _read_shard(parameter, arch, packing, topology, source)


def _read_shard(
    parameter: Tensor,
    arch: Architecture,
    packing: Packing,
    topology: Topology,
    source: WeightSource,
) -> None:
    if packing.partition_dim is None:
        parameter.copy_(source.read(packing.sources[0]))
        return
    if packing.partition_dim == 1:
        width = parameter.size(1)
        start = topology.tp_rank * width
        parameter.copy_(source.read(packing.sources[0], slice(None), slice(start, start + width)))
        return
    row = 0
    rank, size = topology.tp_rank, topology.tp_size
    for segment in row_segments(arch, packing, parameter.size(0), rank, size):
        rows = source.read(packing.sources[segment.source], slice(segment.start, segment.stop))
        parameter[row : row + rows.size(0)].copy_(rows)
        row += rows.size(0)
    parameter[row:].zero_()  # padding of the vocabulary


def save_model(
    model: Sequence[LlamaModel],
    directory: Path,
    *,
    dtype: torch.dtype,
    base_dir: Path | None = None,
) -> None:
    """Write a model as a Hugging Face directory, from all ranks, one tensor at a time.

    The first tensor-parallel rank of every pipeline stage gathers a parameter and writes its
    tensors to their place; no rank ever holds more than one of them.

    Args:
        model: this rank's chunks; data-parallel replicas other than the first only wait.
        directory: exists; the files in it are complete when all ranks return.
        dtype: of the tensors on disk.
        base_dir: model directory whose other config keys and tokenizer are kept.
    """
    arch, topology = model[0].arch, model[0].topology
    writer = WeightWriter(directory, hf.tensor_infos(arch, dtype))

    def create() -> None:
        writer.create()
        hf.write_config(directory, arch, dtype=dtype, base_dir=base_dir)

    parallel.on_rank_zero(create)
    if topology.dp_rank == 0:
        for parameter, packing in itertools.chain(*(packed_parameters(m, arch) for m in model)):
            if packing.sources == (hf.EMBEDDING,) and not topology.is_first_stage:
                continue  # the tied copy on the last stage
            shards = _gather_shards(parameter.detach(), packing, topology)
            if shards is None:
                continue
            for name, tensor in _unpack(shards, arch, packing).items():
                writer.write(name, tensor)
    writer.close()
    parallel.barrier()


def _gather_shards(parameter: Tensor, packing: Packing, topology: Topology) -> list[Tensor] | None:
    """All tensor-parallel ranks' shards on the first of them, None on the others."""
    if packing.partition_dim is None or topology.tp_size == 1:
        return [parameter] if topology.tp_rank == 0 else None
    group = topology.groups.tp
    first = topology.tp_rank == 0
    shards = [torch.empty_like(parameter) for _ in range(topology.tp_size)] if first else None
    dist.gather(parameter.contiguous(), shards, dst=dist.get_global_rank(group, 0), group=group)
    return shards


def _unpack(shards: list[Tensor], arch: Architecture, packing: Packing) -> dict[str, Tensor]:
    """The full tensors that the ranks' shards of one parameter hold."""
    if packing.partition_dim is None:
        return {packing.sources[0]: shards[0]}
    if packing.partition_dim == 1:
        return {packing.sources[0]: torch.cat(shards, dim=1)}
    pieces: list[dict[int, Tensor]] = [{} for _ in packing.sources]  # by first row
    for rank, shard in enumerate(shards):
        row = 0
        for segment in row_segments(arch, packing, shard.size(0), rank, len(shards)):
            length = segment.stop - segment.start
            pieces[segment.source][segment.start] = shard[row : row + length]
            row += length
    return {
        name: torch.cat([rows for _, rows in sorted(parts.items(), key=lambda item: item[0])])
        for name, parts in zip(packing.sources, pieces, strict=True)
    }


def faulty_tensors(model: LlamaModel) -> list[str]:
    """What is wrong with the weights, by tensor: not finite, or a matrix of nothing but zeros.

    Every rank looks at its own part; all ranks get what all have found.
    """
    arch, topology = model.arch, model.topology
    found = []
    for parameter, packing in packed_parameters(model, arch):
        rows = [parameter.size(0)]
        if packing.partition_dim == 0:
            rank, size = topology.tp_rank, topology.tp_size
            segments = row_segments(arch, packing, parameter.size(0), rank, size)
            rows = [segment.stop - segment.start for segment in segments]
            sources = [packing.sources[segment.source] for segment in segments]
        else:
            sources = list(packing.sources)
        parts = parameter.detach()[: sum(rows)].split(rows)
        for name, part in zip(sources, parts, strict=True):
            if not part.isfinite().all():
                found.append(f"{name} holds NaN or infinity")
            elif part.dim() > 1 and not part.any():
                found.append(f"{name} is all zeros")
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    return sorted({fault for faults in gathered for fault in faults})
