"""Initial weights, read like those of a model on disk.

A tensor's values follow from the seed and its name: they do not depend on the topology, nor on who
reads them in which order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minitron.model import hf
from minitron.model.arch import Architecture


class InitialWeights:
    """Random weights of a whole model, a `WeightSource`.

    Matrices are normal with `init_method_std`; the two projections that write into the residual
    stream are scaled by 1/sqrt(2 L). Norms start at one, biases at zero.
    """

    def __init__(self, arch: Architecture, *, seed: int, init_method_std: float = 0.02) -> None:
        self.infos = hf.tensor_infos(arch, torch.float32)
        self._axes = hf.tensor_axes(arch)
        self._order = {name: i for i, name in enumerate(self.infos)}
        self._seed = seed
        self._std = init_method_std
        self._residual_std = init_method_std / math.sqrt(2 * arch.num_layers)

    def read(self, name: str, *index: slice) -> Tensor:
        """The named tensor, or the part of it that `index` selects."""
        shape = self.infos[name].shape
        if name.endswith(".bias"):
            return torch.zeros(shape)[index or slice(None)]
        if len(shape) == 1:
            return torch.ones(shape)[index or slice(None)]
        residual = self._axes[name][0] == "hidden"  # its output is what the stream counts
        generator = torch.Generator().manual_seed((self._seed << 20) + self._order[name])
        tensor = torch.randn(shape, generator=generator)
        return (tensor * (self._residual_std if residual else self._std))[index or slice(None)]
