"""`make gpu-check`: what only a GPU can tell, in one command of a few minutes.

    make gpu-check PYTHON=python3

Builds the extension for the GPU at hand, in place and with the Python that runs this (no .venv, no
network), runs the tests that need a GPU, times the kernels and a distillation step, and writes
docs/results/kernels_gpu.md and distillation_gpu.md.

It is meant for two installations: torch 2.11 of CUDA 13 with Python 3.12, as images of GPU machines
have it, and the torch that constraints.txt pins. Kernels and their tests need torch, setuptools
(with which torch comes), numpy, pytest, hypothesis, nvcc and a C++ compiler. The distillation step
needs `TRAINING` too, and the test of the launch scripts also jsonargparse, zstandard and pyyaml;
what is not installed is left out, in a line that names it. To bring it along where there is no
network, for Python 3.12:

    pip download --only-binary=:all: --no-deps --python-version 3.12 --dest wheels \\
        --constraint constraints.txt megatron-core jsonargparse zstandard \\
        safetensors tokenizers sentencepiece tqdm psutil pyyaml
    python3 -m pip install --no-index --no-deps wheels/*.whl
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ops", "tests/launch/test_gpu.py")
TRAINING = ("megatron-core", "safetensors", "tokenizers", "sentencepiece", "tqdm", "psutil")


def main() -> None:
    """Run everything; the first step that fails is the last."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["MINITRON_CUDA_ARCHITECTURES"] = architecture()
    environment["CUDA_HOME"] = cuda_home() or sys.exit(
        "error: gpu-check needs CUDA_HOME, or nvcc on PATH"
    )
    environment.pop("MINITRON_BUILD_EXT", None)
    for step in (
        ("setup.py", "-q", "build_ext", "--inplace"),
        ("-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *TESTS),
        ("-m", "tests.bench", "--device", "cuda"),
        ("-m", "tests.bench.distill_gpu", "--out", "docs/results"),
    ):
        if "tests.bench.distill_gpu" in step and (absent := missing(TRAINING)):
            print(f"skipped: python {' '.join(step)} needs {', '.join(absent)}", flush=True)
            continue
        start = time.monotonic()
        result = subprocess.run([sys.executable, *step], cwd=ROOT, env=environment)
        if result.returncode:
            sys.exit(f"error: python {' '.join(step)} failed")
        print(f"python {' '.join(step)}: {time.monotonic() - start:.0f} s", flush=True)


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    installed = {package.name for package in importlib.metadata.distributions()}
    return [package for package in packages if package not in installed]


def architecture() -> str:
    """The GPU's compute capability, as nvcc writes it."""
    try:
        import torch
    except ImportError:
        sys.exit(f"error: {sys.executable} has no torch; name another: make gpu-check PYTHON=...")
    if not torch.cuda.is_available():
        sys.exit(f"error: gpu-check needs a GPU, and torch {torch.__version__} sees none")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def cuda_home() -> str | None:
    """The CUDA toolkit: what CUDA_HOME says, or where toolkits are."""
    nvcc = shutil.which("nvcc")
    candidates = [Path("/usr/local/cuda"), *([Path(nvcc).resolve().parents[1]] if nvcc else [])]
    found = [str(path) for path in candidates if (path / "bin" / "nvcc").exists()]
    return os.environ.get("CUDA_HOME") or next(iter(found), None)


if __name__ == "__main__":
    main()
