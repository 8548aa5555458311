"""What the losses over vocabulary-parallel logits share: one packed collective, token chunks.

Every such loss runs in two steps. A rank first condenses its columns of a token's logits into a few
numbers, kept relative to the rank's own maximum; one all-gather packs them, and merging is local.
The gradient is then computed from the saved numbers, column by column, without a collective. No
collective ever enters autograd: three published implementations do that and return a right loss
with a gradient that is wrong by a factor of the group's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

# torch's collectives as ops: unlike torch.distributed's functions, a graph can hold them.
_collectives = torch.ops._c10d_functional

# Elements of a chunk: large enough to keep the kernels busy, small enough that the handful of
# fp32 temporaries stay far below the logits themselves.
_CHUNK_ELEMENTS = 1 << 22

# Stands for the maximum over no columns: finite, so that differences of it stay defined, and far
# below any logit, so that its weight in a merge is exactly zero.
NO_COLUMNS = -1e30


def token_chunks(num_tokens: int, num_columns: int) -> Iterator[slice]:
    """Cut tokens into chunks of bounded size."""
    step = max(1, _CHUNK_ELEMENTS // max(num_columns, 1))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))


def label_columns(labels: Tensor, offset: int, valid_columns: int) -> tuple[Tensor, Tensor]:
    """Each label's column on this rank, 0 where it has none, and whether it has one."""
    columns = labels - offset
    here = (columns >= 0) & (columns < valid_columns)
    return torch.where(here, columns, 0), here


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept in: fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def group_name(group: dist.ProcessGroup | None) -> str | None:
    """How an op's arguments name a group."""
    return None if group is None else group.group_name


def named_group(name: str | None) -> dist.ProcessGroup | None:
    """The group that `group_name` named."""
    return None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]


def first_column(logits: Tensor, group: dist.ProcessGroup | None) -> int:
    """The token id of a shard's first column."""
    return 0 if group is None else group.rank() * logits.size(-1)


def gather_statistics(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' statistics, [t, tokens, k], from each rank's [tokens, k]; one collective."""
    return start_gathering(statistics, group)()


def start_gathering(statistics: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin `gather_statistics` in the background; what is returned waits for its result."""
    if group is None or group.size() == 1:
        return lambda: statistics.unsqueeze(0)
    shape = (group.size(), *statistics.shape)
    gathered = _collectives.all_gather_into_tensor(
        statistics.contiguous(), group.size(), group.group_name
    )
    return lambda: _collectives.wait_tensor(gathered).view(shape)


def start_summing(values: Tensor, group: dist.ProcessGroup | None) -> Callable[[], Tensor]:
    """Begin to add up all ranks' values in the background; what is returned waits for the sum.

    The sum takes the place of the values, but in a graph that is being traced.
    """
    if group is None or group.size() == 1:
        return lambda: values
    in_place = type(values) is Tensor and not torch.compiler.is_compiling()
    all_reduce = _collectives.all_reduce_ if in_place else _collectives.all_reduce
    total = all_reduce(values, "sum", group.group_name)
    return lambda: _collectives.wait_tensor(total)


def scatter_sum(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part, of the first dimension, of the sum of all ranks' values."""
    if group is None or group.size() == 1:
        return values
    part = _collectives.reduce_scatter_tensor(values, "sum", group.size(), group.group_name)
    return _collectives.wait_tensor(part)


def vocab_parallel_argmax(
    logits: Tensor, *, valid_columns: int, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """The column of the largest logit, the first of equals; one collective.

    Args:
        logits: [..., v/t].
        valid_columns: columns of this rank that are no padding.
        tp_group: the ranks that share the columns.

    Returns:
        [...] int64, counted over all ranks.
    """
    rows = logits.detach().flatten(0, -2)
    found = largest_column(rows, valid_columns, first_column(logits, tp_group))
    return first_largest(gather_statistics(found, tp_group)).view(logits.shape[:-1])


def largest_column(rows: Tensor, valid_columns: int, offset: int) -> Tensor:
    """A rank's largest logit and its token id, the first of equals, [tokens, 2] in fp64.

    Args:
        rows: [tokens, v/t].
        valid_columns: leading columns that stand for a token.
        offset: id of the first column.
    """
    found = rows.new_zeros(rows.size(0), 2, dtype=torch.float64)
    found[:, 0] = NO_COLUMNS
    if valid_columns:
        best = rows[:, :valid_columns].max(1)
        found[:, 0], found[:, 1] = best.values, best.indices + offset
    return found


def first_largest(gathered: Tensor) -> Tensor:
    """The token ids [tokens] of the largest of all ranks' `largest_column`, [t, tokens, 2]."""
    winner = gathered[..., 0].argmax(0, keepdim=True)
    return gathered[..., 1].gather(0, winner)[0].long()
