"""Tensors on disk: safetensors directories read slice by slice and written so.

Nothing here knows a tensor's meaning (see `hf.py`) or a rank. A writer lays out every file from the
shapes alone, so any number of processes may each fill in the tensors they hold, and a process
need hold no more than the rows at hand.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minitron import artifact
from minitron.errors import MinitronError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000

_LIBC = ctypes.CDLL(None, use_errno=True)  # Linux' calls that Python has no name for
_SYNC_FILE_RANGE_WRITE = 2

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class WeightSource(Protocol):
    """Anything that yields slices of named full tensors: a directory, or an initialiser."""

    def read(self, name: str, *index: slice) -> Tensor:
        """The named tensor, or the part of it that `index` selects (one slice a dimension)."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightReader:
    """The tensors of a directory with `model.safetensors`, or shards and their index.

    Raises:
        MinitronError: a file is missing, truncated or no safetensors file, or the index names a
            tensor that its shard does not hold.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.infos: dict[str, TensorInfo] = {}
        self._files: dict[str, safe_open] = {}
        for shard, names in _shards(directory).items():
            path = directory / shard
            try:
                file = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise MinitronError(f"{path} is missing; restore the file") from None
            except (SafetensorError, OSError) as error:
                raise MinitronError(
                    f"{path} is not a readable safetensors file ({error}); copy or create it again"
                ) from None
            held = set(file.keys())
            for name in sorted(held) if names is None else names:
                if name not in held:
                    raise MinitronError(
                        f"{directory / INDEX_FILE} places {name} in {shard}, which lacks it"
                    )
                view = file.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise MinitronError(
                        f"{path}: {name} has dtype {view.get_dtype()}; minitron reads "
                        f"{', '.join(_DTYPES)} (a quantised checkpoint must be dequantised first)"
                    )
                self.infos[name] = TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()])
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def read(self, name: str, *index: slice) -> Tensor:
        """The named tensor, or the part of it that `index` selects; only that part is read."""
        if name not in self.infos:
            raise MinitronError(f"{self.directory} has no tensor {name}")
        if any(part.step not in (None, 1) for part in index):
            raise ValueError("safetensors ignores the step of a slice")
        return self._files[name].get_slice(name)[index or slice(None)]


class WeightWriter:
    """Writes a safetensors directory whose tensors arrive one by one, in any order, from any rank.

    The files are `model.safetensors`, or numbered shards with an index, exactly as transformers
    names them. Their layout follows from `infos` alone.

    Args:
        directory: where the files go; it exists.
        infos: every tensor's shape and dtype, in file order.
        max_shard_bytes: a new shard begins before a tensor that would exceed this.
    """

    def __init__(
        self,
        directory: Path,
        infos: Mapping[str, TensorInfo],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        self.directory = directory
        self.infos = dict(infos)
        self._shards = _plan_shards(self.infos, max_shard_bytes)
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._headers: dict[Path, tuple[bytes, int]] = {}
        for shard, names in self._shards.items():
            path = directory / shard
            header, offsets, size = _layout({name: self.infos[name] for name in names})
            self._headers[path] = (header, size)
            self._offsets.update({name: (path, offset) for name, offset in offsets.items()})
        self._descriptors: dict[Path, int] = {}

    def create(self) -> None:
        """Create the files at their full size with their headers, and the index (one process).

        Raises:
            MinitronError: there is no room for them.
        """
        for path, (header, size) in self._headers.items():
            with path.open("wb") as file:
                file.write(header)
                try:
                    file.truncate(size)
                    _allocate(file.fileno(), size)
                except OSError as error:
                    raise _unwritable(path, error) from None
        if len(self._shards) > 1:
            total = sum(info.num_bytes for info in self.infos.values())
            elements = sum(math.prod(info.shape) for info in self.infos.values())
            artifact.write_json(
                self.directory / INDEX_FILE,
                {
                    "metadata": {"total_size": total, "total_parameters": elements},
                    "weight_map": {n: s for s, names in self._shards.items() for n in names},
                },
            )

    def write(self, name: str, tensor: Tensor, first_row: int | None = None) -> None:
        """Write a tensor, or some of its rows, at its place; its files must have been created.

        Args:
            name: the tensor's.
            tensor: its content.
            first_row: where the rows in `tensor` begin; None writes all of them.

        Raises:
            MinitronError: the disk is full or fails.
        """
        info = self.infos[name]
        rows = info.shape[0] if first_row is None else len(tensor)
        first = first_row or 0
        if tuple(tensor.shape) != (rows, *info.shape[1:]) or first + rows > info.shape[0]:
            raise ValueError(f"{name}: {tuple(tensor.shape)} at row {first}, planned {info.shape}")
        path, offset = self._offsets[name]
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_WRONLY)
        offset += first * (info.num_bytes // info.shape[0])
        part = tensor.detach().to("cpu", info.dtype).contiguous().reshape(-1)
        data = part.view(torch.uint8).numpy().data
        _write(self._descriptors[path], data, offset, path)

    def close(self) -> None:
        """Flush what this process wrote to the disk."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._descriptors = {}


