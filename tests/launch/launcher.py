"""Launch scripts as a user starts them: by themselves, under torchrun, or many in one process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
STAGES = sorted(path.stem for path in LAUNCH.glob("*.py"))

TIMEOUT_S = 240
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@dataclass(frozen=True)
class Result:
    """How a launch ended."""

    status: int
    out: str
    err: str


def environment(cache: Path) -> dict[str, str]:
    """The environment of a launch, whose text cache is `cache`."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MINITRON_CACHE": str(cache)}
    return inherited | own


class Launch:
    """A stage that runs: `python launch/STAGE.py`, or under torchrun on `ranks` ranks.

    Its output goes to files: a rank that outlives its test then holds nobody's pipe.
    """

    def __init__(self, stage: str, *arguments: object, cwd: Path, ranks: int = 1) -> None:
        command = [sys.executable, *((*TORCHRUN, str(ranks)) if ranks > 1 else ())]
        self._files = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self._process = subprocess.Popen(
            [*command, str(LAUNCH / f"{stage}.py"), *map(str, arguments)],
            cwd=cwd,
            env=environment(cwd / ".cache"),
            stdin=subprocess.DEVNULL,
            stdout=self._files[0],
            stderr=self._files[1],
        )

    @property
    def is_running(self) -> bool:
        """True until the launch has ended."""
        return self._process.poll() is None

    def wait(self, timeout_s: float = TIMEOUT_S) -> Result:
        """The end of the launch.

        Raises:
            AssertionError: it has not ended in time; its processes are killed.
        """
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {timeout_s} s: {self._result()}") from None
        return self._result()

    def terminate(self) -> None:
        """Ask the launch to end; torchrun passes that on to its ranks."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill the launch with all its ranks and their children, as a node that goes down does."""
        import psutil  # gpu-check collects these tests without it

        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def _result(self) -> Result:
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
        return Result(self._process.returncode, *texts)


def launch(stage: str, *arguments: object, cwd: Path, ranks: int = 1) -> Result:
    """Run a stage to its successful end."""
    result = Launch(stage, *arguments, cwd=cwd, ranks=ranks).wait()
    assert result.status == 0, f"{stage} {' '.join(map(str, arguments))}:\n{result.err}"
    return result


class ForkServer:
    """Runs stages in forks of one process that has imported everything.

    Every rank is a process of its own that runs the whole script, in the environment that torchrun
    would give it; what is saved is the seconds that a new process takes to import torch and
    megatron-core.
    """

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=directory,
            env=environment(directory / ".cache"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, stage: str, *arguments: object, cwd: Path, ranks: int = 1) -> Result:
        """Run `launch/STAGE.py` with these arguments; a status of None means that it hung.

        More than one rank have one output, and the status of the first of them that failed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {"stage": stage, "arguments": [str(a) for a in arguments], "cwd": str(cwd)}
        request["ranks"] = ranks
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Result(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


def _serve() -> None:
    for stage in STAGES:
        runpy.run_path(str(LAUNCH / f"{stage}.py"))  # for what it imports
    gc.freeze()  # forks share it, and no collection of theirs looks through it
    for line in sys.stdin:
        print(json.dumps(_run(**json.loads(line))), flush=True)


def _run(stage: str, arguments: list[str], cwd: str, ranks: int) -> dict[str, Any]:
    from torch.distributed import TCPStore

    common: dict[str, Any] = {}
    if ranks > 1:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        common = {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the ranks do not open it themselves
            "TORCHELASTIC_RESTART_COUNT": 0,
            "WORLD_SIZE": ranks,
        }
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                if common:
                    own = common | {"RANK": rank, "LOCAL_RANK": rank}
                    os.environ.update({name: str(value) for name, value in own.items()})
                os.chdir(cwd)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                _become(str(LAUNCH / f"{stage}.py"), arguments)
            children.append(child)
        deadline = time.monotonic() + TIMEOUT_S / 2
        statuses = [_wait(child, deadline) for child in children]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    status = next((status for status in statuses if status != 0), 0)
    return {"status": status, "out": texts[0], "err": texts[1]}


def _become(script: str, arguments: list[str]) -> NoReturn:
    sys.argv = [script, *arguments]
    status = 1
    try:
        runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(code)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


if __name__ == "__main__":
    _serve()
