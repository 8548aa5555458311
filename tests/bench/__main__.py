"""`python -m tests.bench`: the whole table to stdout, docs/results/ and JSON beside it.

Every op runs in a process of its own, once with glibc's default allocator, which gives large
tensors back to the system and pays page faults for them again each time, and once with a warm heap,
which is what a long training run has. On a GPU (`--device cuda`) torch has an allocator of its own.

Ops that are not asked for keep the results that they have.
"""

from __future__ import annotations

import argparse
import ctypes
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
ROUNDS = {"cpu": 9, "cuda": 5}
WITH_ONE_HEAP = ("objectives",)  # the first: they are many, and the second tells nothing new


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
    parser.add_argument("--rounds", type=int, help="default: 9, on a GPU 5")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--allocator", choices=list(ALLOCATORS), action="append")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--child", choices=OPS, help=argparse.SUPPRESS)
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or ROUNDS[args.device]
    torch.set_num_threads(args.threads)
    if args.child:
        for case in importlib.import_module(f"tests.bench.{args.child}").cases(args.device):
            rows = measure(case, rounds=args.rounds, device=args.device)
            print(json.dumps([dataclasses.asdict(row) for row in rows]), flush=True)
            del case  # its tensors go before those of the next come
            release_heap()
        return
    if args.peak is not None:
        print(json.dumps(dataclasses.asdict(linear_kl.peak(args.peak, args.device))))
        return
    failed = []
    for op in args.ops or OPS:
        try:
            _write(args.out, args.device, op, _measured(op, args))
        except subprocess.CalledProcessError as error:
            failed.append(op)
            print(f"error: {op}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"error: no new results of {', '.join(failed)}")


def _measured(op: str, args: argparse.Namespace) -> dict[str, Any]:
    """Of an op: a row for every variant, printed as it comes, and peaks of memory."""
    rows, peaks = [], []
    allocators = DEVICES[args.device][: 1 if op in WITH_ONE_HEAP else None]
    for allocator in args.allocator or allocators:
        for row in _child(op, allocator, args):
            rows.append({"allocator": allocator, **row})
            print(_line(rows[-1]), flush=True)
    for number in range(len(linear_kl.PEAKS[args.device]) if op == "linear_kl" else 0):
        peaks.append(_run("default", args, "--peak", str(number))[0])
        print(_peak_line(peaks[-1]), flush=True)
    machine = describe_machine(args.device, args.threads, args.rounds)
    return {"machine": machine, "results": rows, "peaks": peaks}


def release_heap() -> None:
    """Give back what a case leaves of a warm heap, which would otherwise grow with each."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc, as WARM_HEAP is
    if release is not None:
        release(0)


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
    sizes = "| {variant} | {ranks} | {dtype} | {tokens} | {hidden} | {vocabulary} |".format(**row)
    mb, rest = f" {row['mb']:.0f} | {row['gradients_mb']:.0f} |", row["mb"] - row["gradients_mb"]
    if row["variant"] == "eager":
        return f"{sizes} – |{mb} {rest:.0f} | – |"
    met = _MET[round(rest / row["bound_mb"], 2) <= 1]
    return f"{sizes} {row['chunk_tokens']} |{mb} {rest:.1f} | {row['bound_mb']:.1f} {met} |"


def _cells(row: dict[str, Any]) -> list[str]:
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
        f"{row['moved_mb']:.0f}",
        f"{row['gb_per_s']:.0f}",
        f"{row['share_of_copy']:.0%}",
    ]


def _verdict(target: dict[str, Any]) -> str:
    met = target["found"] >= target["wanted"]
    return f"{target['found']:.2f} of {target['wanted']:g} × {target['over']} {_MET[met]}"


def _line(row: dict[str, Any]) -> str:
    return "| " + " | ".join(_cells(row)) + " |"


_MET = {True: "met", False: "**missed**"}
_HEADER = (
    "| op | shape | dtype | heap | variant | median ms | best ms | × eager | × compile |"
    " targets | MB moved | GB/s | of copy |\n" + "|---" * 13 + "|"
)


def _write(directory: Path, device: str, op: str, results: dict[str, Any]) -> None:
    """Put an op's results in the place of its former ones, and write the page of all.

    Results of an earlier format, which lack what the page shows, are let go.
    """
    name, page = {"cpu": ("kernels_cpu", _CPU_PAGE), "cuda": ("kernels_gpu", _GPU_PAGE)}[device]
    path = directory / f"{name}.json"
    every = {**(json.loads(path.read_text()) if path.exists() else {}), op: results}
    sections = {}
    for one in (known for known in OPS if known in every):
        try:
            sections[one] = _section(one, every[one])
        except (KeyError, TypeError):
            print(f"{path}: let go of {one}, of another format", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({one: every[one] for one in sections}, indent=1) + "\n")
    (directory / f"{name}.md").write_text(page + "".join(sections.values()))


def _section(op: str, results: dict[str, Any]) -> str:
    described = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    table = "\n".join([_HEADER, *map(_line, results["results"])])
    memory = "\n".join([_MEMORY, *map(_peak_line, results["peaks"])]) if results["peaks"] else ""
    return f"\n## {op}\n\n{described}\n\n{table}\n{memory}\n".rstrip("\n") + "\n"


_CPU_PAGE = """# Kernels on a CPU

Written by `make bench`; the same numbers as JSON are in kernels_cpu.json. Variants of a case run in
turn and a time is the median of the rounds. On a machine that others use too (see its load), only
ratios mean anything, and even those vary from run to run: kernels.md says by how much.
"MB moved" is what a variant must move at least: every sweep of ours counts, and for eager and
torch.compile the inputs, read in the forward pass and again in the backward, and the gradient; what
they put down in between comes on top. "GB/s" is that, divided by the time; "of copy" compares it
with a copy measured in the same rounds. For linear_kl, where arithmetic takes the time, inputs and
gradients count once. Targets are speeds, found and wanted, in multiples of another variant's: 0.8 ×
bare GEMMs is 1.25 times their time.

The objectives run on a warm heap and one vocabulary alone: what another heap and another vocabulary
cost, logit_kl shows. An op's section says when that op ran, and beside what load. Nothing on this
page comes from a GPU.
"""

_GPU_PAGE = """# Kernels on a GPU

Written by `make gpu-check`; the same numbers as JSON are in kernels_gpu.json. Variants of a case
run in turn, each several times a round, and a time is the median of the rounds. "MB moved" is what
a variant must move at least: every sweep of ours counts, and for eager and torch.compile the
inputs, read in the forward pass and again in the backward, and the gradient. "GB/s" is that,
divided by the time; "of copy" compares it with a copy measured in the same rounds. For linear_kl,
where arithmetic takes the time, inputs and gradients count once. The objectives run in bf16 alone.
"""

_MEMORY = """
### Peak memory

What one step, forward and backward, adds to the peak beyond its inputs. Its results are gradients
of the hidden states and of the head, which is summed up in fp32. For the rest the bound is

    64 B x tokens + 2 x chunks at a time x tokens of each x vocabulary / ranks x bytes of a logit

where 2 stands for student and teacher. One rank has one chunk at a time, ranks that share the
vocabulary two: one computes while the other's collective is under way. The bound counts as met to
1%, since the rest also holds what libraries set aside for large products. Several ranks are
processes of one machine, and the row is of the one that takes most.

| variant | ranks | dtype | tokens | hidden size | vocabulary | tokens of a chunk | MB \
| of them gradients | rest | bound |
|---|---|---|---|---|---|---|---|---|---|---|"""


if __name__ == "__main__":
    main()
