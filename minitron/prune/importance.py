"""Importance of every axis from one forward-only pass over calibration data.

    embedding channels  |output of both layer norms|        mean over s, L2 over samples
    MLP neurons         |input of linear_fc2|               mean over s, L2 over samples
    attention heads     ‖output of a head‖₂                 mean over s, L2 over samples
    layers              1 − cos(input, output)              mean over all tokens

Each sample's mean over its sequence is taken first and squared then, so samples are summed, and
ranks only ever add up sums: the scores do not depend on how samples, layers, columns or sequence
are shared out. Accumulators are fp64 and stay on the device.

Source: arXiv:2407.14679 §2.2 (batch = L2, sequence = mean is its best aggregation).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron import artifact, parallel, platform
from minitron.data.batches import Batch, DataConfig, EvalBatches, open_windows
from minitron.errors import MinitronError
from minitron.metrics import progress
from minitron.model import hf
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.parallel import ParallelConfig
from minitron.platform import Precision
from minitron.prune.scores import ImportanceScores


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
        MinitronError: the model or the data cannot be read, or the sizes do not divide.
    """
    topology = parallel_initialize(parallel)
    arch = hf.read_architecture(model_path)
    raise NotImplementedError


class ImportanceCollector:
    """Hooks on a model's layers that add up what scores are made of.

    Args:
        model: this rank's part, built of plain layers (`transformer_impl="local"`).
    """

    def __init__(self, model: LlamaModel) -> None:
        arch, topology = model.arch, model.topology
        self._model = model
        layers = model.decoder.layers
        self._layers = [layer.layer_number - 1 for layer in layers]
        self._sequence_parallel = model.config.sequence_parallel
        self._valid: list[Tensor] = []
        self._index = {id(layer): i for i, layer in enumerate(layers)}

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(len(layers), *shape, dtype=torch.float64, device=platform.device())

        self._ffn = zeros(arch.ffn_hidden_size // topology.tp_size)
        self._heads = zeros(arch.num_attention_heads // topology.tp_size)
        self._hidden = zeros(2, arch.hidden_size)
        self._cosine = zeros()
        self._tokens = zeros()
        # Sums over this rank's part of the sequence, until the micro-batch is through.
        self._norm_sums: list[Tensor] = []
