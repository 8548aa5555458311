"""`make gpu-check`: what only a GPU can tell, in one command of a few minutes.

Builds the extension for the GPU at hand, in place and with the Python that runs this (no .venv, no
network), runs the tests that need a GPU, times the kernels and a distillation step, and writes
docs/results/kernels_gpu.md and distillation_gpu.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ops", "tests/launch/test_gpu.py")


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
        start = time.monotonic()
        result = subprocess.run([sys.executable, *step], cwd=ROOT, env=environment)
        if result.returncode:
            sys.exit(f"error: python {' '.join(step)} failed")
        print(f"python {' '.join(step)}: {time.monotonic() - start:.0f} s", flush=True)


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
