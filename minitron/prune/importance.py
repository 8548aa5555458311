"""Importance of every axis from one forward-only pass over calibration data.

    embedding channels  output of both layer norms of a layer, whose scores are added
    MLP neurons         input of linear_fc2
    attention heads     ‖output of a head‖₂
    key/value heads     ‖outputs of the query heads that share it‖₂
    layers              1 − cos(input, output), mean over all tokens

Units are aggregated over a sample's sequence (mean of absolute values, L2, variance) and then over
samples in the same three ways; all nine are kept. Hooks only add up |x|, x² and x over the
sequence. At the end of a micro-batch one collective completes what tensor-parallel ranks share, and
the first two moments over samples are added to running sums. Ranks only ever add up sums, so scores
do not depend on how samples, layers, columns or the sequence are shared out, and memory not on the
number of samples. Sums are kept in fp64 on the device; nothing waits for the host.

Source: arXiv:2407.14679 §2.2; L2 over samples of the mean over the sequence is its best choice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import artifact, platform
from minitron.data.batches import Batch, EvalBatches, open_windows, prepare_data
from minitron.data.tokenizer import find_tokenizer
from minitron.metrics import log, progress
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.model.sharding import open_model
from minitron.ops.activation_stats import activation_stats
from minitron.ops.block_cosine import block_cosine
from minitron.parallel import Topology, initialize, on_rank_zero
from minitron.prune.scores import Calibration, Importance, check_scores
from minitron.sections.data import DataConfig
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import ImportanceConfig, ScoringPrecision


def measure_importance(
    model_path: Path,
    *,
    data: DataConfig,
    importance: ImportanceConfig,
    parallel: ParallelConfig,
    precision: ScoringPrecision,
) -> tuple[Importance, Calibration]:
    """Score every axis of a model directory; call on all ranks, which all get the scores.

    Raises:
        MinitronError: the model or the data cannot be read, the sizes do not divide, or the scores
            are NaN or zero.
    """
    model, batches, calibration = open_calibration(
        model_path,
        data=data,
        importance=importance,
        topology=initialize(parallel),
        precision=precision,
    )
    measured = collect_importance(model, batches)
    check_scores(measured.scores(), model.arch)
    return measured, calibration


def open_calibration(
    model_path: Path,
    *,
    data: DataConfig,
    importance: ImportanceConfig,
    topology: Topology,
    precision: ScoringPrecision,
) -> tuple[LlamaModel, EvalBatches, Calibration]:
    """This rank's part of a frozen model with hookable layers, and its calibration batches.

    Raises:
        MinitronError: the model or the data cannot be read, or the sizes do not divide.
    """
    topology.config.check_seq_length(data.seq_length)
    arch, weights = open_model(model_path)
    arch.check_seq_length(data.seq_length)
    tokenizer = find_tokenizer(model_path)
    prepared = on_rank_zero(lambda: prepare_data(data, tokenizer, vocab_size=arch.vocab_size))
    model = build_llama(
        arch, topology, weights, dtype=platform.DTYPES[precision], transformer_impl="local"
    )
    batches = EvalBatches(
        open_windows(prepared.path, prepared.seq_length),
        micro_batch_size=importance.micro_batch_size,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        include_remainder=False,
        max_samples=importance.samples,
    )
    if batches.num_samples < importance.samples:
        log(f"the data holds {batches.num_samples} samples; importance.samples asks for more")
    files = [Path(f"{prefix}.bin") for prefix in prepared.path]
    calibration = Calibration(
        samples=batches.num_samples,
        tokenizer=tokenizer.fingerprint if tokenizer else None,
        data=on_rank_zero(lambda: {str(file): artifact.fingerprint(file) for file in files}),
    )
    return freeze(model), batches, calibration


def collect_importance(model: LlamaModel, batches: EvalBatches) -> Importance:
    """Run a frozen model over calibration data and score it; the same scores on all ranks."""
    collector = _Collector(model)
    group_size = 4 * model.topology.pp_size  # micro-batches that keep a pipeline busy
    iterator = iter(batches)
    with progress(total=batches.num_samples, desc="importance", unit="samples") as bar:
        seen = 0
        while group := list(itertools.islice(iterator, group_size)):
            collector.expect(group)
            run_schedule(model, group, lambda *_: None, forward_only=True)
            before, seen = seen, seen + len(group) * batches.samples_per_microbatch
            bar.update(min(seen, batches.num_samples) - before)
    collector.remove()
    return collector.importance(batches.num_samples)


class _Collector:
    """Hooks on a stage's layers that add up what scores are made of.

    Args:
        model: this rank's part, built of plain layers (`transformer_impl="local"`).
    """

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._tp_group = model.topology.groups.tp
        self._sequence_parallel = model.config.sequence_parallel
        arch, tp_size = model.arch, model.topology.tp_size
        self._splits_groups = arch.num_query_groups < tp_size  # a group's heads lie on two ranks
        self._sizes = {
            "hidden": arch.hidden_size,
            "ffn": arch.ffn_hidden_size,
            "heads": arch.num_attention_heads,
            "query_groups": arch.num_query_groups,
        }
        self._expected: list[Batch] = []
        self._valid = torch.empty(0)  # [b], 1 for the real samples of the micro-batch at hand
        self._seq_length = 0
        # Of the micro-batch at hand, layer by layer: sums over the sequence [3, b, c]; of groups
        # that lie on several ranks, parts of each token's squared norms [s, b, g].
        self._seen: dict[str, list[Tensor]] = {name: [] for name in self._sizes}
        # First and second moments over samples, [2, 3, L/p, c]; made by the first micro-batch.
        self._moments: dict[str, Tensor] = {}
        layers = model.decoder.layers
        self._blocks = torch.zeros(  # Σ cosine, number of tokens
            len(layers), 2, dtype=torch.float64, device=platform.device()
        )
        self._handles = [
            model.decoder.register_forward_pre_hook(self._begin_microbatch),
            model.decoder.register_forward_hook(self._end_microbatch),
        ]
        for i, layer in enumerate(layers):
            self._hook_output(layer.input_layernorm, self._see_norm)
            self._hook_output(layer.pre_mlp_layernorm, self._see_norm)
            self._hook_input(layer.self_attention.linear_proj, self._see_heads)
            self._hook_input(layer.mlp.linear_fc2, self._see_neurons)
            see_layer = functools.partial(self._see_layer, i)
            self._handles.append(layer.register_forward_hook(see_layer, with_kwargs=True))

    def expect(self, microbatches: Sequence[Batch]) -> None:
        """Name the micro-batches that will go through this stage, in order."""
        self._expected = list(microbatches)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def importance(self, num_samples: int) -> Importance:
        """Add up all ranks' sums and turn them into scores; collective."""
        if self._sequence_parallel:  # every rank has seen other tokens; else all saw the same
            dist.all_reduce(self._blocks, group=self._tp_group)
        cosine, tokens = self._whole(self._blocks, 2)[:, 0].unbind(-1)
        aggregated = {}
        for name, size in self._sizes.items():
            first, second = self._whole(self._moments[name], size).unbind(0)  # [3, L, r, c]
            mean = first / num_samples
            variance = (second / num_samples - mean.square()).clamp_min(0)
            scores = torch.stack([mean, second.sqrt(), variance])  # [3, 3, L, r, c]
            aggregated[name] = scores.sum(3).float().cpu()
        return Importance(**aggregated, block_influence=(1 - cosine / tokens).float().cpu())

    def _whole(self, sums: Tensor, size: int) -> Tensor:
        """All ranks' sums at their layers and columns: [..., r L/p, size/t] → [..., L, r, size].

        A layer has r rows: two norms, one of anything else.
        """
        topology = self._model.topology
        layers = [layer.layer_number - 1 for layer in self._model.decoder.layers]
        sums = sums.unflatten(-2, (len(layers), -1))  # [..., L/p, r, size/t]
        *leading, _, rows, width = sums.shape
        total = sums.new_zeros(*leading, self._model.arch.num_layers, rows, size)
        if width < size or topology.tp_rank == 0:  # what every rank holds whole is added once
            start = topology.tp_rank * width if width < size else 0
            total[..., layers, :, start : start + width] = sums
        dist.all_reduce(total)
        return total

    def _hook_output(self, module: torch.nn.Module, see: Callable[[Tensor], None]) -> None:
        def hook(_: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            see(output)

        self._handles.append(module.register_forward_hook(hook))

    def _hook_input(self, module: torch.nn.Module, see: Callable[[Tensor], None]) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(inputs[0])

        self._handles.append(module.register_forward_pre_hook(hook))

    def _begin_microbatch(self, *_: Any) -> None:
        batch = self._expected.pop(0)
        self._seq_length = batch.tokens.size(1)
        self._valid = batch.valid.to(platform.device(), torch.float64)

    def _see_norm(self, x: Tensor) -> None:  # [s, b, h], [s/t, b, h] under sequence parallelism
        self._seen["hidden"].append(_sequence_sums(x))

    def _see_neurons(self, x: Tensor) -> None:  # [s, b, f/t]
        self._seen["ffn"].append(_sequence_sums(x))

    def _see_heads(self, x: Tensor) -> None:  # [s, b, n/t * d]
        arch = self._model.arch
        heads_of_group = arch.num_attention_heads // arch.num_query_groups
        self._seen["heads"].append(_sequence_sums(x, group=arch.kv_channels))
        self._seen["query_groups"].append(
            self._group_squares(x)
            if self._splits_groups
            else _sequence_sums(x, group=heads_of_group * arch.kv_channels)
        )

    def _group_squares(self, x: Tensor) -> Tensor:
        """This rank's part of a group that lies on several: [s, b, n/t * d] → [s, b, g], else 0."""
        groups, topology = self._sizes["query_groups"], self._model.topology
        dtype = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros(*x.shape[:-1], groups, dtype=dtype)
        total[..., topology.tp_rank * groups // topology.tp_size] = x.to(dtype).square().sum(-1)
        return total

    def _see_layer(
        self, layer: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cosine = block_cosine(before, output[0])  # [s, b]
        tokens = self._valid.expand_as(cosine)
        self._blocks[layer, 0] += (cosine * tokens).sum()
        self._blocks[layer, 1] += tokens.sum()

    def _end_microbatch(self, *_: Any) -> None:
        seen = {name: torch.stack(parts) for name, parts in self._seen.items()}
        for parts in self._seen.values():
            parts.clear()
        shared = ["hidden"] * self._sequence_parallel + ["query_groups"] * self._splits_groups
        self._complete(seen, shared)
        if self._splits_groups:
            groups = seen["query_groups"].transpose(0, 1)  # [s, L/p, b, g]
            seen["query_groups"] = _sequence_sums(groups.sqrt()).transpose(0, 1)
        for name, sums in seen.items():  # [L/p, 3, b, c]
            moments = self._sample_moments(sums)
            self._moments[name] = self._moments.get(name, 0) + moments

    def _complete(self, seen: dict[str, Tensor], shared: Sequence[str]) -> None:
        """Add up over tensor-parallel ranks what each holds a part of; at most one collective.

        The aggregates are not linear in these sums: they must be whole before anything is made
        of them.
        """
        if not shared:
            return
        packed = torch.cat([seen[name].double().flatten() for name in shared])
        dist.all_reduce(packed, group=self._tp_group)
        parts = packed.split([seen[name].numel() for name in shared])
        seen.update(
            {name: part.view_as(seen[name]) for name, part in zip(shared, parts, strict=True)}
        )

    def _sample_moments(self, sums: Tensor) -> Tensor:
        """Sums over the real samples of their aggregates and of the squares of these.

        Args:
            sums: [L, 3, b, c] of |x|, x² and x over the sequence.

        Returns:
            [2, 3, L, c].
        """
        absolute, squares, signed = sums.unbind(1)  # [L, b, c]
        length = self._seq_length
        variance = (squares / length - (signed / length).square()).clamp_min(0)
        aggregates = torch.stack([absolute / length, squares.sqrt(), variance])  # [3, L, b, c]
        moments = torch.stack([aggregates, aggregates.square()])
        return (moments * self._valid[:, None]).sum(3)


def _sequence_sums(x: Tensor, *, group: int = 1) -> Tensor:
    """Sums of |x|, x² and x over the first dimension: [s, ..., c] → [3, ..., c/group] in fp64."""
    absolute, squares, signed, _ = activation_stats(x.flatten(1, -2), group=group)
    return torch.stack([absolute, squares, signed]).unflatten(1, x.shape[1:-1])
