"""The Slurm templates, run as Slurm would with stand-ins for srun, scontrol and torchrun."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.launch.launcher import ROOT, TIMEOUT_S

SLURM = ROOT / "launch" / "slurm"
TEMPLATES = sorted(SLURM.glob("*.sbatch"))
TURNS = SLURM / "correct_and_distill.sbatch"  # the one that runs several stages

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# srun: logs its own options, then runs the command that follows them, as on one node.
SRUN = r"""#!/usr/bin/env bash
for argument in "$@"; do
    [[ "$argument" == --* ]] || break
    echo "$argument" >>"$LOG/srun"
    shift
done
exec "$@"
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
"show hostnames") [[ "$3" == "gpu[07-08]" ]] && printf 'gpu07\ngpu08\n' || echo "$3" ;;
"requeue "*) echo "$2" >>"$LOG/requeued" ;;
esac
"""
TORCHRUN = r"""#!/usr/bin/env bash
printf '%s\n' "$@" >"$LOG/torchrun"
echo "${@:7}" >>"$LOG/launches"
env >"$LOG/environment"
case "${FAKE_TORCHRUN:-}" in
wait) trap 'echo >"$LOG/signalled"; exit 1' USR1
      echo >"$LOG/waiting"
      for _ in {1..200}; do sleep 0.05; done; exit 3 ;;
finish) trap 'exit 0' USR1
      echo >"$LOG/waiting"
      for _ in {1..200}; do sleep 0.05; done; exit 3 ;;
