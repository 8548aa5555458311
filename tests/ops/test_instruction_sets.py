"""The CPU kernels that lesser processors get: the tests of the ops, run with those."""

import os
import subprocess
import sys

import pytest
import torch

from minitron.ops import library

OPS = (
    *("logit_kl", "cross_entropy", "objectives", "sparse_kl", "top_tokens"),
    *("activation_stats", "block_cosine"),
)
SELECTED = (
    "(gradient or rising or lone or impossible or nan or tiles or equal or sums or norms or cosine)"
)
KINDS = ("DEFAULT", "AVX2", "AVX512")  # each includes those before
OF_THIS_CPU = torch.backends.cpu.get_cpu_capability()


@pytest.mark.skipif(not library.extension_built, reason="the extension is not built")
@pytest.mark.parametrize("capability", KINDS[:2])
def test_ops(capability):
    if OF_THIS_CPU not in KINDS or KINDS.index(OF_THIS_CPU) <= KINDS.index(capability):
        pytest.skip(f"this is what {OF_THIS_CPU} runs, or cannot")
    files = [f"tests/ops/test_{op}.py" for op in OPS]
    selected = f"{SELECTED} and not sharded and not contract and not gpu"
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", selected]
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
