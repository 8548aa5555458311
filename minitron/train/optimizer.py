"""Data parallelism, AdamW and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from minitron import platform
from minitron.model.llama import LlamaModel
from minitron.sections.train import TrainConfig


class _SingleReplica(DistributedDataParallel):
    """A chunk without replicas: nothing to sum or to gather, which gloo would do by copying all."""

    def finish_grad_sync(self, *_: Any, **__: Any) -> None:
        """Leave the gradients as they are."""

    def start_param_sync(self, *_: Any, **__: Any) -> None:
        """Leave the parameters as they are."""


def wrap_chunk(chunk: LlamaModel) -> DistributedDataParallel:
    """Give a chunk of a model gradient buffers that are summed over its data-parallel replicas.

    The optimizer's state is sharded over the replicas, even over a single one: its checkpoints
    then fit any number of them.
    """
    topology = chunk.topology
    wrapper = DistributedDataParallel if topology.dp_size > 1 else _SingleReplica
    return wrapper(
        config=chunk.config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=platform.has_cuda() and topology.dp_size > 1,
            overlap_param_gather=False,
            check_for_nan_in_grad=False,  # the optimizer's norm tells, without a synchronisation
        ),
        module=chunk,
        pg_collection=topology.groups,
    )


def build_optimizer(
    model: Sequence[DistributedDataParallel], config: TrainConfig
) -> MegatronOptimizer:
    """AdamW with fp32 main weights, decay on matrices alone, clipping by the global norm.

    Also hooks the optimizer and the gradient reduction into the model's pipeline schedule.
    """
    schedule = model[0].config  # of all chunks
    dtype = schedule.params_dtype
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.final_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=True,
        ),
        list(model),
        use_gloo_process_groups=False,
        pg_collection=model[0].module.topology.groups,
    )
    for group in optimizer.param_groups:  # megatron-core leaves this to its own scheduler
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    use_fused(optimizer)
    schedule.grad_scale_func = optimizer.scale_loss
    schedule.no_sync_func = [c.no_sync for c in model] if len(model) > 1 else model[0].no_sync
    schedule.finalize_model_grads_func = finalize_model_grads
    return optimizer


def use_fused(optimizer: MegatronOptimizer) -> None:
    """Take torch's fused AdamW, where torch's it is; apex and TE have no other."""
    for single in optimizer.chained_optimizers:
        if isinstance(single.optimizer, torch.optim.Adam):
            for group in single.optimizer.param_groups:
                group["fused"] = True


def unhook_optimizer(model: Sequence[DistributedDataParallel]) -> None:
    """Take back what `build_optimizer` hooked in, so that both can be freed.

    The optimizer's views of the parameters lead to the model through autograd's graph, where
    Python's collector cannot follow: with the hooks, both would stay for ever.
    """
    for chunk in model:
        chunk.config.grad_scale_func = None
        chunk.config.no_sync_func = None
        chunk.config.finalize_model_grads_func = None


def learning_rate(step: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (1 is the first): linear warm-up, then a cosine."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    decay_steps = max(config.steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / decay_steps, 1.0)
    final = config.final_lr
    return final + (config.lr - final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Give every parameter group the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
