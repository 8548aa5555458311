"""What intermediate losses learn beside the student: the map between the widths, and their weight.

megatron-core trains, reduces and saves it like a part of the student's first chunk of every stage;
no exported model has it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

from minitron import platform
from minitron.model.llama import LlamaModel
from minitron.parallel import Topology


class Companion(torch.nn.Module):
    """What is trained and saved with the student and is no part of it: the shared map and α.

    Args:
        student: this rank's first chunk, which it is given to; it takes its precision and ranks.
        shape: [teacher's width, student's width] of the map; None where there is none.
        alpha: the weight of the first step.
        seed: of the map, which is the same under any topology.
    """

    def __init__(
        self, student: LlamaModel, shape: tuple[int, int] | None, *, alpha: float, seed: int
    ) -> None:
        super().__init__()
        self._topology: Topology = student.topology
        self.alpha: Tensor
        self.register_buffer("alpha", torch.full((1,), alpha, device=platform.device()))
        self.weight: torch.nn.Parameter | None = None
        if shape is not None:
            initial = _initial_map(shape, seed).to(platform.device(), student.config.params_dtype)
            weight: Any = torch.nn.Parameter(initial)
            self.weight = weight
            weight.sequence_parallel = student.config.sequence_parallel
            # To megatron-core: the pipeline's stages share this parameter. It gets a bucket to
            # itself, cut alike on every stage; its gradients are summed over the stages; and the
            # norm counts it on one of them.
            weight.shared_embedding = weight.pipeline_parallel = True
            weight.shared = student.topology.pp_rank > 0
            student.config.has_cond_embedder = True
        student.companion = self

    def forward(self, state: Tensor) -> Tensor:
        """Take a student's state [s, b, h] to the teacher's width."""
        return state if self.weight is None else F.linear(state, self.weight)

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """All ranks hold the same; the first one's is written."""
        topology = self._topology
        replica = (topology.pp_rank, topology.tp_rank, topology.dp_rank)
        return {
            prefix + name: make_sharded_tensor_for_checkpoint(
                tensor, prefix + name, replica_id=replica
            )
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def _initial_map(shape: tuple[int, int], seed: int) -> Tensor:
    """Normal, so that a state keeps its length on average."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) / shape[1] ** 0.5
