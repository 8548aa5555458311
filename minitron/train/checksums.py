"""CRC-32s of a checkpoint's files: a flipped bit would otherwise stay in a run for good.

A file holds weights and optimizer states in turns. Each have a checksum of their own in it, by the
places that torch's index gives: weights can be loaded, and compared, without the rest.
"""

from __future__ import annotations

import itertools
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader

from minitron import artifact, parallel
from minitron.errors import MinitronError

CHECKSUMS = "checksums.json"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
_WHOLE = ((0, 1 << 62),)

_Part = tuple[str, str]  # weights (with all that is no tensor) or optimizer, and the file
_Spans = Sequence[tuple[int, int]]  # begins and ends
_INDEX: _Part = (WEIGHTS, ".metadata")  # what torch knows of the files


def write_checksums(directory: Path) -> None:
    """Write `checksums.json` of what lies in a checkpoint's directory; call on all ranks.

    Raises:
        MinitronError: a file cannot be read where it has not been written.
    """
    by_part: dict[str, dict[str, int]] = {WEIGHTS: {}, OPTIMIZER: {}}
    spans = _spans(directory, _listing(directory))
    for (part, name), checksum in _checksums(directory, spans).items():
        if checksum is None:
            raise MinitronError(
                f"{directory / name} cannot be read by all ranks; write checkpoints to a file "
                "system that all nodes share"
            )
        by_part[part][name] = checksum
    parallel.on_rank_zero(lambda: artifact.write_json(directory / CHECKSUMS, by_part))


def verify(path: Path, parts: Sequence[str]) -> None:
    """Refuse a checkpoint of which some part is not what was written; collective.

    Checkpoints that came without checksums pass.
    """

    def read() -> dict[_Part, int]:
        """What was written, once the index, which says where that is, has been found right."""
        if not (path / CHECKSUMS).exists():
            return {}
        by_part = artifact.read_json(path / CHECKSUMS)
        written = {(part, name): x for part in parts for name, x in by_part[part].items()}
        check(_INDEX, _checksum(path / _INDEX[1]), written[_INDEX])
        return written

    def check(part: _Part, found: int | None, expected: int) -> None:
        if found is None or found != expected:
            fault = f"has CRC-32 {found}, {CHECKSUMS} says {expected}"
            raise MinitronError(
                f"{path / part[1]} {'cannot be read' if found is None else fault}; the "
                "checkpoint is damaged: take another, or delete it to resume from the one before"
            )

    if written := parallel.on_rank_zero(read):
        spans = _spans(path, [name for part, name in written if part == WEIGHTS])
        found = _checksums(path, {part: spans[part] for part in written})
        for part, expected in written.items():
            check(part, found[part], expected)


def _listing(directory: Path) -> list[str]:
    """Files that any rank sees, for one may not see another node's yet; collective."""
    _, size = parallel.world()
    seen: list[set[str]] = [set() for _ in range(size)]
    dist.all_gather_object(seen, {file.name for file in directory.iterdir()})
    return sorted(set().union(*seen))


def _spans(directory: Path, names: Iterable[str]) -> dict[_Part, _Spans]:
    """Where files hold the optimizer's state, and where the rest; collective."""

    def read() -> dict[str, list[tuple[int, int]]]:
        states = defaultdict(list)
        for item, place in FileSystemReader(directory).read_metadata().storage_data.items():
            if item.fqn.startswith("optimizer."):
                states[place.relative_path].append((place.offset, place.offset + place.length))
        return dict(states)

    spans: dict[_Part, _Spans] = {(WEIGHTS, name): _WHOLE for name in names}
    for name, states in parallel.on_rank_zero(read).items():
        states.sort()
        edges = [0, *itertools.chain(*states), _WHOLE[0][1]]
        spans[WEIGHTS, name] = list(zip(edges[::2], edges[1::2], strict=True))
        spans[OPTIMIZER, name] = states
    return spans


def _checksums(directory: Path, spans: Mapping[_Part, _Spans]) -> dict[_Part, int | None]:
    """CRC-32 of parts of files, None of what is missing; collective, each rank reads some."""
    rank, size = parallel.world()
    own = sorted(spans)[rank::size]
    with ThreadPoolExecutor(max_workers=4) as pool:
        checksums = pool.map(lambda part: _checksum(directory / part[1], spans[part]), own)
        found = dict(zip(own, checksums, strict=True))
    gathered: list[dict[_Part, int | None]] = [{} for _ in range(size)]
    dist.all_gather_object(gathered, found)
    return {part: checksum for some in gathered for part, checksum in some.items()}


def _checksum(path: Path, spans: _Spans = _WHOLE) -> int | None:
    """CRC-32 of the bytes from each begin to its end, or the file's; None if it cannot be read."""
    checksum = 0
    try:
        with path.open("rb") as file:
            for begin, end in spans:
                file.seek(begin)
                while piece := file.read(min(end - begin, 1 << 24)):
                    checksum = zlib.crc32(piece, checksum)
                    begin += len(piece)
    except OSError:
        return None
    return checksum
