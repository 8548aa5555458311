"""Checkpoints to resume from: megatron-core's `torch_dist`, complete or absent.

`checkpoints/iter_0000100/` holds the sharded model, the optimizer and the run's position, and
beside them the model's `config.json` and tokenizer, so that a checkpoint can be exported by itself.
The directory is written under another name and renamed, so that a run killed while saving resumes
from the one before. What the ranks wrote has checksums, compared on loading. The data order is a
function of the seed, and the models have no dropout: there is no other state. Checkpoints are
pickles in part, to be loaded only from where one would run code.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException

from minitron import artifact, parallel
from minitron.data.tokenizer import Tokenizer
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel
from minitron.stage import shielding_children
from minitron.train.checksums import OPTIMIZER, WEIGHTS, verify, write_checksums
from minitron.train.optimizer import use_fused

TRACKER_FILE = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_(\d{7,})")

# The sharding whose optimizer state can be read under another topology.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens learnt from."""


@dataclass(frozen=True)
class ModelFiles:
    """What a directory with a trained model holds beside its weights."""

    dtype: torch.dtype
    """Of the weights, as the config says."""
    base_dir: Path | None
    """The model that it was trained from, whose other config keys and files are kept."""
    tokenizer: Tokenizer | None
    """The tokenizer of its data; None where only token files were given."""

    def write(self, directory: Path, arch: Architecture) -> None:
        """Write the config and copy the tokenizer into a directory."""
        hf.write_config(directory, arch, dtype=self.dtype, base_dir=self.base_dir)
        if self.tokenizer is not None:
            self.tokenizer.copy_to(directory)


def checkpoint_path(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, by Megatron's name."""
    return directory / f"iter_{step:07d}"


def list_checkpoints(directory: Path) -> list[int]:
    """Steps of the complete checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def save_checkpoint(
    directory: Path,
    position: Position,
    model: Sequence[LlamaModel],
    optimizer: MegatronOptimizer | None = None,
    *,
    files: ModelFiles | None = None,
    keep: int = 0,
) -> None:
    """Write a checkpoint from all ranks, then delete all but the `keep` newest.

    Args:
        directory: of all checkpoints of the run.
        position: of the run.
        model: this rank's chunks, not their data-parallel wrappers.
        optimizer: its optimizer; None saves the weights alone.
        files: the model's config and tokenizer, to lie beside the shards.
        keep: checkpoints to keep; 0 keeps all.

    Raises:
        MinitronError: the system refuses, as where the disk is full.
    """
    path = checkpoint_path(directory, position.step)
    partial = path.with_name(f".{path.name}.partial")

    def create() -> None:
        for leftover in directory.glob(".iter_*"):  # of attempts that were killed
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)

    def publish() -> None:
        if files is not None:
            files.write(partial, model[0].arch)
        artifact.replace_directory(partial, path)
        tracker = directory / f".{TRACKER_FILE}.partial"
        tracker.write_text(f"{position.step}\n")
        tracker.replace(directory / TRACKER_FILE)
        for old in list_checkpoints(directory)[:-keep] if keep else []:
            _delete(checkpoint_path(directory, old))

    state = _sharded_state(model, optimizer, is_loading=False)
    state |= _common(position, version=3.0)
    try:
        parallel.on_rank_zero(create)
        with shielding_children():
            dist_checkpointing.save(state, str(partial))
        write_checksums(partial)
        parallel.on_rank_zero(publish)
    except (OSError, RuntimeError, CheckpointException) as error:
        if parallel.is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)  # the next attempt may need the room
        free = shutil.disk_usage(directory.parent).free
        raise MinitronError(
            f"{path} cannot be written ({_reason(error)}; {free / 1e9:.1f} GB are free there); "
            "make room, and go on with --resume"
        ) from error


def _delete(path: Path) -> None:
    """Delete a checkpoint, which never is half there under its name."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))


def load_checkpoint(
    path: Path, model: Sequence[LlamaModel], optimizer: MegatronOptimizer | None = None
) -> Position:
    """Fill a model, and its optimizer if given, from a checkpoint of any topology.

    Returns:
        How far the run had come.

    Raises:
        MinitronError: there is no complete checkpoint at `path`, or it is damaged or of another
            model.
    """
    if not (path / "metadata.json").exists():
        raise MinitronError(f"{path} is not a torch_dist checkpoint (it has no metadata.json)")
    verify(path, [WEIGHTS] if optimizer is None else [WEIGHTS, OPTIMIZER])
    if optimizer is not None:
        _create_state(optimizer)
    state = _sharded_state(model, optimizer, is_loading=True)
    state |= _common(Position(), version=0.0)
    try:
        loaded = dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        raise MinitronError(
            f"{path} cannot be loaded ({_reason(error)}); it is damaged or of another model: "
            "take another checkpoint"
        ) from error
    for name, chunk in _named(model).items():
        chunk.load_state_dict(loaded[name])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        _separate_steps(optimizer)
        use_fused(optimizer)  # which what is loaded may not say
    return Position(int(loaded["iteration"]), int(loaded.get("consumed_tokens", 0)))


def _common(position: Position, *, version: float) -> dict[str, Any]:
    """What is the same on all ranks, by Megatron's names where it has one."""
    return {
        "iteration": position.step,
        "consumed_tokens": position.tokens,
        "checkpoint_version": version,
    }


def _reason(error: BaseException) -> str:
    """What went wrong, on the first rank where it did, in one line."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()), (RuntimeError("on another rank"), None))
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _sharded_state(
    model: Sequence[LlamaModel], optimizer: MegatronOptimizer | None, *, is_loading: bool
) -> dict[str, Any]:
    metadata = {**_METADATA, "dp_cp_group": model[0].topology.groups.dp_cp}
    state: dict[str, Any] = {
        name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(model).items()
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _named(model: Sequence[LlamaModel]) -> dict[str, LlamaModel]:
    """Chunks by Megatron's names. On disk, tensors go by the number of their layer in the model."""
    if len(model) == 1:
        return {"model": model[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(model)}


def _create_state(optimizer: MegatronOptimizer) -> None:
    """Let Adam allocate its moments, which it otherwise does at its first step."""
    for single in optimizer.chained_optimizers:
        _keep_step(single)
        inner = single.optimizer
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        inner.zero_grad()


def _separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own `step` again.

    megatron-core 0.16 loads one tensor into all of them, which torch's Adam then counts up once for
    every parameter.
    """
    for single in optimizer.chained_optimizers:
        for state in single.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _keep_step(optimizer: DistributedOptimizer) -> None:
    """Make an optimizer's loading pass over torch Adam's `step`, which is a tensor of its state.

    megatron-core 0.16 leaves it out of what it loads for a parameter and then looks for it there;
    it has set it from the parameter groups by then.
    """
    load = optimizer._set_main_param_and_optimizer_states

    def load_keeping_step(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, position = optimizer.model_param_group_index_map[parameter]
        main = optimizer.optimizer.param_groups[group]["params"][position]
        state = optimizer.optimizer.state[main]
        load(parameter, {"step": state["step"], **tensors} if "step" in state else tensors)

    optimizer._set_main_param_and_optimizer_states = load_keeping_step
