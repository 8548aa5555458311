"""A model directory in, a smaller model directory out.

Pruning is a pure function of the tensors, the scores and the target shape: it knows no module, and
of ranks only that they share the tensors. Depth comes first, width second. A tensor goes in blocks
of rows, small enough for a processor's cache: while one is sliced, the one before it is written and
read back, and the disk is busy with those before that. Memory does not grow with the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minitron import artifact, metrics, parallel
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.weights import TensorInfo, WeightReader, WeightWriter
from minitron.prune.depth import kept_layers, layers_to_drop
from minitron.prune.scores import ImportanceScores, check_scores
from minitron.prune.width import WidthPlan, plan_width, same_width, slice_tensor
from minitron.sections.prune import GroupReduction, HeadMerge, HeadRanking

S = TypeVar("S")
T = TypeVar("T")

PRUNING_FILE = "pruning.json"
BLOCK_BYTES = 4 << 20
"""What is sliced, checked and written at a time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningPlan:
    """The shape to reach, and where each of its parts lies in the source."""

    target: Architecture
    """Shape of the pruned model."""
    layers: tuple[int, ...]
    """Layer i was `layers[i]`; both count from 0."""
    width: WidthPlan
    """Positions within the layers, by source layer."""

    def dropped_layers(self, source: Architecture) -> list[int]:
        """The layers of the source that go, counted from 1."""
        return [layer + 1 for layer in range(source.num_layers) if layer not in self.layers]

    def to_dict(self) -> dict[str, list | int | None]:
        """The content of `pruning.json`: source positions from 0, null where all are kept.

        `merge_sign` is that of `merged_heads`, null without them.
        """
        rows = list(self.layers)

        def listed(positions: Tensor | None) -> list | None:
            return None if positions is None else positions.tolist()

        width = self.width
        return {
            "layers": rows,
            "hidden": listed(width.hidden),
            "ffn": listed(None if width.ffn is None else width.ffn[rows]),
            "heads": listed(None if width.heads is None else width.heads[rows]),
            "query_groups": listed(None if width.groups is None else width.groups[rows]),
            "pooled_query_groups": width.pooled,
            "merged_heads": listed(None if width.partners is None else width.partners[rows]),
            "merge_sign": None if width.partners is None else width.merge_sign,
        }


def needs_scores(
    source: Architecture, target: Architecture, drop_layers: Sequence[int] | None
) -> bool:
    """True where something must be ranked: a narrower width, or layers that nobody named."""
    return not same_width(source, target) or (
        target.num_layers != source.num_layers and not drop_layers
    )


def plan_pruning(
    source: Architecture,
    target: Architecture,
    scores: ImportanceScores | None = None,
    drop_layers: Sequence[int] | None = None,
    *,
    head_ranking: HeadRanking = "group",
    group_reduction: GroupReduction = "select",
    merge_heads: HeadMerge = "none",
) -> PruningPlan:
    """Decide what stays.

    Embedding channels are ranked by all scored layers, dropped ones included: one measurement
    then gives the same channels at every depth.

    Args:
        source: the shape of the model.
        target: the shape to reach (`target.target_shape`).
        scores: its importance; not needed where nothing is ranked (`needs_scores`).
        drop_layers: layers to drop, counted from 1; the least influential ones if None.
        head_ranking: see `width.choose_heads`.
        group_reduction: see `width.plan_width`.
        merge_heads: see `width.merge_partners`.

    Raises:
        MinitronError: the scores do not fit the model.
    """
    if scores is not None:
        check_scores(scores, source)
    if not drop_layers and target.num_layers < source.num_layers:
        assert scores is not None, "ranking layers needs scores"
        drop_layers = layers_to_drop(scores.block_influence, target.num_layers)
    layers = kept_layers(source.num_layers, drop_layers or ())
    assert len(layers) == target.num_layers, "drop_layers and target disagree"
    width = plan_width(
        source,
        target,
        scores,
        head_ranking=head_ranking,
        group_reduction=group_reduction,
        merge_heads=merge_heads,
    )
    return PruningPlan(target=target, layers=layers, width=width)


class PrunedWeights:
    """The tensors of a pruned model, each sliced from the source as it is read."""

    def __init__(self, source: WeightReader, plan: PruningPlan) -> None:
        self._source = source
        self._plan = plan
        self._axes = hf.tensor_axes(plan.target)
        self.infos = {
            name: TensorInfo(info.shape, source.infos[self.origin(name)[0]].dtype)
            for name, info in hf.tensor_infos(plan.target, torch.float32).items()
        }

    def origin(self, name: str) -> tuple[str, int | None]:
        """Name of a tensor in the source, and the layer that it belongs to there."""
        layer, suffix = hf.split_layer_tensor(name)
        if layer is None:
            return name, None
        old = self._plan.layers[layer]
        return hf.layer_tensor(old, suffix), old

    def read(self, name: str, *index: slice) -> Tensor:
        """The named tensor, or the part of it that `index` selects."""
        origin, layer = self.origin(name)
        axes = self._axes[name]
        return slice_tensor(self._source, origin, axes, self._plan.width, layer, *index)


