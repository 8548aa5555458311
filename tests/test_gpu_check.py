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
