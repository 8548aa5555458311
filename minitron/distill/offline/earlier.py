"""Extending a store: a larger one is written of what a smaller one holds.

Samples are stored in the order of their keys, so that more of them lie between those of before and
every shard becomes another. The complete store is set aside under a hidden name beside `--out`, its
blocks are copied as they are, and the teacher sees the other samples alone. Whoever is killed in
between goes on with both; the old store goes when the new one has its manifest.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from minitron import artifact
from minitron.distill.offline.files import (
    STORE,
    StoreInfo,
    differences,
    read_info,
    sample_key,
    split_key,
)
from minitron.distill.offline.samples import SampleSet
from minitron.distill.offline.store import LogitStore
from minitron.errors import MinitronError
from minitron.metrics import log

# What differs between a store and one with more samples.
_OF_SAMPLES = ("samples_crc:", "shard_samples:", "streams.")


def earlier_path(out: Path) -> Path:
    """Where the store is kept that the one in `out` extends."""
    out = Path(os.path.realpath(out))
    return out.with_name(f".{out.name}.earlier")


def open_earlier(out: Path) -> LogitStore | None:
    """The store that the one in `out` extends, if it does."""
    path = earlier_path(out)
    return LogitStore(path) if path.exists() else None


def discard_earlier(out: Path) -> None:
    """Delete what `out` was extended from, if it was."""
    shutil.rmtree(earlier_path(out), ignore_errors=True)


def take_over(out: Path, info: StoreInfo, samples: SampleSet) -> None:
    """Go on with what an earlier attempt left, or set it aside to extend it; on one process.

    Args:
        out: directory of the store; need not exist.
        info: what `store.json` is to say.
        samples: that are to be stored.

    Raises:
        MinitronError: it was at another store, or at a smaller one that is not complete.
    """
    aside = earlier_path(out)
    if not (out / STORE).exists():
        if aside.exists():
            _check_extends(aside, info, samples)
        return
    if not differences(read_info(out), info):
        return
    _check_extends(out, info, samples)
    discard_earlier(out)
    try:
        Path(os.path.realpath(out)).rename(aside)
    except OSError as error:
        raise MinitronError(
            f"{out} cannot be set aside as {aside} ({error.strerror}), to be extended; "
            "choose another --out for the larger store"
        ) from None
    log(f"extends {out}, whose samples are kept in {aside} until all are stored")


def _check_extends(path: Path, info: StoreInfo, samples: SampleSet) -> None:
    """Refuse to write another store of that at `path`, unless it has the same samples and more."""
    changed = differences(read_info(path), info)
    shown = "; ".join(change for change in changed if not change.startswith(_OF_SAMPLES[:2]))
    if all(change.startswith(_OF_SAMPLES) for change in changed):
        if artifact.read_manifest(path) is None:
            raise MinitronError(
                f"--resume would extend {path}, which is not complete: {shown}; first finish it "
                "with the old values"
            )
        if _holds_all_of(samples, LogitStore(path)):
            return
    raise MinitronError(
        f"--resume would continue another store than {path / STORE}: {shown}; "
        "take the old values or another --out"
    )


def _holds_all_of(samples: SampleSet, store: LogitStore) -> bool:
    streams = {windows.stream.fingerprint: i for i, windows in enumerate(samples.streams)}
    numbers = [streams.get(int(stream.fingerprint, 16), -1) for stream in store.info.streams]
    stream, number = split_key(store.keys)
    keys = sample_key(np.array(numbers, np.int64)[stream], number)
    return bool(np.isin(keys, samples.keys, assume_unique=True).all())