fail) exit 7 ;;
esac
"""


@pytest.fixture
def job(tmp_path):
    """A checkout with a virtual environment, and the environment of a job in it."""
    checkout, tools, log = tmp_path / "checkout", tmp_path / "tools", tmp_path / "log"
    shutil.copytree(SLURM, checkout / "launch" / "slurm")
    for template in TEMPLATES:
        (checkout / "launch" / f"{template.stem}.py").touch()
    shutil.copy(ROOT / "launch" / "correct_and_distill.sh", checkout / "launch")
    log.mkdir()
    for path, text in (
        (tools / "srun", SRUN),
        (tools / "scontrol", SCONTROL),
        (checkout / ".venv" / "bin" / "torchrun", TORCHRUN),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "LOG": str(log),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "gpu07",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(checkout),
    }
    return checkout, log, environment


def submit(job, stage, *arguments, **environment):
    checkout, _, base = job
    command = ["bash", str(checkout / "launch" / "slurm" / f"{stage}.sbatch"), *arguments]
    return subprocess.Popen(
        command,
        cwd=checkout,
        env=base | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(log, name):
    return (log / name).read_text().splitlines()


@pytest.mark.parametrize("path", [*TEMPLATES, SLURM / "common.sh"], ids=lambda path: path.name)
def test_bash_accepts_it(path):
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("template", set(TEMPLATES) - {TURNS}, ids=lambda path: path.name)
def test_template_runs_its_launcher(template):
    text = template.read_text()
    assert re.search(r"^run_stage (\w+) ", text, re.MULTILINE)[1] == template.stem
    assert f"--job-name=minitron-{template.stem}\n" in text
    assert (ROOT / "launch" / f"{template.stem}.py").exists()


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.name)
def test_recipes_that_a_template_names_exist(template):
    for recipe in re.findall(r"launch/recipes/\S+", template.read_text()):
        assert (ROOT / recipe).exists()


def test_one_node(job):
    process = submit(job, "eval", "--data.path", "a file")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    _, log, _ = job
    assert f"MINITRON_CACHE={job[0]}/.cache" in lines(log, "environment")  # seen by all nodes
    assert lines(log, "srun") == ["--nodes=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert lines(log, "torchrun") == [
        "--nnodes=1",
        "--nproc-per-node=8",
        "--rdzv-backend=c10d",
        "--rdzv-id=123456",
        "--rdzv-endpoint=gpu07:23456",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        "launch/eval.py",
        "--data.path",
        "a file",
    ]


def test_two_nodes_meet_at_the_first(job):
    nodes = {"SLURM_JOB_NODELIST": "gpu[07-08]"}
    process = submit(job, "distill", "--config", "r.yaml", **nodes)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    _, log, _ = job
    assert "--nodes=2" in lines(log, "srun")
    arguments = lines(log, "torchrun")
    assert "--nnodes=2" in arguments
    assert "--rdzv-endpoint=gpu07:23456" in arguments
    assert arguments[-4:] == ["launch/distill.py", "--resume", "--config", "r.yaml"]


def test_ranks_follow_the_gpus_or_the_user(job):
    _, log, environment = job
    del environment["SLURM_GPUS_ON_NODE"]
    submit(job, "prune").communicate(timeout=TIMEOUT_S)
    assert "--nproc-per-node=1" in lines(log, "torchrun")
    submit(job, "prune", RANKS_PER_NODE="4").communicate(timeout=TIMEOUT_S)
    assert "--nproc-per-node=4" in lines(log, "torchrun")


def test_ranks_import_the_checkout(job):
    checkout, log, _ = job
    submit(job, "train").communicate(timeout=TIMEOUT_S)
    environment = dict(line.partition("=")[::2] for line in lines(log, "environment"))
    assert environment["PYTHONPATH"] == str(checkout)
    assert environment["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert int(environment["PET_SHUTDOWN_TIMEOUT"]) < 300  # what --signal=B:USR1@300 leaves


def test_container(job):
    checkout, log, _ = job
    (checkout / ".venv" / "bin" / "torchrun").rename(log.parent / "tools" / "torchrun")
    settings = {"MINITRON_IMAGE": "/images/minitron.sqsh", "MINITRON_MOUNTS": "/data:/data"}
    process = submit(job, "train", **settings)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    assert lines(log, "srun")[3:] == [
        "--container-image=/images/minitron.sqsh",
        f"--container-mounts={checkout}:{checkout},/data:/data",
        f"--container-workdir={checkout}",
        "--no-container-mount-home",
    ]


def wait_for(path):
    deadline = time.monotonic() + TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


def test_a_run_stopped_by_the_time_limit_is_requeued(job):
    _, log, _ = job
    process = submit(job, "train", FAKE_TORCHRUN="wait")
    wait_for(log / "waiting")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert (log / "signalled").exists(), output
    assert lines(log, "requeued") == ["123456"]
    assert process.returncode == 0


def test_a_run_that_finishes_after_the_signal_is_not_requeued(job):
    _, log, _ = job
    process = submit(job, "train", FAKE_TORCHRUN="finish")
    wait_for(log / "waiting")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert not (log / "requeued").exists()


def test_turns_run_one_stage_after_the_other(job):
    _, log, _ = job
    assert f"--job-name=minitron-{TURNS.stem}\n" in TURNS.read_text()
    process = submit(job, TURNS.stem, "3", "2", "out", "c.yaml", "d.yaml")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output
    expected = [
        launched
        for end in (2, 3)
        for launched in (
            f"launch/train.py --config c.yaml --out out/teacher --train.steps 3 "
            f"--until_step {end} --resume",
            f"launch/distill.py --config d.yaml --teacher out/teacher --out out/student "
            f"--train.steps 3 --until_step {end} --resume",
        )
    ]
    assert lines(log, "launches") == expected


@pytest.mark.parametrize("ending", ["wait", "finish"])
def test_turns_stopped_by_the_time_limit_are_requeued(job, ending):
    _, log, _ = job
    process = submit(job, TURNS.stem, "3", "2", "out", "c.yaml", "d.yaml", FAKE_TORCHRUN=ending)
    wait_for(log / "waiting")
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert lines(log, "requeued") == ["123456"], output
    assert process.returncode == 0
    assert len(lines(log, "launches")) == 1  # the next turn is not begun


def test_turns_end_with_the_first_failure(job):
    _, log, _ = job
    process = submit(job, TURNS.stem, "3", "2", "out", "c.yaml", "d.yaml", FAKE_TORCHRUN="fail")
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7
    assert len(lines(log, "launches")) == 1
    assert not (log / "requeued").exists()


def test_a_failure_is_final(job):
    _, log, _ = job
    process = submit(job, "train", FAKE_TORCHRUN="fail")
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 7
    assert not (log / "requeued").exists()


def test_mistakes_are_one_line(job):
    checkout, _, environment = job
    (checkout / ".venv" / "bin" / "torchrun").unlink()
    process = submit(job, "train")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert re.fullmatch(r"error: MINITRON_IMAGE is not set and .*; run make setup\n", output)

    (checkout / "launch" / "train.py").unlink()
    output, _ = submit(job, "train").communicate(timeout=TIMEOUT_S)
    assert re.fullmatch(r"error: no launch/train.py in .*submit from the checkout's root\n", output)

    del environment["SLURM_JOB_ID"], environment["SLURM_SUBMIT_DIR"]
    output, _ = submit(job, "train").communicate(timeout=TIMEOUT_S)
    assert "submit this script with sbatch" in output
