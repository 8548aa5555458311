"""The frame around every launch script: parse the recipe, run it, and end the process properly.

A mistake of the user ends as one line and status 2, a bug as one traceback and status 1. In a
distributed run the first rank that fails speaks for all: what the others meet afterwards is the
same mistake again, or the echo of a lost peer.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tqdm import tqdm

from minitron.errors import MinitronError, Stopped
from minitron.metrics import launch_rank

Recipe = TypeVar("Recipe")

USER_ERROR = 2
BUG = 1
STOPPED = 75  # EX_TEMPFAIL: run it again, with --resume
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it
BROKEN_PIPE = 141  # 128 + SIGPIPE

GRACE_S = 10.0
"""How long a failed rank waits for torchrun to end it on behalf of the rank that speaks."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends before it takes the machine away."""

_CHATTY = (
    "megatron",
    "torch",
    "transformer_engine",
    "filelock",
    "matplotlib",
    "lm_eval",
    "datasets",
    "huggingface_hub",
)
_FAILURE_KEY = "minitron/failure"


def parse(recipe_class: type[Recipe]) -> Recipe:
    """Read the recipe off the command line; a mistake there ends the process, as in `run`.

    A launch script calls this before it imports torch and megatron-core, so that `--help` and
    mistakes do not wait for them.
    """
    from minitron import config  # needs packages that the rest of this file, and its users, do not

    configure_logging()
    with _ending_the_process():
        recipe = config.parse(recipe_class)
        config.check_paths(recipe)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports without a traceback
    return recipe


def run(main: Callable[[Recipe], None], recipe: Recipe) -> None:
    """Call `main` with the recipe.

    Returns after success. A failure ends the process: with status 2 and one line `error: ...` for a
    `MinitronError`, 130 for an interrupt, 1 and a traceback for anything else; never by waiting for
    other ranks. So does a signal that has stopped a run, with status 75.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with _ending_the_process():
        main(recipe)
        sys.stdout.flush()
    distributed = _distributed()
    if distributed is not None:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _ending_the_process() -> Iterator[None]:
    """End the process with what is raised within: one line, a traceback, or nothing to say."""
    try:
        yield
    except MinitronError as error:
        _report(f"error: {error}")
        _exit(USER_ERROR)
    except Stopped:
        _exit(STOPPED)
    except KeyboardInterrupt:
        _exit(INTERRUPTED)
    except SystemExit:  # --help
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, BrokenPipeError) and _is_stdout_broken():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left
            _exit(BROKEN_PIPE)
        _report(_traceback())
        _exit(BUG)


class StopRequest:
    """Within the context, the signals of `STOP_SIGNALS` are noted and end nothing.

    Signals come to each rank in its own time, or to one alone: ranks have to agree on when to heed
    them. Only where a rank has failed, and torchrun ends the others, do these end at once: they may
    wait for it in a collective, in which Python notes nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        def note(*_: Any) -> None:
            self.received = True

        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._handlers = {number: signal.signal(number, note) for number in STOP_SIGNALS}
            arrivals, arrival = os.pipe()
            os.set_blocking(arrival, False)
            self._wakeup = signal.set_wakeup_fd(arrival)  # written to whatever the main thread does
            threading.Thread(target=_end_with_a_failed_rank, args=(arrivals,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            os.close(signal.set_wakeup_fd(self._wakeup))


def _end_with_a_failed_rank(arrivals: int) -> None:
    """End this process when a signal arrives and another rank has failed; for a thread.

    Args:
        arrivals: file descriptor with a byte for every signal.
    """
    with open(arrivals, "rb", buffering=0) as file:
        while file.read(1):
            distributed = _distributed()
            with contextlib.suppress(RuntimeError):  # the process that served the store is gone
                if distributed is not None and _store(distributed).check([_FAILURE_KEY]):
                    _exit(BUG)


@contextlib.contextmanager
def shielding_children() -> Iterator[None]:
    """Within the context, start processes that `STOP_SIGNALS` do not end.

    torchrun signals a rank's whole process group, of which what writes its checkpoints is part.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # children inherit it
    try:
        resource_tracker.ensure_running()  # a child, too; at its start Python unblocks SIGTERM
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def configure_logging() -> None:
    """Send log lines to stderr, INFO from rank 0 and warnings from the others; calm libraries."""
    rank = launch_rank()
    handler = _StderrHandler()
    prefix = f"[rank {rank}] " if rank else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(
        level=logging.WARNING if rank else logging.INFO, handlers=[handler], force=True
    )
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module=name)


class _StderrHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _distributed() -> Any:
    """`torch.distributed` if this process has joined a process group; torch is not imported."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _report(message: str) -> None:
    """Print a failure unless another rank speaks for the job.

    torchrun ends all ranks as soon as one exits, so a silent rank leaves the other the time to
    print, and the place of the root cause in torchrun's own summary.
    """
    distributed = _distributed()
    if not _is_first_failure(distributed):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_S)
        if distributed is not None:
            return
    _tell_torchrun(message)
    sys.stderr.write(f"{message}\n")  # in one piece: other ranks write here too
    sys.stderr.flush()


def _tell_torchrun(message: str) -> None:
    """Put a failure where torchrun looks for what its summary says of this rank."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": details}}))


def _is_first_failure(distributed: Any) -> bool:
    """Whether no other rank failed before; without a process group rank 0 always is the first."""
    if distributed is None:
        return launch_rank() == 0
    try:
        return _store(distributed).add(_FAILURE_KEY, 1) == 1
    except RuntimeError:  # the process that served the store is gone: nobody else can speak
        return True


def _store(distributed: Any) -> Any:
    """What the ranks of a process group know of each other."""
    return distributed.distributed_c10d._get_default_store()


def _traceback() -> str:
    text = traceback.format_exc().rstrip()
    return f"[rank {launch_rank()}] {text}" if "RANK" in os.environ else text


def _is_stdout_broken() -> bool:
    """Whether the reader of stdout has gone (`... | head`)."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _exit(status: int) -> NoReturn:
    """End the process; where others may wait for this rank, without waiting for them."""
    if _distributed() is None:
        sys.exit(status)
    for child in multiprocessing.active_children():
        child.kill()  # it may be shielded from SIGTERM
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)