def _write(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    """Write all of `data`, and let the disk begin with it, so that less is left to flush."""
    begin = offset
    while data:
        try:
            written = os.pwrite(descriptor, data, offset)
        except OSError as error:
            raise _unwritable(path, error) from None
        data, offset = data[written:], offset + written
    if hasattr(_LIBC, "sync_file_range"):
        span = ctypes.c_int64(begin), ctypes.c_int64(offset - begin)
        _LIBC.sync_file_range(descriptor, *span, _SYNC_FILE_RANGE_WRITE)  # a hint: may fail


def _allocate(descriptor: int, size: int) -> None:
    """Set a file's blocks aside, where its file system can.

    Writing into a hole takes twice as long, and a disk that is too small is found out at once.
    `os.posix_fallocate` would do more: the C library lets it write to every block where the file
    system cannot.

    Raises:
        OSError: the disk is too small.
    """
    if not hasattr(_LIBC, "fallocate"):
        return
    offset, length = ctypes.c_int64(0), ctypes.c_int64(size)
    if _LIBC.fallocate(descriptor, 0, offset, length) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(number, os.strerror(number))


def _unwritable(path: Path, error: OSError) -> MinitronError:
    return MinitronError(
        f"{path} cannot be written ({error.strerror}); make room or write elsewhere"
    )


def _shards(directory: Path) -> dict[str, list[str] | None]:
    """Shard file names with the tensors the index places there (None: whatever the file holds)."""
    if not directory.is_dir():
        raise MinitronError(f"{directory} is not a directory; give a Hugging Face model directory")
    if (directory / SINGLE_FILE).exists():  # transformers, too, looks for it first
        return {SINGLE_FILE: None}
    path = directory / INDEX_FILE
    if not path.exists():
        raise MinitronError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a Hugging Face model "
            "directory with safetensors weights"
        )
    index = artifact.read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not weight_map or not isinstance(weight_map, dict):
        raise MinitronError(f"{path} has no weight_map; restore the file")
    shards: dict[str, list[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise MinitronError(
                f"{path} names the shard {shard!r}, which is no plain file name; only files "
                "inside the directory are read"
            )
        names = shards.setdefault(shard, [])
        assert names is not None
        names.append(name)
    return shards


def _plan_shards(infos: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if groups[-1] and filled + info.num_bytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.num_bytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": names
        for i, names in enumerate(groups, start=1)
    }


def _layout(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, absolute offset of each tensor, and the file's size.

    Wide dtypes lie first, as safetensors' own writer puts them, so that every tensor is aligned.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: -item[1].dtype.itemsize):
        starts[name] = end
        end += info.num_bytes
        entries[name] = {
            "dtype": _DTYPE_CODES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}, len(header) + end
