"""launch/chain.sh: rounds of scoring, pruning and distilling."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaForCausalLM

from minitron import artifact
from tests.launch.launcher import ROOT, TIMEOUT_S, environment
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import save_llama

SCRIPT = ROOT / "launch" / "chain.sh"
PYTHON_DIR = os.path.dirname(sys.executable)
# python: logs which stage writes what and writes its manifest, unless it is told to fail there.
PYTHON = r"""#!/usr/bin/env bash
stage=$(basename "$1" .py) out=${*: -1}
[[ $stage != distill || " $* " == *" --resume "* ]] || exit 1
echo "$stage $out" >>log
[[ "$stage $out" != "$(cat fails 2>/dev/null)" ]] || exit 75
mkdir -p "$out"
touch "$out/manifest.json"
"""


def chain(*arguments, cwd, python=PYTHON_DIR):
    path = f"{python}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env=environment(cwd / ".cache") | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


@pytest.mark.slow
def test_two_rounds_of_width_and_depth_with_distillation_between(tmp_path):
    save_llama(tmp_path / "model", vocab_size=VOCAB)
    tokens = write_tokens(tmp_path / "tokens", 9 * SEQ_LENGTH)
    data = {"path": [str(tokens)], "seq_length": SEQ_LENGTH}
    recipes = {
        "importance": {"data": data, "importance": {"samples": 4}},
        "prune": {"prune": {"hidden_size": 16, "ffn_hidden_size": 20, "num_layers": 2}},
        "distill": {
            "teacher": {"allow_untrained": True},  # this one is random
            "data": data,
            "train": {"steps": 2, "global_batch_size": 2},
        },
    }
    files = []
    for name, content in recipes.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(json.dumps(content))
    result = chain(2, tmp_path / "model", tmp_path / "out", *files, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"student: {tmp_path}/out/2/distilled"
    shapes = []
    for number in (1, 2):
        for stage in ("pruned", "distilled"):
            config = LlamaForCausalLM.from_pretrained(tmp_path / "out" / str(number) / stage).config
            shapes.append((config.hidden_size, config.intermediate_size, config.num_hidden_layers))
    assert shapes == [(24, 34, 3)] * 2 + [(16, 20, 2)] * 2
    second = artifact.read_manifest(tmp_path / "out" / "2" / "scores")["parents"]["model"]
    assert second["fingerprint"] == artifact.fingerprint(tmp_path / "out" / "1" / "distilled")
    last = artifact.read_manifest(tmp_path / "out" / "2" / "distilled")["parents"]["teacher"]
    assert last["fingerprint"] == artifact.fingerprint(tmp_path / "model")


def test_it_goes_on_where_it_was_stopped(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    log, fails = tmp_path / "log", tmp_path / "fails"
    stages = [
        f"{stage} out/{number}/{part}"
        for number in (1, 2)
        for stage, part in {
            "importance": "scores", "prune": "pruned", "distill": "distilled"
        }.items()
    ]  # fmt: skip
    arguments = (2, "model", "out", "importance.yaml", "prune.yaml", "distill.yaml")
    for stopped in stages:
        log.unlink(missing_ok=True)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        fails.write_text(stopped)
        assert chain(*arguments, cwd=tmp_path, python=python.parent).returncode == 75
        fails.unlink()
        result = chain(*arguments, cwd=tmp_path, python=python.parent)
        assert (result.returncode, result.stdout) == (0, "student: out/2/distilled\n")
        at = stages.index(stopped)
        assert log.read_text().splitlines() == stages[: at + 1] + stages[at:]


def test_usage(tmp_path):
    result = chain(cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("Prune in rounds.")
    assert "chain.sh ROUNDS MODEL OUT IMPORTANCE.yaml PRUNE.yaml [DISTILL.yaml]" in result.stderr
