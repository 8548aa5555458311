"""What `make gpu-check` can do where little more than torch is installed."""

import os
import subprocess
import sys

from tests import gpu_check

WITHOUT = """
import sys
for name in {absent!r}:
    sys.modules[name] = None  # as if it were not installed
"""
SCRIPTS = ("jsonargparse", "zstandard", "yaml")
TRAINING = ("megatron", "safetensors", "tokenizers", "sentencepiece", "tqdm", "psutil")
OTHERS = ("transformers", "lm_eval", "accelerate", "matplotlib", "tensorboard")


def run_without(absent, code):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(absent=absent) + code],
        cwd=gpu_check.ROOT,
        env={**os.environ, "PYTHONPATH": str(gpu_check.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_kernels_their_tests_and_their_bench_need_torch_alone():
    code = f"""
import importlib, pytest
from tests.bench.__main__ import OPS
for op in OPS:
    importlib.import_module(f"tests.bench.{{op}}")
options = ("-m", "gpu", "--collect-only", "-rs", "-p", "no:cacheprovider")
raise SystemExit(pytest.main([*options, *{gpu_check.TESTS!r}]))
"""
    said = run_without((*SCRIPTS, *TRAINING, *OTHERS), code)
    assert "tests/ops/test_logit_kl.py" in said
    assert "could not import 'safetensors.torch'" in said
    assert "error" not in said


def test_a_distillation_step_needs_what_is_said():
    run_without((*SCRIPTS, *OTHERS), "import tests.bench.distill_gpu")


def test_what_is_missing_is_named():
    assert gpu_check.missing(gpu_check.TRAINING) == []
    assert gpu_check.missing(["torch", "no-such-package"]) == ["no-such-package"]


def python(code):
    return gpu_check.Step(("-c", code))


def test_a_failing_step_neither_ends_the_others_nor_passes_for_success(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "BUILD", python("print('built')"))
    steps = {
        "tests": python("raise SystemExit(3)"),
        "kernels": python("print('to {out}')"),
        "distill": gpu_check.Step(("-c", "print('never')"), ("no-such-package",)),
    }
    assert not gpu_check.run(steps, "elsewhere", dict(os.environ))
    said = capfd.readouterr().out
    assert "to elsewhere" in said
    assert "never\n" not in said
    summary = said.partition("gpu-check:\n")[2].splitlines()
    assert summary[1].startswith("  tests: failed with status 3, ")
    assert summary[2].startswith("  kernels: ok, ")
    assert summary[3] == "  distill: skipped, needs no-such-package"
    del steps["tests"]
    assert gpu_check.run(steps, "elsewhere", dict(os.environ))


def test_nothing_runs_on_a_failed_build(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "BUILD", python("raise SystemExit(1)"))
    assert not gpu_check.run({"tests": python("print('never')")}, ".", dict(os.environ))
    said = capfd.readouterr().out
    assert "  tests: not run" in said
    assert "never\n" not in said


def test_an_image_does_not_lower_the_precision_of_references(monkeypatch, tmp_path):
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(gpu_check.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(gpu_check, "architecture", lambda: "90")
    monkeypatch.setenv("CUDA_HOME", "/toolkit")
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    variables = gpu_check.environment()
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE" not in variables
    assert variables["MINITRON_CUDA_ARCHITECTURES"] == "90"
