"""Times variants of one computation against each other.

Variants run in turn, round after round, so that what else the machine does hits all alike; a
variant's time is its median. Only ratios within one run mean anything. On a GPU a round runs a
variant often enough that starting it, and waiting for its end, do not count.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_GPU_ROUND_MS = 20.0
COPY = "copy"


@dataclass(frozen=True)
class Case:
    """One problem and the ways to solve it; the first variant is the baseline."""

    op: str
    shape: str
    dtype: str
    variants: dict[str, Callable[[], object]]
    floor_bytes: dict[str, int]
    """What a variant must move at least, as it goes about it; the copies it makes come on top."""
    targets: dict[str, dict[str, float]] = field(default_factory=dict)
    """By variant, how many times as fast as another it has to be; over `COPY`, as the bandwidth."""


@dataclass(frozen=True)
class Target:
    """A speed to reach and the one that was found, in multiples of another variant's."""

    over: str
    wanted: float
    found: float


@dataclass
class Row:
    """One variant's result; times in milliseconds, bandwidth of the bytes that it must move."""

    op: str
    shape: str
    dtype: str
    variant: str
    median_ms: float
    best_ms: float
    over_eager: float
    over_compile: float
    moved_mb: float
    gb_per_s: float
    share_of_copy: float
    targets: list[Target]


def compile_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` for one case: after others it would compile for any shape, and then not at
    all."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def measure(case: Case, *, rounds: int, device: str = "cpu") -> list[Row]:
    """Run a case's variants in turn."""
    on_gpu = device != "cpu"
    source = torch.ones(1 << (28 if on_gpu else 26), device=device)  # far beyond any cache
    target = torch.empty_like(source)
    variants = {**case.variants, COPY: lambda: target.copy_(source)}

    def time_ms(run: Callable[[], object], repetitions: int = 1) -> float:
        start = time.perf_counter()
        for _ in range(repetitions):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / repetitions

    repetitions = dict.fromkeys(variants, 1)
    for name, run in variants.items():
        time_ms(run)  # compilation, first touches
        once = time_ms(run)
        if on_gpu:
            repetitions[name] = max(1, min(50, int(_GPU_ROUND_MS / once)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(time_ms(run, repetitions[name]))
    medians = {name: statistics.median(values) for name, values in times.items()}
    copy_gb_per_s = 2 * source.nbytes / medians[COPY] / 1e6
    eager, compiled = (medians[name] for name in list(case.variants)[:2])
    rows = []
    for name in case.variants:
        wanted = case.targets.get(name, {})
        moved = case.floor_bytes[name]
        rate = moved / medians[name] / 1e6
        share = rate / copy_gb_per_s
        rows.append(
            Row(
                case.op,
                case.shape,
                case.dtype,
                name,
                medians[name],
                min(times[name]),
                eager / medians[name],
                compiled / medians[name],
                moved / 1e6,
                rate,
                share,
                [
                    Target(over, speed, share if over == COPY else medians[over] / medians[name])
                    for over, speed in wanted.items()
                ],
            )
        )
    return rows


def describe_machine(device: str, threads: int, rounds: int) -> dict[str, Any]:
    """What a page of results says of how it came about."""
    module = sys.modules["__main__"].__spec__.name.removesuffix(".__main__")
    machine = {
        "command": " ".join(["python -m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": _processor(),
        "threads": threads,
        "rounds": rounds,
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        machine["machine"] = torch.cuda.get_device_name()
        machine["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        machine["cuda"] = torch.version.cuda
    return machine


def write_results(name: str, page: str, content: Any, directory: Path | None) -> None:
    """Print a page, and write it and the numbers behind it if there is a directory for them."""
    print(page)
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{name}.md").write_text(page)
        (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
