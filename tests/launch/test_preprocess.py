"""launch/preprocess.py as a user calls it."""

import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from minitron.data.indexed import TokenStream
from minitron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def preprocess(*arguments, cwd, **environment):
    command = [sys.executable, str(ROOT / "launch" / "preprocess.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def corpus(tmp_path):
    text = inspect.getsource(textwrap)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text[:500]}) + "\n")
    return text


def test_trains_a_tokenizer_and_uses_it(corpus, tmp_path):
    result = preprocess(
        "--data.path=a.txt",
        "--data.path=b.jsonl",
        "--tokenizer.train_vocab_size=400",
        "--out=out/train",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == "wrote out/train.tokenizer"
    assert result.stdout.splitlines()[1].startswith("wrote out/train.bin and out/train.idx: 2 doc")
    assert "100%" in result.stderr
    tokenizer = load_tokenizer(tmp_path / "out" / "train.tokenizer")
    assert tokenizer.vocab_size == 400
    stream = TokenStream(tmp_path / "out" / "train")
    expected = [
        *tokenizer.encode(corpus),
        tokenizer.eod,
        *tokenizer.encode(corpus[:500]),
        tokenizer.eod,
    ]
    assert stream.read(0, stream.num_tokens).tolist() == expected
    manifest = json.loads((tmp_path / "out" / "train.tokenizer" / "manifest.json").read_text())
    assert manifest["recipe"]["data"]["path"] == ["a.txt", "b.jsonl"]

    # The files exist now; nothing is trained or written before that is said.
    result = preprocess(
        "--data=a.txt", "--tokenizer.train_vocab_size=400", "--out=out/train", cwd=tmp_path
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: out/train.bin exists; choose another --out or add --overwrite\n"


def test_other_ranks_leave_the_work_to_the_first(corpus, tmp_path):
    result = preprocess(
        "--data=a.txt", "--tokenizer.train_vocab_size=400", "--out=x", cwd=tmp_path, RANK="1"
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.glob("x*"))


def test_mistakes_are_one_line(corpus, tmp_path):
    for arguments, message in [
        (["--tokenizer=t", "--out=x"], "--data.path is missing"),
        (["--data=a.txt", "--out=x"], "either --tokenizer.path or --tokenizer.train_vocab_size"),
        (["--data=a.txt", "--out=x", "--tokenizer=t"], "--tokenizer.path t does not exist in "),
        (
            ["--data=a.txt", "--out=x", "--tokenizer=t", "--tokenizer.train_vocab_size=9"],
            "both were given",
        ),
        (
            ["--data=a.txt", "--out=x", "--tokenizer.train_vocab_size=99999"],
            "tokenizer.train_vocab_size=99999 is more than this text can fill",
        ),
        (["--data=a.txt", "--out=x", "--tokenizer.train_vocab_size=0"], "must be at least 1"),
        (["--data=c", "--out=x", "--tokenizer.train_vocab_size=300"], "c does not exist; give a"),
        (["--data=a.txt", "--tokeniser=t", "--out=x"], "did you mean tokenizer?"),
    ]:
        result = preprocess(*arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert message in result.stderr
        errors = [line for line in result.stderr.splitlines() if "error:" in line]
        assert errors == [result.stderr.splitlines()[-1]]
        assert not list(tmp_path.glob("*x*.bin")) + list(tmp_path.glob("x.tokenizer"))
