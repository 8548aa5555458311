"""`python -m tests.bench`: the whole table to stdout, docs/results/ and JSON beside it.

Every op runs in a process of its own, once with glibc's default allocator, which gives large
tensors back to the system and pays page faults for them again each time, and once with a warm heap,
which is what a long training run has. On a GPU (`--device cuda`) torch has an allocator of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench import linear_kl
from tests.bench.runner import describe_machine, measure

OPS = ("logit_kl", "objectives", "cross_entropy", "activation_stats", "block_cosine", "linear_kl")
WARM_HEAP = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}
ALLOCATORS = {"warm": WARM_HEAP, "default": {}}
DEVICES = {"cpu": ["warm", "default"], "cuda": ["default"]}


def main() -> None:
    """Run the benches asked for and write the results."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "ops",
        nargs="*",
        choices=[[], *OPS],
        metavar="OP",
        help=f"of {', '.join(OPS)}; default: all",
    )
    parser.add_argument("--device", choices=list(DEVICES), default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allocator", choices=list(ALLOCATORS), action="append")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--child", choices=OPS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        for case in importlib.import_module(f"tests.bench.{args.child}").cases(args.device):
            rows = measure(case, rounds=args.rounds, device=args.device)
            print(json.dumps([dataclasses.asdict(row) for row in rows]), flush=True)
        return
    if args.peak is not None:
        print(json.dumps(dataclasses.asdict(linear_kl.peak(args.peak, args.device))))
        return
    results: list[dict[str, Any]] = []
    for op in args.ops or OPS:
        for allocator in args.allocator or DEVICES[args.device]:
            for row in _child(op, allocator, args):
                results.append({"allocator": allocator, **row})
                print(_line(results[-1]), flush=True)
    peaks = []
    if "linear_kl" in (args.ops or OPS):
        for number in range(len(linear_kl.PEAKS[args.device])):
            peaks.append(_run("default", args, "--peak", str(number))[0])
            print(_peak_line(peaks[-1]), flush=True)
    _write(args.out, results, peaks, args)


def _child(op: str, allocator: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    return [row for case in _run(allocator, args, "--child", op) for row in case]


def _run(allocator: str, args: argparse.Namespace, *arguments: str) -> list[Any]:
    """What a process of its own prints, a JSON value a line."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    command += ["--rounds", str(args.rounds), "--threads", str(args.threads)]
    command += ["--device", args.device]
    environment = {**os.environ, **ALLOCATORS[allocator]}
    output = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


def _peak_line(row: dict[str, Any]) -> str:
    sizes = "| {variant} | {dtype} | {tokens} | {hidden} | {vocabulary} |".format(**row)
    mb, rest = f" {row['mb']:.0f} | {row['gradients_mb']:.0f} |", row["mb"] - row["gradients_mb"]
    if row["variant"] == "eager":
        return f"{sizes} – |{mb} {rest:.0f} | – |"
    met = _MET[round(rest / row["bound_mb"], 2) <= 1]
    return f"{sizes} {row['chunk_tokens']} |{mb} {rest:.1f} | {row['bound_mb']:.1f} {met} |"


def _cells(row: dict[str, Any]) -> list[str]:
    bandwidth = f"{row['gb_per_s']:.0f}" if row["gb_per_s"] else ""
    share = f"{row['share_of_copy']:.0%}" if row["share_of_copy"] else ""
    return [
        row["op"],
        row["shape"],
        row["dtype"],
        row["allocator"],
        row["variant"],
        f"{row['median_ms']:.2f}",
        f"{row['best_ms']:.2f}",
        f"{row['over_eager']:.1f}",
        f"{row['over_compile']:.1f}",
        ", ".join(map(_verdict, row["targets"])),
        bandwidth,
        share,
    ]


def _verdict(target: dict[str, Any]) -> str:
    met = target["found"] >= target["wanted"]
    return f"{target['found']:.2f} of {target['wanted']:g} × {target['over']} {_MET[met]}"


def _line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(_cells(row)) + " |"


_MET = {True: "met", False: "**missed**"}
_HEADER = (
    "| op | shape | dtype | heap | variant | median ms | best ms | × eager | × compile |"
    " targets | GB/s | of copy |\n" + "|---" * 12 + "|"
)


def _write(
    directory: Path,
    results: list[dict[str, Any]],
    peaks: list[dict[str, Any]],
    args: argparse.Namespace,
) -> None:
    machine = describe_machine(args.device, args.threads, args.rounds)
    name, page = {"cpu": ("kernels_cpu", _CPU_PAGE), "cuda": ("kernels_gpu", _GPU_PAGE)}[
        args.device
    ]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(
        json.dumps({"machine": machine, "results": results, "peaks": peaks}, indent=1) + "\n"
    )
    described = ", ".join(f"{key} {value}" for key, value in machine.items())
    table = "\n".join([_HEADER, *map(_line, results)])
    memory = "\n".join(map(_peak_line, peaks))
    (directory / f"{name}.md").write_text(
        page.format(described=described, table=table) + _MEMORY.format(memory=memory)
    )


_CPU_PAGE = """# Kernels on a CPU

Written by `make bench`; the same numbers as JSON are in kernels_cpu.json. Variants of a case run in
turn and a time is the median of the rounds. On a machine that others use too (see its load), only
ratios mean anything, and even those vary from run to run: kernels.md says by how much.
"GB/s" is what the variant must move at least, divided by its time; "of copy" compares that with
a copy measured in the same rounds. Targets are speeds, found and wanted, in multiples of another
variant's: 0.8 × bare GEMMs is 1.25 times their time.

Nothing on this page comes from a GPU.

{described}

{table}
"""

_GPU_PAGE = """# Kernels on a GPU

Written by `make gpu-check`; the same numbers as JSON are in kernels_gpu.json. Variants of a case
run in turn, each several times a round, and a time is the median of the rounds. "GB/s" is what the
variant must move at least, divided by its time; "of copy" compares that with a copy measured in
the same rounds.

{described}

{table}
"""

_MEMORY = """
## Peak memory of linear_kl

What one step, forward and backward, adds to the peak beyond its inputs. Its results are gradients
of the hidden states and of the head, which is summed up in fp32. For the rest the bound is 64 bytes
a token and the logits of two chunks, the student's and the teacher's; it counts as met to 1%, since
the rest also holds what libraries set aside for large products.

| variant | dtype | tokens | hidden size | vocabulary | tokens of a chunk | MB | of them gradients \
| rest | bound |
|---|---|---|---|---|---|---|---|---|---|
{memory}
"""


if __name__ == "__main__":
    main()
