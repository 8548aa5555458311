"""`make gpu-check`: what only a GPU can tell, in one command of a few minutes.

    make gpu-check PYTHON=python3
    python3 -m tests.gpu_check kernels --out /tmp/results

Builds the extension for the GPU at hand, in place and with the Python that runs this (no .venv, no
network). Then come the steps, or those that are named: `tests`, which need a GPU; `kernels`, timed;
`distill`, a distillation step, timed. What is timed is written to kernels_gpu.md and
distillation_gpu.md. A step that fails does not keep the next from running.

It is meant for two installations: torch 2.11 of CUDA 13 with Python 3.12, as images of GPU machines
have it, and the torch that constraints.txt pins. Kernels and their tests need torch, setuptools and
triton (with which torch comes), numpy, pytest, hypothesis, nvcc, a C and a C++ compiler, and
Python.h, which triton needs too. The distillation step needs `TRAINING` as well, and the test of
the launch scripts jsonargparse, zstandard and pyyaml; what is not installed is left out, in a line
that names it. To bring it along where there is no network, for Python 3.12:

    pip download --only-binary=:all: --no-deps --python-version 3.12 --dest wheels \\
        --constraint constraints.txt megatron-core jsonargparse zstandard \\
        safetensors tokenizers sentencepiece tqdm psutil pyyaml
    python3 -m pip install --no-index --no-deps wheels/*.whl
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("tests/ops", "tests/launch/test_gpu.py")
TRAINING = ("megatron-core", "safetensors", "tokenizers", "sentencepiece", "tqdm", "psutil")


@dataclass(frozen=True)
class Step:
    """Arguments of Python, and what must be installed for them."""

    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


BUILD = Step(("setup.py", "-q", "build_ext", "--inplace"), ("setuptools",))
STEPS = {
    "tests": Step(
        ("-m", "pytest", "-m", "gpu", "-rs", "-p", "no:cacheprovider", *TESTS),
        ("pytest", "hypothesis", "numpy"),
    ),
    "kernels": Step(("-m", "tests.bench", "--device", "cuda", "--out", "{out}"), ("triton",)),
    "distill": Step(("-m", "tests.bench.distill_gpu", "--out", "{out}"), TRAINING),
}


def main() -> None:
    """Build, run the steps asked for, and fail if one of them did."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help="default: all of them"
    )
    parser.add_argument(
        "--out",
        default="docs/results",
        help="where results are written, from the root of the repository (default: %(default)s)",
    )
    options = parser.parse_args()
    steps = {name: STEPS[name] for name in options.steps or STEPS}
    if not run(steps, options.out, environment()):
        sys.exit(1)


def run(steps: dict[str, Step], out: str, variables: dict[str, str]) -> bool:
    """Build and run the steps, say how each went, and tell whether none failed."""
    outcomes = {"build": _outcome(BUILD, out, variables)}
    for name, step in steps.items():
        built = outcomes["build"].startswith("ok")
        outcomes[name] = _outcome(step, out, variables) if built else "not run"
    print("\ngpu-check:", *(f"  {name}: {said}" for name, said in outcomes.items()), sep="\n")
    return all(said.startswith(("ok", "skipped")) for said in outcomes.values())


def _outcome(step: Step, out: str, variables: dict[str, str]) -> str:
    arguments = [argument.format(out=out) for argument in step.arguments]
    if absent := missing(step.needs):
        said = f"skipped, needs {', '.join(absent)}"
    else:
        start = time.monotonic()
        code = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables).returncode
        said = f"{f'failed with status {code}' if code else 'ok'}, {time.monotonic() - start:.0f} s"
    print(f"python {' '.join(arguments)}: {said}", flush=True)
    return said


def environment() -> dict[str, str]:
    """Of the steps: a build for this GPU alone, and none of an image's own ideas of arithmetic."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    variables["MINITRON_CUDA_ARCHITECTURES"] = architecture()
    variables["CUDA_HOME"] = cuda_home() or sys.exit(
        "error: gpu-check needs CUDA_HOME, or nvcc on PATH"
    )
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        sys.exit(f"error: gpu-check needs {header}; install Python's headers (python3-dev)")
    variables.pop("MINITRON_BUILD_EXT", None)
    # Where it is set, fp32 matrix products of references and eager baselines have 10 bits.
    variables.pop("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", None)
    return variables


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
