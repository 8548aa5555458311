"""What importance and pruning cost: against bare forward passes, and against `cp`.

    make bench          or: python -m tests.bench.prune [--gigabytes 3] [--directory DIR]

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
from collections.abc import Callable
from pathlib import Path

import torch

from minitron import artifact, metrics
from minitron.data.batches import EvalBatches, open_windows
from minitron.model import hf
from minitron.model.arch import Architecture
from minitron.model.llama import LlamaModel, build_llama, freeze
from minitron.model.schedule import run_schedule
from minitron.model.weights import WeightWriter
from minitron.parallel import ParallelConfig, initialize
from minitron.prune.baselines import baseline_scores
from minitron.prune.importance import collect_importance
from minitron.prune.pruning import plan_pruning, prune_model
from minitron.prune.target import PruneConfig
from tests.runs import VOCAB, write_tokens

GB = 1e9


def alternate(
    first: Callable[[], object],
    second: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Median seconds of both, and the median of the ratios second / first."""
    times = []
    for _ in range(rounds):
        pair = []
        for side in (first, second):
            start = clock()
            side()
            pair.append(clock() - start)
        times.append(pair)
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return [*medians, statistics.median(b / a for a, b in times)]


def bench_importance(directory: Path, rounds: int) -> None:
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
        weights = hf.InitialWeights(arch, seed=0)
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
        measured = alternate(bare, scored, rounds, clock=time.process_time)
        rows.append((f"h={hidden_size}, {arch.num_layers} layers", *measured))
    print(metrics.format_table(("importance", "forward CPU s", "scored CPU s", "ratio"), rows))


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
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    prune_model(source, out, plan_pruning(arch, PruneConfig(**keys).target(arch), scores))


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


def bench_pruning(directory: Path, gigabytes: float, rounds: int) -> None:
    """Width pruning of a large model against a copy of its files, both flushed to the disk."""
    source, copy, out = (directory / name for name in ("source", "copy", "out"))
    arch = make_model(source, gigabytes)
    size = sum(file.stat().st_size for file in source.iterdir())
    largest = 2 * arch.vocab_size * arch.hidden_size

    def cp() -> None:
        shutil.rmtree(copy, ignore_errors=True)
        subprocess.run(["cp", "-r", source, copy], check=True)
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
        rows.append((name, *alternate(cp, functools.partial(prune, source, out, keys), rounds)))
        shutil.rmtree(out)
        peak = max(peak, peak_memory(prune, source, out, keys))
        if name == "same shape":
            start = time.perf_counter()
            artifact.write_manifest(out, stage="prune", recipe={}, parents={})
            hashing = time.perf_counter() - start
        shutil.rmtree(out)
    title = f"pruning {size / GB:.1f} GB"
    print(metrics.format_table((title, "cp s", "prune s", "ratio"), rows))
    print(f"hashing {size / GB:.1f} GB for the manifest: {hashing:.1f} s")
    bound = 2 * largest / GB + 1
    print(f"peak memory {peak:.2f} GB, bound 2 x {largest / GB:.2f} + 1 = {bound:.2f} GB")


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="a disk with room for three such models")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        bench_importance(Path(directory), options.rounds)
        bench_pruning(Path(directory), options.gigabytes, options.rounds)


if __name__ == "__main__":
    main()
