"""launch/correct_and_distill.sh: turns of a teacher's correction and a distillation from it."""

import json
import os
import subprocess
import sys

import pytest

from minitron import artifact
from tests.launch.launcher import ROOT, TIMEOUT_S, environment
from tests.runs import MEASURED, SEQ_LENGTH, VOCAB, load_tensors, write_tokens
from tests.tiny import save_llama

SCRIPT = ROOT / "launch" / "correct_and_distill.sh"


def correct_and_distill(*arguments, cwd):
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        cwd=cwd,
        env=environment(cwd / ".cache") | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def steps_of(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k not in MEASURED} for x in lines if "grad_norm" in x]


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_that_is_corrected_meanwhile(tmp_path, forked):
    save_llama(tmp_path / "original", vocab_size=VOCAB)
    save_llama(tmp_path / "pruned", vocab_size=VOCAB, hidden_size=16, seed=1)
    tokens = write_tokens(tmp_path / "tokens", 9 * SEQ_LENGTH)
    common = {
        "data": {"path": [str(tokens)], "seq_length": SEQ_LENGTH},
        "train": {"global_batch_size": 2, "lr": 1e-2},
    }
    recipes = {
        "correction": {"model": {"path": str(tmp_path / "original")}},
        "distill": {
            "student": {"path": str(tmp_path / "pruned")},
            "teacher": {"allow_untrained": True},  # this one is random
        },
    }
    for name, content in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content | common))
    correction, distill = (tmp_path / f"{name}.yaml" for name in recipes)
    out = tmp_path / "out"
    result = correct_and_distill(3, 2, out, correction, distill, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"student: {out}/student"

    # The teacher's run is the whole run; its last model taught the last turn.
    whole = ("--config", correction, "--out", tmp_path / "whole", "--train.steps", 3)
    assert forked("train", *whole, cwd=tmp_path).status == 0
    assert steps_of(out / "teacher") == steps_of(tmp_path / "whole")
    expected = load_tensors(tmp_path / "whole")
    assert all((t == expected[name]).all() for name, t in load_tensors(out / "teacher").items())
    parents = artifact.read_manifest(out / "student")["parents"]
    assert parents["teacher"]["fingerprint"] == artifact.fingerprint(out / "teacher")

    # Another teacher taught the turns before: the last one would have found another first loss.
    fixed = ("--config", distill, "--teacher", tmp_path / "whole", "--out", tmp_path / "fixed")
    result = forked("distill", *fixed, "--train.steps", 3, "--until_step", 1, cwd=tmp_path)
    assert result.status == 0
    ours, (theirs,) = steps_of(out / "student"), steps_of(tmp_path / "fixed")
    assert [step["step"] for step in ours] == [1, 2, 3]
    assert ours[0]["lr"] == theirs["lr"]
    assert ours[0]["kl"] != theirs["kl"]

    # Killed before its last model was written, it is started again and writes the same.
    expected = load_tensors(out / "student")
    for name in ("manifest.json", "model.safetensors"):
        (out / "student" / name).unlink()
    result = correct_and_distill(3, 2, out, correction, distill, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert steps_of(out / "student") == ours
    assert all((t == expected[name]).all() for name, t in load_tensors(out / "student").items())


def test_usage(tmp_path):
    result = correct_and_distill(cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(
        "Correct the teacher and distill from it in turns of EVERY steps"
    )
    usage = "correct_and_distill.sh STEPS EVERY OUT CORRECTION.yaml DISTILL.yaml"
    assert usage in result.stderr
