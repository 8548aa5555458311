"""One distillation step of ours against the same step in plain transformers.

    make bench          or: python -m tests.bench.distill [--out docs/results]

Both start from the same weights and learn from the same tokens: the teacher's forward pass, the
student's forward and backward pass, clipping, AdamW. Plain means `LlamaForCausalLM` twice,
`log_softmax` twice, `kl_div` and torch's fused AdamW; ours is `Trainer`'s step as launch/distill.py
takes it. A row has a process of its own, in which all variants take steps in turn; a time is the
median of the rounds, a ratio the median of the rounds' ratios.

Memory is measured in one more process for each side, after steps that created all state: the most
anonymous memory that two further steps take, sampled every 2 ms, above what remains between steps.
Gradients count on both sides: ours live in a buffer that is never let go, and it is added.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from minitron import platform
from minitron.model import hf
from minitron.model.arch import Architecture
from tests.bench import pipeline
from tests.bench.prune import anonymous_memory
from tests.bench.runner import describe_machine, write_results
from tests.bench.step import Ours, Problem, open_batches

MEMORY_SHARE = 0.5  # of the plain step's, to stay within
COST = 1.10  # of a distillation step, over the teacher's forward and a language-model step


def _small(vocabulary: int, precision: platform.Precision, speedup: float) -> Problem:
    shapes = (
        dataclasses.replace(arch, vocab_size=vocabulary, max_position_embeddings=512)
        for arch in (pipeline.TEACHER, pipeline.STUDENT)
    )
    return Problem(*shapes, precision, 4, 1, 512, speedup)


PROBLEMS = [_small(32000, "fp32", 1.2), _small(32000, "bf16", 1.6), _small(128256, "bf16", 3.0)]


class Plain:
    """Steps as training scripts write them around transformers."""

    gradient_bytes = 0  # they are let go after every step

    def __init__(self, problem: Problem) -> None:
        self.batches = open_batches(problem)
        self.first = 0
        self.teacher = self._build(problem.teacher, problem, seed=1).requires_grad_(False).eval()
        self.student = self._build(problem.student, problem, seed=0).train()
        norms = [p for p in self.student.parameters() if p.dim() == 1]
        matrices = [p for p in self.student.parameters() if p.dim() > 1]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": matrices}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def _build(self, arch: Architecture, problem: Problem, seed: int) -> LlamaForCausalLM:
        dtype = platform.DTYPES[problem.precision]
        with tempfile.TemporaryDirectory() as directory:
            hf.write_config(Path(directory), arch, dtype=dtype)
            config = LlamaConfig.from_pretrained(directory)
        weights = hf.InitialWeights(arch, seed=seed)
        model = LlamaForCausalLM(config)
        model.load_state_dict({name: weights.read(name) for name in weights.infos})
        return model.to(dtype)

    def distillation(self) -> float:
        """A whole step."""
        (batch,) = self.batches.microbatches(self.first)
        self.first += len(batch.tokens)
        with torch.no_grad():
            theirs = self.teacher(batch.tokens, use_cache=False).logits.flatten(0, 1)
        ours = self.student(batch.tokens, use_cache=False).logits.flatten(0, 1)
        loss = F.kl_div(
            F.log_softmax(ours.float(), -1),
            F.log_softmax(theirs.float(), -1),
            reduction="batchmean",
            log_target=True,
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss.item()  # as ours, to log it
        return norm.item()


SIDES: dict[str, type[Ours] | type[Plain]] = {"transformers": Plain, "ours": Ours}


def time_steps(problem: Problem, rounds: int) -> dict[str, list[float]]:
    """Seconds of every variant in every round, in this process.

    Raises:
        AssertionError: the sides do not do the same.
    """
    ours, plain = Ours(problem), Plain(problem)
    variants: dict[str, Callable[[], float | None]] = {
        "transformers": plain.distillation,
        "ours": ours.distillation,
        "teacher forward": ours.teacher_forward,
        "LM step": ours.language_modeling(),
    }
    first = {name: run() for name, run in variants.items()}  # also warms up
    tolerance = {"fp32": 1e-4, "bf16": 2e-2}[problem.precision]
    if abs(first["ours"] - first["transformers"]) > tolerance * first["transformers"]:
        raise AssertionError(f"the first gradient norms differ: {first}")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(problem: Problem, side: str) -> float:
    """GB that a step of one side adds to weights and optimizer, in this process."""
    steps = SIDES[side](problem)
    for _ in range(2):
        steps.distillation()
    peak = before = anonymous_memory()
    thread = threading.Thread(target=lambda: [steps.distillation() for _ in range(2)])
    thread.start()
    while thread.is_alive():
        peak = max(peak, anonymous_memory())
        time.sleep(0.002)
    return (peak - before + steps.gradient_bytes) / 1e9


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every problem."""
    rows = []
    for number, problem in enumerate(PROBLEMS):
        seconds = _child(options, "time", number)
        gigabytes = {side: _child(options, side, number) for side in SIDES}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rounds = [
            dict(zip(seconds, values, strict=True))
            for values in zip(*seconds.values(), strict=True)
        ]
        rows.append(
            {
                "vocabulary": problem.student.vocab_size,
                "precision": problem.precision,
                "tokens_per_second": {side: problem.tokens / medians[side] for side in SIDES},
                "speedup": statistics.median(r["transformers"] / r["ours"] for r in rounds),
                "speedup_target": problem.speedup,
                "peak_gb": gigabytes,
                "memory_share": gigabytes["ours"] / gigabytes["transformers"],
                "memory_share_target": MEMORY_SHARE,
                "cost": statistics.median(
                    r["ours"] / (r["teacher forward"] + r["LM step"]) for r in rounds
                ),
                "cost_target": COST,
                "seconds": medians,
            }
        )
        print(_line(rows[-1]), flush=True)
    return rows


def _child(options: argparse.Namespace, task: str, number: int) -> Any:
    """What a process of its own finds."""
    command = [sys.executable, "-m", "tests.bench.distill", "--child", task, str(number)]
    command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    # Let freed memory go back at once, or the level between steps would hide a part of the peak.
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = os.environ | (trimmed if task in SIDES else {})
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return json.loads(output.splitlines()[-1])


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
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a directory for the page and the JSON")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        task, number = options.child
        problem = PROBLEMS[int(number)]
        timing = task == "time"
        found = time_steps(problem, options.rounds) if timing else peak_memory(problem, task)
        print(json.dumps(found))
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
