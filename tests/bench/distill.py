"""One distillation step of ours against the same step in plain transformers.

    make bench          or: python -m tests.bench.distill [--out docs/results]

Both start from the same weights and learn from the same tokens: the teacher's forward pass, the
student's forward and backward pass, clipping, AdamW. Plain means `LlamaForCausalLM` twice,
`log_softmax` twice, `kl_div` and torch's fused AdamW; ours is `Trainer`'s step as launch/distill.py
takes it. Each side has a process of its own, with an allocator of its own; they take steps in turn,
when the parent says so. A time is the median of the rounds, a ratio the median of the rounds'
ratios.

Memory is the most that the process has resident during a step, above what it keeps after earlier
steps: weights, the optimizer's state, and all that the process is. Gradients count on both sides:
ours live in a buffer that is never let go, and it is added.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron.sections.parallel import Precision
from tests.bench import pipeline
from tests.bench.plain import Plain
from tests.bench.runner import describe_machine, write_results
from tests.bench.step import Ours, Problem

MEMORY_SHARE = 0.5  # of the plain step's, to stay within
COST = 1.10  # of a distillation step, over the teacher's forward and a language-model step
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the first gradient norm, relative


def _small(vocabulary: int, precision: Precision, speedup: float) -> Problem:
    shapes = (
        dataclasses.replace(arch, vocab_size=vocabulary, max_position_embeddings=512)
        for arch in (pipeline.TEACHER, pipeline.STUDENT)
    )
    return Problem(*shapes, precision, 4, 1, 512, speedup)


PROBLEMS = [_small(32000, "fp32", 1.2), _small(32000, "bf16", 1.6), _small(128256, "bf16", 3.0)]
SIDES: dict[str, type[Ours] | type[Plain]] = {"transformers": Plain, "ours": Ours}


class Child(contextlib.AbstractContextManager["Child"]):
    """One side in a process of its own, which works when it is told to."""

    def __init__(self, side: str, number: int, threads: int) -> None:
        command = [sys.executable, "-m", "tests.bench.distill", "--child", side, str(number)]
        self._process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, task: str) -> tuple[float, float | None]:
        """Seconds that a task takes there, and what it finds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(task, file=self._process.stdin, flush=True)
        seconds, found = json.loads(self._process.stdout.readline())
        return seconds, found

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, and it ends


def serve(problem: Problem, side: str) -> None:
    """Be the other end of `Child`."""
    answers, sys.stdout = sys.stdout, sys.stderr
    steps = SIDES[side](problem)
    tasks: dict[str, Callable[[], float | None]] = {
        side: steps.distillation,
        "memory": lambda: peak_memory(steps),
    }
    if isinstance(steps, Ours):
        tasks |= {"teacher forward": steps.teacher_forward, "LM step": steps.language_modeling()}
    for line in sys.stdin:
        start = time.perf_counter()
        found = tasks[line.strip()]()
        print(json.dumps((time.perf_counter() - start, found)), file=answers, flush=True)


def peak_memory(steps: Ours | Plain) -> float:
    """GB that a step adds to what remains between steps, in this process."""
    ctypes.CDLL(None).malloc_trim(0)  # what is free is no part of what remains
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    steps.distillation()
    return (_resident("VmHWM") - before + steps.gradient_bytes) / 1e9


def _resident(name: str) -> int:
    """Bytes that the kernel counts under this name."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every problem."""
    rows = []
    for number, problem in enumerate(PROBLEMS):
        with contextlib.ExitStack() as stack:
            children = {
                side: stack.enter_context(Child(side, number, options.threads)) for side in SIDES
            }
            rows.append(_row(problem, children, options.rounds))
        print(_line(rows[-1]), flush=True)
    return rows


def _row(problem: Problem, children: dict[str, Child], rounds: int) -> dict[str, Any]:
    """What the table says of a problem.

    Raises:
        AssertionError: the sides do not do the same.
    """
    ours = children["ours"]
    variants = {**children, "teacher forward": ours, "LM step": ours}
    norms = {name: child.run(name)[1] for name, child in variants.items()}  # also warms up
    if abs(norms["ours"] / norms["transformers"] - 1) > TOLERANCE[problem.precision]:
        raise AssertionError(f"the first gradient norms differ: {norms}")
    times = [{name: child.run(name)[0] for name, child in variants.items()} for _ in range(rounds)]
    gigabytes = {side: child.run("memory")[1] for side, child in children.items()}
    seconds = {name: statistics.median(t[name] for t in times) for name in variants}
    return {
        "vocabulary": problem.student.vocab_size,
        "precision": problem.precision,
        "tokens_per_second": {side: problem.tokens / seconds[side] for side in SIDES},
        "speedup": statistics.median(t["transformers"] / t["ours"] for t in times),
        "speedup_target": problem.speedup,
        "peak_gb": gigabytes,
        "memory_share": gigabytes["ours"] / gigabytes["transformers"],
        "memory_share_target": MEMORY_SHARE,
        "cost": statistics.median(t["ours"] / (t["teacher forward"] + t["LM step"]) for t in times),
        "cost_target": COST,
        "rounds": times,
    }


def _judge(value: float, target: float, met: bool) -> str:
    return f"{value:.2f} | {target:g} {'met' if met else 'missed'}"


def _line(row: dict[str, Any]) -> str:
    rates, peaks = row["tokens_per_second"], row["peak_gb"]
    cells = [
        f"{row['vocabulary']}, {row['precision']}",
        *(f"{rates[side]:.0f}" for side in SIDES),
        _judge(row["speedup"], row["speedup_target"], row["speedup"] >= row["speedup_target"]),
        *(f"{peaks[side]:.2f}" for side in SIDES),
        _judge(row["memory_share"], MEMORY_SHARE, row["memory_share"] <= MEMORY_SHARE),
        _judge(row["cost"], COST, row["cost"] <= COST),
    ]
    return f"| {' | '.join(cells)} |"


_PAGE = """# A distillation step against plain transformers

Written by `python -m tests.bench.distill --out docs/results` (part of `make bench`); the same
numbers as JSON are in distillation_cpu.json. Both sides start from the same weights and have the
same first gradient norm. Variants take steps in turn; a rate is that of the median step, a ratio
the median over rounds. In bf16 ours also keeps fp32 main weights, moments and gradients; the plain
side's are bf16.

"Cost" is our distillation step over the teacher's forward pass to its logits plus a language-model
step of the same student. Peaks are what a step takes above weights and optimizer, gradients
included, in processes of their own.

Teacher 8 layers of 512 channels, student 8 of 384, 4 × 512 tokens.

{described}

| vocabulary | plain tokens/s | ours | speedup | target | plain peak GB | ours | share | target \
| cost | target |
|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a directory for the page and the JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        side, number = options.child
        serve(PROBLEMS[int(number)], side)
        return
    machine = describe_machine("cpu", options.threads, options.rounds)
    results = measure(options)
    page = _PAGE.format(
        described=", ".join(f"{key} {value}" for key, value in machine.items()),
        rows="\n".join(map(_line, results)),
    )
    write_results("distillation_cpu", page, {"machine": machine, "results": results}, options.out)


if __name__ == "__main__":
    main()
