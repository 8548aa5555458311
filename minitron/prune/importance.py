"""Importance of every axis from one forward-only pass over calibration data.

    embedding channels  |output of both layer norms|   mean over the sequence, L2 over samples
    MLP neurons         |input of linear_fc2|          mean over the sequence, L2 over samples
    attention heads     ‖output of a head‖₂            mean over the sequence, L2 over samples
    layers              1 − cos(input, output)         mean over all tokens

The mean over a sample's sequence is squared and then added over samples, so ranks only ever add up
sums, and the scores do not depend on how samples, layers, columns or the sequence are shared out.
Sums are kept in fp64 on the device; nothing waits for the host.

Source: arXiv:2407.14679 §2.2; (L2 over the batch, mean over the sequence) is its best aggregation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import platform
from minitron.data.batches import Batch, DataConfig, EvalBatches, open_windows, prepare_data
from minitron.data.tokenizer import find_tokenizer
from minitron.errors import MinitronError
from minitron.metrics import log, progress
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.model.sharding import open_model
from minitron.ops.activation_stats import activation_stats
from minitron.ops.block_cosine import block_cosine
from minitron.parallel import ParallelConfig, initialize, on_rank_zero
from minitron.platform import Precision
from minitron.prune.scores import ImportanceScores, check_scores


@dataclass(frozen=True, kw_only=True)
class ImportanceConfig:
    """The calibration pass."""

    samples: int = 1024
    """Samples of `data.seq_length` tokens, taken from the start of the data in order."""
    micro_batch_size: int = 1
    """Samples that one data-parallel rank takes through the model at a time."""

    def __post_init__(self) -> None:
        for name in ("samples", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise MinitronError(f"importance.{name}={getattr(self, name)} must be at least 1")


def measure_importance(
    model_path: Path,
    *,
    data: DataConfig,
    importance: ImportanceConfig,
    parallel: ParallelConfig,
    precision: Precision,
) -> ImportanceScores:
    """Score every axis of a model directory; call on all ranks, which all get the scores.

    Raises:
        MinitronError: the model or the data cannot be read, the sizes do not divide, or the scores
            are NaN or zero.
    """
    parallel.check_seq_length(data.seq_length)
    topology = initialize(parallel)
    arch, weights = open_model(model_path)
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
    scores = collect_importance(freeze(model), batches)
    check_scores(scores, arch)
    return scores


def collect_importance(model: LlamaModel, batches: EvalBatches) -> ImportanceScores:
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
    return collector.scores()


class _Collector:
    """Hooks on a stage's layers that add up what scores are made of.

    Args:
        model: this rank's part, built of plain layers (`transformer_impl="local"`).
    """

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._sequence_parallel = model.config.sequence_parallel
        self._expected: list[Batch] = []
        self._valid = torch.empty(0)  # [b], 1 for the real samples of the micro-batch at hand
        self._seq_length = 0
        self._norm_sums: list[Tensor] = []  # its Σ_s |x|, [b, h], in the order of the norms

        arch, tp_size = model.arch, model.topology.tp_size
        layers = model.decoder.layers

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(layers), *shape, dtype=torch.float64, device=platform.device())

        self._hidden = zeros(2, arch.hidden_size)
        self._ffn = zeros(arch.ffn_hidden_size // tp_size)
        self._heads = zeros(arch.num_attention_heads // tp_size)
        self._blocks = zeros(2)  # Σ cosine, number of tokens

        self._handles = [
            model.decoder.register_forward_pre_hook(self._begin_microbatch),
            model.decoder.register_forward_hook(self._end_microbatch),
        ]
        for i, layer in enumerate(layers):
            self._hook_output(layer.input_layernorm, self._see_norm)
            self._hook_output(layer.pre_mlp_layernorm, self._see_norm)
            self._hook_input(layer.self_attention.linear_proj, self._see_heads, i)
            self._hook_input(layer.mlp.linear_fc2, self._see_neurons, i)
            see_layer = functools.partial(self._see_layer, i)
            self._handles.append(layer.register_forward_hook(see_layer, with_kwargs=True))

    def expect(self, microbatches: Sequence[Batch]) -> None:
        """Name the micro-batches that will go through this stage, in order."""
        self._expected = list(microbatches)

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def scores(self) -> ImportanceScores:
        """Add up all ranks' sums and turn them into scores; collective."""
        arch = self._model.arch
        tp_group = self._model.topology.groups.tp
        if self._sequence_parallel:  # every rank has seen other tokens; else all saw the same
            dist.all_reduce(self._blocks, group=tp_group)
        hidden = self._whole(self._hidden, arch.hidden_size)
        ffn = self._whole(self._ffn, arch.ffn_hidden_size)
        heads = self._whole(self._heads, arch.num_attention_heads)
        cosine, tokens = self._whole(self._blocks, 2).unbind(-1)
        return ImportanceScores(
            hidden=hidden.sqrt().sum(1).float().cpu(),
            ffn=ffn.sqrt().float().cpu(),
            heads=heads.sqrt().float().cpu(),
            block_influence=(1 - cosine / tokens).float().cpu(),
        )

    def _whole(self, sums: Tensor, size: int) -> Tensor:
        """All ranks' sums, each at its layers and columns: [L/p, ..., size/t] → [L, ..., size]."""
        topology = self._model.topology
        layers = [layer.layer_number - 1 for layer in self._model.decoder.layers]
        total = sums.new_zeros(self._model.arch.num_layers, *sums.shape[1:-1], size)
        width = sums.size(-1)
        if width < size or topology.tp_rank == 0:  # what every rank holds whole is added once
            start = topology.tp_rank * width if width < size else 0
            total[layers, ..., start : start + width] = sums
        dist.all_reduce(total)
        return total

    def _hook_output(self, module: torch.nn.Module, see: Callable[[Tensor], None]) -> None:
        def hook(_: torch.nn.Module, inputs: Any, output: Tensor) -> None:
            see(output)

        self._handles.append(module.register_forward_hook(hook))

    def _hook_input(
        self, module: torch.nn.Module, see: Callable[[int, Tensor], None], layer: int
    ) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(layer, inputs[0])

        self._handles.append(module.register_forward_pre_hook(hook))

    def _begin_microbatch(self, *_: Any) -> None:
        batch = self._expected.pop(0)
        self._seq_length = batch.tokens.size(1)
        self._valid = batch.valid.to(platform.device(), torch.float64)

    def _end_microbatch(self, *_: Any) -> None:
        sums = torch.stack(self._norm_sums)  # [2 L/p, b, h]
        self._norm_sums.clear()
        if self._sequence_parallel:  # the mean is over the whole sequence: add, then square
            dist.all_reduce(sums, group=self._model.topology.groups.tp)
        self._hidden += self._squares(sums).view_as(self._hidden)

    def _squares(self, sums: Tensor) -> Tensor:
        """Σ over the real samples of (Σ_s |x| / s)²: [..., b, c] → [..., c]."""
        return ((sums / self._seq_length).square() * self._valid[:, None]).sum(-2)

    def _see_norm(self, x: Tensor) -> None:  # [s, b, h], [s/t, b, h] under sequence parallelism
        self._norm_sums.append(activation_stats(x).abs_sum)

    def _see_neurons(self, layer: int, x: Tensor) -> None:  # [s, b, f/t]
        self._ffn[layer] += self._squares(activation_stats(x).abs_sum)

    def _see_heads(self, layer: int, x: Tensor) -> None:  # [s, b, n/t * d]
        norms = activation_stats(x, group=self._model.arch.kv_channels)
        self._heads[layer] += self._squares(norms.abs_sum)

    def _see_layer(
        self, layer: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cosine = block_cosine(before, output[0])  # [s, b]
        tokens = self._valid.expand_as(cosine)
        self._blocks[layer, 0] += (cosine * tokens).sum()
        self._blocks[layer, 1] += tokens.sum()
