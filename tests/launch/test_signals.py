"""Real signals to a real distillation, started by its Slurm template through the real torchrun."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minitron.train.checkpoint import list_checkpoints
from tests.launch.launcher import ROOT, environment
from tests.launch.test_slurm import SCONTROL, SLURM, SRUN
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import save_llama

psutil = pytest.importorskip("psutil")

TORCHRUN = f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'


def _job_id():
    """Of a job whose port is free, as common.sh derives it."""
    while True:
        port = random.randrange(20000, 30000)
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("localhost", port))
            return str(port - 20000)


class Job:
    """Two ranks of launch/slurm/distill.sbatch, with stand-ins for srun and scontrol alone."""

    def __init__(self, root: Path, *arguments: object) -> None:
        settings = {
            "PATH": f"{root / 'tools'}:{os.environ['PATH']}",
            "LOG": str(root / "log"),
            "SLURM_JOB_ID": _job_id(),
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_SUBMIT_DIR": str(root),
            "RANKS_PER_NODE": "2",
        }
        self._output = (root / "output").open("a")
        self._shell = subprocess.Popen(
            ["bash", root / "launch" / "slurm" / "distill.sbatch", *map(str, arguments)],
            cwd=root,
            env=environment(root / ".cache") | settings,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        self._metrics = root / "run" / "metrics.jsonl"

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has done a step."""
        deadline = time.monotonic() + 120
        while not self._metrics.exists() or len(self._metrics.read_text().splitlines()) < step:
            assert self._shell.poll() is None, "the job has ended"
            assert time.monotonic() < deadline, f"no step {step}"
            time.sleep(0.05)

    def signal_shell(self) -> None:
        """What `#SBATCH --signal=B:USR1@300` does."""
        self._shell.send_signal(signal.SIGUSR1)

    def signal_step(self) -> None:
        """What Slurm does at the time limit: all processes at once."""
        for process in psutil.Process(self._shell.pid).children(recursive=True):
            process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The job's status, once no process of it is left."""
        processes = psutil.Process(self._shell.pid).children(recursive=True)
        status = self._shell.wait(60)
        _, alive = psutil.wait_procs(processes, 10)
        assert not alive
        return status

    def close(self) -> None:
        """Kill what is left."""
        if self._shell.poll() is None:
            for process in psutil.Process(self._shell.pid).children(recursive=True):
                process.kill()
            self._shell.kill()
            self._shell.wait()
        self._output.close()


@pytest.fixture
def submit(tmp_path):
    """Start jobs in a checkout with a teacher, a student and data."""
    shutil.copytree(SLURM, tmp_path / "launch" / "slurm")
    shutil.copy(ROOT / "launch" / "distill.py", tmp_path / "launch")
    (tmp_path / "log").mkdir()
    for path, text in (
        (tmp_path / "tools" / "srun", SRUN),
        (tmp_path / "tools" / "scontrol", SCONTROL),
        (tmp_path / ".venv" / "bin" / "torchrun", TORCHRUN),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    save_llama(tmp_path / "teacher", vocab_size=VOCAB, seed=1)
    save_llama(tmp_path / "student", vocab_size=VOCAB, num_hidden_layers=2)
    write_tokens(tmp_path / "train", 40 * SEQ_LENGTH + 1)
    jobs = []

    def start(*arguments):
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield start
    for job in jobs:
        job.close()


def test_a_job_is_stopped_by_signals_and_goes_on(submit, tmp_path, forked):
    recipe = (
        *("--teacher", "teacher", "--teacher.allow_untrained", "--student", "student"),
        *("--data.path", "train", "--data.seq_length", SEQ_LENGTH, "--out", "run"),
        *("--train.steps", 1_000_000, "--train.checkpoint_interval", 0),
    )
    checkpoints, requeued = tmp_path / "run" / "checkpoints", tmp_path / "log" / "requeued"

    def steps_done():
        """Steps in the record, which ends at the newest checkpoint."""
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        assert steps == list(range(1, len(steps) + 1))
        assert list_checkpoints(checkpoints)[-1] == len(steps)
        said = (tmp_path / "output").read_text()
        assert f"stopped by a signal at step {len(steps)}, from where --resume goes on" in said
        assert not (tmp_path / "run" / "manifest.json").exists()
        return len(steps)

    job = submit(*recipe)
    job.wait_for_step(2)
    job.signal_shell()
    assert job.wait() == 0
    assert requeued.read_text().count("\n") == 1
    done = steps_done()

    job = submit(*recipe)  # the template says --resume
    job.wait_for_step(done + 2)
    job.signal_step()
    assert job.wait() != 0
    assert requeued.read_text().count("\n") == 1  # for nobody had announced the end
    assert steps_done() > done

    until = steps_done() + 1
    result = forked("distill", *recipe, "--resume", "--until_step", until, cwd=tmp_path)
    assert result.status == 0, result.err
    assert list_checkpoints(checkpoints)[-1] == until
