import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = '''
"""A launch script in small."""
import contextlib
import ctypes
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass

from minitron.errors import MinitronError, Stopped
from minitron.metrics import log
from minitron.stage import StopRequest, parse, run, shielding_children


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Do one of several things."""

    what: str = "nothing"
    """What to do."""


def join():
    import torch.distributed as dist
    dist.init_process_group("gloo")
    return dist


def write():
    print("writing", flush=True)
    time.sleep(0.5)
    print("written", flush=True)


def main(recipe):
    rank = int(os.environ.get("RANK", "0"))
    log("at work")
    if recipe.what == "mistake":
        raise MinitronError("a=1 is wrong; give 2")
    if recipe.what == "bug":
        raise ZeroDivisionError("a bug")
    if recipe.what == "sleep":
        print("asleep", flush=True)
        time.sleep(60)
    if recipe.what == "step":
        with StopRequest() as stop:
            print(f"at a step: {os.getpid()}", flush=True)
            while not stop.received:
                time.sleep(0.01)
        raise Stopped
    if recipe.what.endswith("writing"):
        shield = contextlib.nullcontext() if recipe.what == "bare writing" else shielding_children()
        with StopRequest() as stop, shield:
            writer = multiprocessing.get_context("spawn").Process(target=write)
            writer.start()
            writer.join()
        print(stop.received, writer.exitcode, flush=True)
        raise Stopped
    if recipe.what == "flood":
        while True:
            print("line")
    if recipe.what == "pipe":
        raise BrokenPipeError("another pipe")
    if recipe.what == "joined mistake":
        join()
        raise MinitronError("a=1 is wrong; give 2")
    if recipe.what == "mistake on one":
        dist = join()
        if rank == 1:
            raise MinitronError("a=1 is wrong; give 2")
        dist.barrier()
    if recipe.what == "bug on one":
        dist = join()
        if rank == 1:
            raise ZeroDivisionError("a bug")
        dist.barrier()
    if recipe.what == "mistake on one, the other blocked":
        dist = join()
        if rank == 1:
            dist.barrier()
            raise MinitronError("a=1 is wrong; give 2")
        with StopRequest():
            dist.barrier()
            libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            libc.pthread_mutex_lock(mutex)
            libc.pthread_mutex_lock(mutex)  # as in a collective of NCCL: no signal ends it
    if recipe.what == "success":
        join().barrier()
    sys.stdout.write(f"done {rank}\\n")  # in one piece


if __name__ == "__main__":
    run(main, parse(Recipe))
    dist = sys.modules.get("torch.distributed")
    assert dist is None or not dist.is_initialized()
'''

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}
TIMEOUT_S = 240  # for what should take seconds, on a machine that is busy with something else
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("launch") / "tiny.py"
    path.write_text(SCRIPT)
    return str(path)


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        **options,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def call(*arguments: str) -> tuple[int, str, str]:
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its ranks
        raise
    return process.returncode, out, err


def logged(line: str) -> str:
    """A log line without its time of day."""
    return re.sub(r"^\d\d:\d\d:\d\d ", "", line)


# One process


def test_success(script):
    status, out, err = call(script)
    assert (status, out, logged(err)) == (0, "done 0\n", "at work\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--what", "mistake"], "error: a=1 is wrong; give 2"),
        (["--waht", "mistake"], "error: unknown key waht; did you mean what?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(script, arguments, expected):
    status, out, err = call(script, *arguments)
    assert (status, out) == (2, "")
    assert [line for line in err.splitlines() if logged(line) != "at work"] == [expected]


@pytest.mark.parametrize(
    ("what", "last"),
    [("bug", "ZeroDivisionError: a bug"), ("pipe", "BrokenPipeError: another pipe")],
)
def test_a_bug_is_a_traceback_and_status_1(script, what, last):
    status, _, err = call(script, "--what", what)
    assert status == 1
    assert err.splitlines()[1] == "Traceback (most recent call last):"
    assert err.splitlines()[-1] == last


def test_an_interrupt_is_quiet(script):
    process = start(script, "--what", "sleep")
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, logged(err)) == (130, "at work\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_a_signal_stops_can_be_resumed(script, number):
    process = start(script, "--what", "step")
    assert process.stdout.readline().startswith("at a step: ")
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, logged(err)) == (75, "at work\n")