def prune_model(source_dir: Path, out_dir: Path, plan: PruningPlan) -> None:
    """Write the pruned model: config, weights, tokenizer files, and `pruning.json`.

    Every tensor keeps the dtype that it has in the source. All ranks call this, and share the
    tensors; so does one process without any. What was written is opened as a model, and every
    tensor compared with its slice of the source.

    Args:
        source_dir: a Hugging Face model directory.
        out_dir: an existing directory to fill.
        plan: what stays.

    Raises:
        MinitronError: the source is damaged, a tensor of it holds NaN, infinity or only zeros, or
            the written model is not what was sliced.
    """
    parallel.on_rank_zero(lambda: artifact.verify(source_dir))
    reader = hf.open_weights(source_dir, hf.read_architecture(source_dir))
    pruned = PrunedWeights(reader, plan)
    writer = WeightWriter(out_dir, pruned.infos)

    def create() -> None:
        dtype = reader.infos[hf.EMBEDDING].dtype
        hf.write_config(out_dir, plan.target, dtype=dtype, base_dir=source_dir)
        text = json.dumps(plan.to_dict(), separators=(",", ":"))
        (out_dir / PRUNING_FILE).write_text(text + "\n")
        writer.create()

    parallel.on_rank_zero(create)
    # The headers are final, so that what is written can be read back at once, as others will.
    written = hf.open_weights(out_dir, hf.read_architecture(out_dir))
    blocks = [
        (name, rows) for name in _share(pruned.infos) for rows in _row_blocks(pruned.infos[name])
    ]
    filled: set[str] = set()  # of the tensors so far, those with anything but zeros

    def slice_(block: tuple[str, slice]) -> tuple[str, slice, Tensor]:
        name, rows = block
        tensor = pruned.read(name, rows)
        origin = pruned.origin(name)[0]
        if _any_nonzero(tensor, f"{source_dir}: {origin}"):
            filled.add(name)
        is_last = rows.stop == pruned.infos[name].shape[0]
        if is_last and name not in filled and not name.endswith(".bias"):
            raise MinitronError(
                f"{source_dir}: what is kept of {origin} is all zero; the model was never filled "
                "or trained, restore it"
            )
        return name, rows, tensor

    with metrics.progress(
        total=sum(pruned.infos[name].num_bytes for name, rows in blocks if not rows.start),
        desc="pruning",
        unit=metrics.BYTES,
        enabled=parallel.is_rank_zero(),
    ) as bar:
        for name, rows, tensor in _one_ahead(slice_, blocks):
            writer.write(name, tensor, rows.start)
            if not np.array_equal(_bytes(written.read(name, rows)), _bytes(tensor)):
                raise MinitronError(
                    f"{out_dir}: {name} does not hold what was written; the disk or the source "
                    "changed meanwhile: prune again"
                )
            bar.update(tensor.nbytes)
    writer.close()
    parallel.barrier()


def _row_blocks(info: TensorInfo) -> list[slice]:
    """The rows of a tensor in blocks of about `BLOCK_BYTES`."""
    count = info.shape[0]
    step = max(1, BLOCK_BYTES * count // info.num_bytes)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _one_ahead(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Results in order; while one is being used, a thread works on the next."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending = [pool.submit(function, item) for item in items[:1]]
        for item in items[1:]:
            result = pending.pop().result()
            pending.append(pool.submit(function, item))
            yield result
        yield from (last.result() for last in pending)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """What a tensor holds, which numpy compares many times as fast as torch does."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _share(infos: Mapping[str, TensorInfo]) -> list[str]:
    """This rank's tensors: the largest are dealt first, each to the rank with the fewest bytes."""
    rank, ranks = parallel.world()
    loads = [0] * ranks
    mine = []
    for name in sorted(infos, key=lambda name: -infos[name].num_bytes):
        lightest = loads.index(min(loads))
        loads[lightest] += infos[name].num_bytes
        if lightest == rank:
            mine.append(name)
    return mine


def comparison(source: Architecture, target: Architecture) -> str:
    """A table of both shapes, their parameters, and the percentage that is kept."""
    rows = []
    for label, name in (
        ("layers", "num_layers"),
        ("hidden size", "hidden_size"),
        ("ffn hidden size", "ffn_hidden_size"),
        ("attention heads", "num_attention_heads"),
        ("key/value heads", "num_query_groups"),
        ("parameters", "num_parameters"),
        ("  without embeddings", "num_non_embedding_parameters"),
    ):
        before, after = getattr(source, name), getattr(target, name)
        rows.append((label, before, after, f"{after / before:>6.1%}"))
    return metrics.format_table(("", "source", "pruned", "kept"), rows)


def _any_nonzero(tensor: Tensor, name: str) -> bool:
    """Whether there is anything but zeros; refuses what is no number."""
    low, high = tensor.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise MinitronError(f"{name} holds NaN or infinity; the model is broken, restore it")
    return not low == high == 0
