"""What importance and pruning cost: against bare forward passes, and against `cp`.

    make bench          or: python -m tests.bench.prune [--out docs/results] [--directory DIR]

Each comparison alternates its two sides within one run and shows the median of the ratios, so that
a busy machine slows both.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minitron import artifact
from minitron.data.batches import EvalBatches, open_windows
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.initial import InitialWeights
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.model.weights import WeightWriter
from minitron.parallel import initialize, on_rank_zero
from minitron.prune.baselines import baseline_scores
from minitron.prune.importance import collect_importance
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.target import target_shape
from minitron.sections.parallel import ParallelConfig
from minitron.sections.prune import PruneConfig
from tests.bench.runner import describe_machine, write_results
from tests.harness import close_pool, run_distributed
from tests.runs import VOCAB, write_tokens

GB = 1e9
IMPORTANCE_TARGET, PRUNING_TARGET = 1.10, 1.5  # ratios to stay within


def alternate(
    sides: Sequence[Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of every side in every round."""
    times = []
    for _ in range(rounds):
        seconds = []
        for side in sides:
            start = clock()
            side()
            seconds.append(clock() - start)
        times.append(seconds)
    return times


def median_ratio(times: Sequence[Sequence[float]], side: int, base: int) -> float:
    """Median of the rounds' ratios side / base."""
    return statistics.median(seconds[side] / seconds[base] for seconds in times)


def bench_importance(directory: Path, rounds: int) -> list[dict[str, Any]]:
    """Forward passes with the hooks of importance against the same without."""
    rows = []
    topology = initialize(ParallelConfig())
    prefix = write_tokens(directory / "tokens", 8 * 512 + 1)
    for hidden_size in (256, 512, 1024):
        arch = Architecture(
            num_layers=4,
            hidden_size=hidden_size,
            ffn_hidden_size=7 * hidden_size // 2,
            num_attention_heads=hidden_size // 64,
            num_query_groups=hidden_size // 256,
            kv_channels=64,
            vocab_size=VOCAB,
        )
        weights = InitialWeights(arch, seed=0)
        model = freeze(build_llama(arch, topology, weights, dtype=torch.float32))
        batches = EvalBatches(
            open_windows([str(prefix)], 512),
            micro_batch_size=2,
            data_parallel_rank=0,
            data_parallel_size=1,
            include_remainder=False,
        )
        bare = functools.partial(forward, model, batches)
        scored = functools.partial(collect_importance, model, batches)
        scored()  # the first call of everything is slower
        times = alternate((bare, scored), rounds, clock=time.process_time)
        base, ours = map(statistics.median, zip(*times, strict=True))
        row = {"case": f"hidden {hidden_size}, {arch.num_layers} layers"}
        row |= {"base_s": base, "ours_s": ours, "ratio": median_ratio(times, 1, 0)}
        rows.append(row | {"target": IMPORTANCE_TARGET})
    return rows


def forward(model: LlamaModel, batches: EvalBatches) -> None:
    """The passes of `collect_importance`, bare."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, 4)):
        run_schedule(model, group, lambda *_: None, forward_only=True)


def make_model(directory: Path, gigabytes: float) -> Architecture:
    """A bf16 model of about this size with the proportions of Llama-3.1-8B."""
    layers = max(1, round((gigabytes * GB / 2 - 2 * 128256 * 2048) / 60.8e6))
    arch = Architecture(
        num_layers=layers,
        hidden_size=2048,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=8,
        kv_channels=64,
        vocab_size=128256,
    )
    directory.mkdir()
    writer = WeightWriter(directory, hf.tensor_infos(arch, torch.bfloat16))
    writer.create()
    noise = torch.randn(128256 * 2048).bfloat16()
    for name, info in writer.infos.items():
        writer.write(name, noise[: info.num_bytes // 2].view(info.shape))
    writer.close()
    hf.write_config(directory, arch, dtype=torch.bfloat16)
    return arch


def prune(source: Path, out: Path, keys: dict[str, int]) -> None:
    """What launch/prune.py does between its scores and its manifest."""
    torch.set_num_threads(1)
    arch = hf.read_architecture(source)
    scores = baseline_scores("random", arch, seed=0)

    def create() -> None:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()

    on_rank_zero(create)
    prune_model(source, out, plan_pruning(arch, target_shape(PruneConfig(**keys), arch), scores))


def peak_memory(function: Callable[..., None], *arguments: object) -> float:
    """Run in a fresh process; GB that it adds to what its imports take, without mapped files."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measure, args=(queue, function, *arguments))
    process.start()
    peak = queue.get()
    process.join()
    return peak


