"""One writer for a run: a job that is submitted twice would mix two runs in one directory."""

from __future__ import annotations

import fcntl
import itertools
import os
import platform as host
import time
from pathlib import Path
from typing import TextIO

from minitron import artifact
from minitron.errors import MinitronError
from minitron.metrics import log

_PATIENCE_S = 120
_locks: dict[Path, TextIO] = {}


def lock(directory: Path) -> None:
    """Keep other processes from writing a run until `unlock`, or the end of this one.

    Where the file system knows no locks, nothing is kept. A lock that another process has is waited
    for: a file system may hold that of a node that is down for a while.

    Raises:
        MinitronError: another process goes on writing.
    """
    path = directory.resolve() / artifact.LOCK
    if path in _locks:
        return
    for waited_s in itertools.count():
        file = path.open("a+")  # anew each time: the one before may have been unlinked
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except BlockingIOError:
            file.seek(0)
            said = f"{directory} is being written by {file.read() or 'another process'}"
            if waited_s >= _PATIENCE_S:
                raise MinitronError(f"{said}; wait for its end, or choose another --out") from None
            if not waited_s:
                log(f"{said}; waits {_PATIENCE_S} s for its end")
            time.sleep(1)
        except FileNotFoundError:
            pass  # unlinked between the two lines
        except OSError:
            break
        file.close()
    file.truncate(0)
    file.write(f"process {os.getpid()} on {host.node()}")
    file.flush()
    _locks[path] = file


def unlock(directory: Path) -> None:
    """Let others write a run again."""
    path = directory.resolve() / artifact.LOCK
    path.unlink(missing_ok=True)
    _locks.pop(path).close()