@pytest.mark.parametrize(
    ("shield", "outcome"), [("shielded", "written\nTrue 0\n"), ("bare", "True -15\n")]
)
def test_a_signal_to_all_processes_ends_no_shielded_child(script, shield, outcome):
    """As torchrun sends it, to a rank and to what writes its checkpoint."""
    process = start(script, "--what", f"{shield} writing", start_new_session=True)
    assert process.stdout.readline() == "writing\n"
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (75, outcome)


def test_where_nothing_can_be_resumed_a_signal_ends_the_process(script):
    process = start(script, "--what", "sleep")
    assert process.stdout.readline() == "asleep\n"
    process.terminate()
    assert process.wait(timeout=TIMEOUT_S) == -signal.SIGTERM


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_stdout_is_quiet(script, monkeypatch, unbuffered):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONUNBUFFERED", unbuffered)
    process = start(script, "--what", "flood")
    assert process.stdout.readline() == "line\n"
    process.stdout.close()
    assert process.wait(timeout=TIMEOUT_S) == 141
    assert logged(process.stderr.read()) == "at work\n"


def test_help_and_print_config(script):
    status, out, err = call(script, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("usage: tiny.py [--config RECIPE.yaml] [--key value ...]\n")
    assert "Do one of several things." in out
    assert "--what TEXT" in out
    status, out, err = call(script, "--print_config", "--what", "bug")
    assert (status, out, err) == (0, "what: bug\n", "")


# Two ranks under torchrun, whose own report follows ours on stderr


@pytest.mark.parametrize("what", ["mistake", "joined mistake", "mistake on one"])
def test_a_mistake_is_printed_once_and_ends_all_ranks(script, what):
    status, out, err = call(*TORCHRUN, script, "--what", what)
    assert status != 0
    assert "done" not in out
    assert err.splitlines().count("error: a=1 is wrong; give 2") == 1
    assert "Traceback" not in err.partition("torch/distributed/elastic")[0]
    summary = err.partition("Root Cause")[2]
    assert "exitcode  : 2" in summary  # not the rank that lost its peer
    assert "traceback : error: a=1 is wrong; give 2\n" in summary


def test_a_mistake_on_one_rank_ends_ranks_that_no_signal_wakes(script, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PET_SHUTDOWN_TIMEOUT", str(10 * TIMEOUT_S))  # until it kills
    status, _, err = call(*TORCHRUN, script, "--what", "mistake on one, the other blocked")
    assert status != 0
    assert err.splitlines().count("error: a=1 is wrong; give 2") == 1
    assert "exitcode  : 2" in err.partition("Root Cause")[2]


def test_an_unknown_key_is_printed_once(script):
    status, _, err = call(*TORCHRUN, script, "--waht", "x")
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line == "error: unknown key waht; did you mean what?"


def test_a_bug_on_one_rank_names_the_rank(script):
    status, _, err = call(*TORCHRUN, script, "--what", "bug on one")
    ours = err.partition("torch/distributed/elastic")[0]
    assert status != 0
    assert ours.count("Traceback") == ours.count("[rank 1] Traceback (most recent call last):") == 1
    assert "ZeroDivisionError: a bug\n" in ours


def test_torchrun_tells_that_a_run_was_stopped(script):
    process = start(*TORCHRUN, script, "--what", "step")
    pids = [int(process.stdout.readline().removeprefix("at a step: ")) for _ in range(2)]
    os.kill(pids[0], signal.SIGUSR1)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1
    assert re.search(r"Root Cause.*exitcode  : 75 ", err, re.DOTALL)


def test_success_leaves_the_process_group(script):
    status, out, err = call(*TORCHRUN, script, "--what", "success")
    assert status == 0, err
    assert sorted(out.splitlines()) == ["done 0", "done 1"]
    assert err.count("at work") == 1  # rank 0 alone logs


def test_help_is_printed_once(script):
    status, out, _ = call(*TORCHRUN, script, "--help")
    assert status == 0
    assert out.count("usage: ") == 1
