"""A distillation step of ours at full size on a GPU: tokens/s and model FLOP/s.

    make gpu-check      or: python -m tests.bench.distill_gpu [--out docs/results]

An 8B-shaped teacher and a 4B-width-shaped student of random weights fill a card of 141 GB; a large
matmul is timed in the same rounds, to compare with.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minitron import platform
from minitron.model.arch import Architecture
from tests.bench.runner import describe_machine, write_results
from tests.bench.step import Ours, Problem

LLAMA_8B = Architecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=128256,
    max_position_embeddings=2048,
)
LLAMA_4B_WIDTH = dataclasses.replace(LLAMA_8B, hidden_size=3072, ffn_hidden_size=9216)
PROBLEM = Problem(LLAMA_8B, LLAMA_4B_WIDTH, "bf16", 1, 16, 2048)

MATMUL_SIZE = 8192
MATMULS = 20  # of a round


def measure(problem: Problem, rounds: int) -> dict[str, float]:
    """Tokens/s of ours, the model's FLOP/s, and the rate of a large bf16 matmul beside them."""
    ours = Ours(problem)
    dtype = platform.DTYPES[problem.precision]
    square = (MATMUL_SIZE, MATMUL_SIZE)
    left, right, product = torch.randn(3, *square, dtype=dtype, device=platform.device())

    def clock(run: Callable[[], object]) -> float:
        platform.synchronize()
        start = time.perf_counter()
        run()
        platform.synchronize()
        return time.perf_counter() - start

    variants: dict[str, Callable[[], object]] = {
        "step": ours.distillation,
        "matmul": lambda: [torch.mm(left, right, out=product) for _ in range(MATMULS)],
    }
    for run in variants.values():
        run()
    times = [{name: clock(run) for name, run in variants.items()} for _ in range(rounds)]
    seconds = {name: statistics.median(t[name] for t in times) for name in variants}
    flops = problem.tokens * (
        forward_flops(problem.teacher, problem.seq_length)
        + 3 * forward_flops(problem.student, problem.seq_length)
    )
    matmul = MATMULS * 2 * MATMUL_SIZE**3
    shares = [flops / t["step"] / (matmul / t["matmul"]) for t in times]
    return {
        "tokens_per_second": problem.tokens / seconds["step"],
        "model_tflops": flops / seconds["step"] / 1e12,
        "matmul_tflops": matmul / seconds["matmul"] / 1e12,
        "share_of_matmul": statistics.median(shares),
        "peak_gb": platform.peak_memory_bytes() / 1e9,
    }


def forward_flops(arch: Architecture, seq_length: int) -> float:
    """Of a token: every matrix but the embedding table's, and causal attention."""
    matrices = arch.num_parameters - arch.vocab_size * arch.hidden_size
    attention = arch.num_layers * arch.num_attention_heads * arch.kv_channels * seq_length
    return 2 * matrices + 2 * attention


_PAGE = """# A distillation step on a GPU

Written by `make gpu-check`; the same numbers as JSON are in distillation_gpu.json. An 8B-shaped
teacher and a 4B-width-shaped student of random weights, bf16 with fp32 main weights, 16 × 2048
tokens a step on one card. Model FLOP/s count every matrix but the embedding tables and causal
attention once (the student's three times, the teacher's forward pass once); the matmul is of
8192³ in bf16, timed in the same rounds. The aim is a share of 50%.

{described}

{table}
"""

_TABLE = """\
| tokens/s | model TFLOP/s | matmul TFLOP/s | share | peak GB |
|---|---|---|---|---|
| {tokens_per_second:.0f} | {model_tflops:.0f} | {matmul_tflops:.0f} | {share_of_matmul:.0%} \
| {peak_gb:.0f} |"""


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a directory for the page and the JSON")
    options = parser.parse_args()
    machine = describe_machine("cuda", torch.get_num_threads(), options.rounds)
    results, failure = None, None
    try:
        results = measure(PROBLEM, options.rounds)
        table = _TABLE.format(**results)
    except torch.OutOfMemoryError as error:
        failure = ". ".join(str(error).split(". ")[:2])  # without statistics and advice
        table = f"**No result:** {failure}."
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    page = _PAGE.format(described=described, table=table)
    content = {"machine": machine, "results": results, "failure": failure}
    write_results("distillation_gpu", page, content, options.out)
    if failure:
        sys.exit(f"error: {failure}")


if __name__ == "__main__":
    main()