def _measure(queue: multiprocessing.Queue, function: Callable[..., None], *args: object) -> None:
    before = peak = anonymous_memory()
    thread = threading.Thread(target=function, args=args)
    thread.start()
    while thread.is_alive():
        peak = max(peak, anonymous_memory())
        time.sleep(0.002)
    queue.put((peak - before) / GB)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def bench_pruning(directory: Path, gigabytes: float, rounds: int) -> dict[str, Any]:
    """Pruning of a large model against copies of its files and of its own, all flushed to the disk.

    The same bytes as pruning are moved by a `cp` of the larger of what is read and what is written:
    the source where some of every tensor stays, the result where whole layers go unread.
    """
    source, copy, result, out = (directory / name for name in ("source", "copy", "result", "out"))
    arch = make_model(source, gigabytes)
    largest = 2 * arch.vocab_size * arch.hidden_size

    def size(model: Path) -> int:
        return sum(file.stat().st_size for file in model.iterdir())

    def cp(model: Path) -> None:
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-r", model, copy], check=True)
        for file in copy.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())

    rows = []
    cases: dict[str, dict[str, int]] = {
        "same shape": {"num_layers": arch.num_layers},
        "width": {"hidden_size": 1536, "ffn_hidden_size": 5376},
        "depth": {"num_layers": arch.num_layers // 2},
    }
    peak = 0.0
    for name, keys in cases.items():
        prune(source, result, keys)
        sides = [
            functools.partial(cp, source),
            functools.partial(cp, result),
            functools.partial(prune, source, out, keys),
            functools.partial(run_distributed, prune, 2, source, out, keys),
        ]
        # Starts the ranks, and takes memory that a virtual machine may not have been given yet:
        # whoever fills it first, `cp` or pruning, is several times as slow.
        alternate(sides, 1)
        times = alternate(sides, rounds)
        medians = map(statistics.median, zip(*times, strict=True))
        row = dict(zip(("source_s", "result_s", "ours_s", "ranks_s"), medians, strict=True))
        ratios = [median_ratio(times, 2, base) for base in (0, 1)]
        row |= {
            "case": name,
            "result_gigabytes": size(result) / GB,
            "source_ratio": ratios[0],
            "result_ratio": ratios[1],
            "ranks_ratio": median_ratio(times, 3, 2),
            "ratio": ratios[name == "depth"],  # of the same bytes
        }
        rows.append(row | {"target": PRUNING_TARGET})
        shutil.rmtree(out)
        peak = max(peak, peak_memory(prune, source, out, keys))
        if name == "same shape":
            start = time.perf_counter()
            artifact.write_manifest(out, stage="prune", recipe={}, parents={})
            hashing = time.perf_counter() - start
        shutil.rmtree(out)
    return {
        "gigabytes": size(source) / GB,
        "rows": rows,
        "hashing_s": hashing,
        "peak_gb": peak,
        "bound_gb": 2 * largest / GB + 1,
    }


_PAGE = """# What importance and pruning cost

Written by tests/bench/prune.py, the same numbers as JSON are in pruning_cpu.json. Both sides of a
comparison alternate within the run; a time is the median of the rounds, a ratio that of the rounds'
ratios.

{described}

| importance, one pass against a forward pass | forward, CPU s | scored, CPU s | ratio | target |
|---|---|---|---|---|
{importance}

| pruning {gigabytes:.1f} GB of bf16 | GB written | `cp` of the source, s | `cp` of the result, s \
| pruning, s | ratio to the source's | to the result's | target | two ranks, s | ratio to one |
|---|---|---|---|---|---|---|---|---|---|
{pruning}

Everything is flushed to the disk, and read from the page cache; a round before those that count
has filled it. What pruning must move is the
larger of what it reads and what it writes: the source's bytes where some of every tensor stays, the
result's where whole layers go unread. The target is for a `cp` of as much. Pruning reads back what
it has written, and refuses NaN and infinities; two ranks share the tensors, on the same cores.

Hashing the result of the same shape for its manifest takes another {hashing_s:.1f} s. Peak memory
of tensors is {peak_gb:.2f} GB; two of the largest tensors and 1 GB, which is the bound, are
{bound_gb:.2f} GB.
"""


_IMPORTANCE_ROW = "| {case} | {base_s:.2f} | {ours_s:.2f} | {ratio:.2f} | {target:.2f} {verdict} |"
_PRUNING_ROW = (
    "| {case} | {result_gigabytes:.1f} | {source_s:.2f} | {result_s:.2f} | {ours_s:.2f} "
    "| {source_ratio:.2f} | {result_ratio:.2f} | {target:.2f} {verdict} "
    "| {ranks_s:.2f} | {ranks_ratio:.2f} |"
)


def _lines(form: str, rows: list[dict[str, Any]]) -> str:
    verdicts = ("**missed**", "met")
    return "\n".join(
        form.format(**row, verdict=verdicts[row["ratio"] <= row["target"]]) for row in rows
    )


def main() -> None:
    """Run both, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="a disk with room for four such models")
    parser.add_argument("--out", type=Path, help="a directory for the page and the JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        importance = bench_importance(Path(directory), options.rounds)
        pruning = bench_pruning(Path(directory), options.gigabytes, options.rounds)
    machine = describe_machine("cpu", 1, options.rounds)
    page = _PAGE.format(
        described=", ".join(f"{key} {value}" for key, value in machine.items()),
        importance=_lines(_IMPORTANCE_ROW, importance),
        **{**pruning, "pruning": _lines(_PRUNING_ROW, pruning["rows"])},
    )
    close_pool()
    results = {"machine": machine, "importance": importance, "pruning": pruning}
    write_results("pruning_cpu", page, results, options.out)


if __name__ == "__main__":
    main()
