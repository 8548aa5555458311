"""A pool of ranks that distributed tests share.

Importing torch and megatron-core takes seconds, joining a gloo group milliseconds: so four
processes are forked once, from one that has imported both, and every test runs its function on the
first `world_size` of them in a process group of its own.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

POOL_SIZE = 4


class RankPool:
    """Processes that run functions as the ranks of a gloo process group."""

    def __init__(self) -> None:
        # Forks of a process that has looked for GPUs cannot use them.
        self._context = mp.get_context("spawn" if torch.cuda.is_available() else "forkserver")
        self._context.set_forkserver_preload(["tests.runs", "tests.reference"])
        self._processes: list[Any] = []

    def run(
        self, function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
    ) -> list[Any]:
        """Call `function(*args)` on every rank of a new process group; results by rank.

        `function` is a module-level function. Tensors come back as they are.

        Raises:
            AssertionError: a rank raised (its traceback is the message) or did not answer in time.
        """
        if not self._processes:
            self._start()
        with tempfile.TemporaryDirectory() as directory:
            job = pickle.dumps((function, args))
            for rank in range(world_size):
                self._inboxes[rank].put((job, rank, world_size, f"{directory}/store"))
            results: list[Any] = [None] * world_size
            errors = {}
            for _ in range(world_size):
                try:
                    rank, ok, payload = self._outbox.get(timeout=timeout_s if not errors else 10)
                except queue.Empty:
                    break
                if ok:
                    results[rank] = pickle.loads(payload)
                else:
                    errors[rank] = payload
            else:
                if not errors:
                    return results
        self.close()  # ranks that failed or hang are of no further use
        first = min(errors, default=None)
        raise AssertionError(
            f"no answer within {timeout_s} s" if first is None else f"rank {first}: {errors[first]}"
        )

    def _start(self) -> None:
        self._inboxes = [self._context.Queue() for _ in range(POOL_SIZE)]
        self._outbox = self._context.Queue()
        self._processes = [
            self._context.Process(target=_serve, args=(inbox, self._outbox), daemon=False)
            for inbox in self._inboxes
        ]
        os.environ["OMP_NUM_THREADS"] = "1"  # inherited: two cores, up to four ranks
        for process in self._processes:
            process.start()

    def close(self) -> None:
        """End the processes, and the checkpoint writers they started, which would outlive them."""
        if not self._processes:
            return
        import psutil  # gpu-check runs tests without it

        for process in self._processes:
            for child in [
                *psutil.Process(process.pid).children(recursive=True),
                psutil.Process(process.pid),
            ]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.join()
        self._processes = []


def _serve(inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    import torch.distributed as dist

    parent = os.getppid()
    while True:
        try:
            job, rank, world_size, store = inbox.get(timeout=5)
        except queue.Empty:
            if os.getppid() != parent:  # the test run was killed
                return
            continue
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        try:
            function, args = pickle.loads(job)
            gc.freeze()  # the modules that this imported, through which no collection need look
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
            )
            payload = pickle.dumps(function(*args))
            gc.collect()  # models hold the groups that are about to go, and their threads
            dist.barrier()
            dist.destroy_process_group()
            outbox.put((rank, True, payload))
        except BaseException:
            outbox.put((rank, False, traceback.format_exc()))


_pool = RankPool()


def run_distributed(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120
) -> list[Any]:
    """Run a module-level function on `world_size` gloo ranks; its results by rank."""
    return _pool.run(function, world_size, *args, timeout_s=timeout_s)


def close_pool() -> None:
    """End the shared pool."""
    _pool.close()
