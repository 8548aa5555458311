"""launch/cache_logits.py as a user calls it, and students that learn from what it wrote."""

import json
import shutil
import time

import pytest

from minitron import artifact
from minitron.distill.offline.files import SHARDS
from minitron.distill.offline.store import LogitStore
from tests.launch.launcher import Launch
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import save_llama

TP2 = ("--parallel.tensor_model_parallel_size", 2)
PP2 = ("--parallel.pipeline_model_parallel_size", 2)
WHOLE = ("--cache.top_k", VOCAB, "--cache.floats", "fp32")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_llama(root / "teacher", vocab_size=VOCAB, seed=1)
    save_llama(root / "student", vocab_size=VOCAB, num_hidden_layers=2)
    write_tokens(root / "train", 70 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 5 * SEQ_LENGTH + 1, seed=1)
    return root


DATA = ("--data.path", "train", "--data.valid_path", "valid", "--data.seq_length", SEQ_LENGTH)
CACHE = ("--teacher", "teacher", "--teacher.allow_untrained", *DATA)  # its weights are random
TRAIN = (
    *("--student", "student", *DATA, "--train.steps", 4, "--train.global_batch_size", 4),
    *("--train.lr", 1e-3, "--train.valid_interval", 2, "--train.checkpoint_interval", 0),
)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_student_learns_from_the_store_what_it_learns_from_the_teacher(root, forked):
    result = forked("cache_logits", *CACHE, *WHOLE, *TP2, "--out", "logits", cwd=root, ranks=2)
    assert result.status == 0, result.err
    manifest = artifact.read_manifest(root / "logits")
    metrics = manifest["metrics"]
    assert (metrics["samples"], metrics["tokens"]) == (75, 75 * SEQ_LENGTH)
    size = sum(file.stat().st_size for file in (root / "logits" / SHARDS).iterdir())
    assert metrics["bytes"] == size
    assert f"wrote logits: 75 samples, {75 * SEQ_LENGTH:,} tokens, {size:,} bytes" in result.out
    assert manifest["parents"]["teacher"]["fingerprint"] == artifact.fingerprint(root / "teacher")
    assert manifest["files"].keys() == {"recipe.yaml", "samples.npy", "store.json"}

    teacher = ("--teacher", "teacher", "--teacher.allow_untrained")
    online = forked("distill", *teacher, *TRAIN, "--out", "online", cwd=root)
    assert online.status == 0, online.err
    micro = ("--train.micro_batch_size", 2)
    offline = ("--teacher.logits", "logits", *TRAIN, *micro, *PP2, "--out", "offline")
    result = forked("distill", *offline, cwd=root, ranks=2)
    assert result.status == 0, result.err
    assert "on the first samples, in nats a token: initial student's loss " in result.err
    pairs = list(zip(records(root / "online"), records(root / "offline"), strict=True))
    assert len(pairs) == 4 + 3
    for expected, found in pairs:
        assert found.keys() & {"kl", "val_kl"} == expected.keys() & {"kl", "val_kl"}
        for key in {"loss", "kl", "grad_norm", "val_loss", "val_kl"} & expected.keys():
            assert found[key] == pytest.approx(expected[key], rel=1e-5), key
    parents = artifact.read_manifest(root / "offline")["parents"]
    assert parents["teacher"]["fingerprint"] == artifact.fingerprint(root / "logits")


def test_a_teacher_that_knows_nothing_is_not_stored(root, forked):
    arguments = ("--teacher", "teacher", *DATA, "--cache.draws", 5, "--out", "unwritten")
    result = forked("cache_logits", *arguments, cwd=root)
    assert result.status == 2, result
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "no better than chance: its loss is " in line
    assert not (root / "unwritten").exists()


def test_a_killed_run_goes_on_where_it_was(root, forked):
    arguments = (*CACHE, "--cache.draws", 20)
    whole = forked("cache_logits", *arguments, "--out", "whole", cwd=root)
    assert whole.status == 0, whole.err
    out = root / "killed"
    running = Launch("cache_logits", *arguments, "--out", out.name, cwd=root)
    while running.is_running and not list(out.glob(f"{SHARDS}/[0-9]*")):
        time.sleep(0.01)
    running.kill()
    kept = sorted((out / SHARDS).glob("[0-9]*"))
    assert kept
    for shard in kept[1:]:
        shard.unlink()
    before = kept[0].stat().st_mtime_ns
    resumed = forked("cache_logits", *arguments, "--out", out.name, "--resume", cwd=root, ranks=2)
    assert resumed.status == 0, resumed.err
    assert kept[0].stat().st_mtime_ns == before
    names = [file.name for file in sorted((root / "whole" / SHARDS).iterdir())]
    assert [file.name for file in sorted((out / SHARDS).iterdir())] == names
    for name in names:
        assert (out / SHARDS / name).read_bytes() == (root / "whole" / SHARDS / name).read_bytes()
    assert LogitStore(out).info.num_samples == 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data.seq_length", 8), "samples of 16 tokens, but data.seq_length=8; use 16"),
        (("--distill.temperature", 2), "cache.temperature=1.0, but distill.temperature=2.0; use"),
        (
            ("--student", "small"),
            "teacher's vocabulary has 301 tokens, the student's 61, and neither",
        ),
        (("--data.path", "valid2"), "holds nothing of the token stream "),
        (("--teacher.logits", "student"), "student is no store of teacher logits "),
        (("--teacher.path", "teacher"), "give either --teacher.path or --teacher.logits; both"),
        (("--train.steps", 3), "lacks sample "),
        (
            ("--distill.intermediate.states", "embedding"),
            "part holds no states for distill.intermediate.states=['embedding']; leave them out or",
        ),
    ],
)
def test_a_run_that_the_store_does_not_fit_is_one_line(root, forked, arguments, message):
    if not (root / "part").exists():
        save_llama(root / "small")
        write_tokens(root / "valid2", 5 * SEQ_LENGTH + 1, seed=2)
        part = ("--cache.top_k", 3, "--cache.max_samples", 8, "--out", "part")
        assert forked("cache_logits", *CACHE, *part, cwd=root).status == 0
    fitting = ("--teacher.logits", "part", *TRAIN, "--train.steps", 2, "--out", "fitting")
    result = forked("distill", *fitting, *arguments, cwd=root)
    assert result.status == 2, result
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (root / "fitting").exists()


def test_a_block_that_was_damaged_meanwhile_ends_the_run_in_one_line(root, forked):
    part = ("--cache.top_k", 3, "--cache.max_samples", 8, "--out", "damaged")
    assert forked("cache_logits", *CACHE, *part, cwd=root).status == 0
    shard = root / "damaged" / SHARDS / "00005.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    fitting = ("--teacher.logits", "damaged", *TRAIN, "--train.steps", 2, "--out", "cut_short")
    result = forked("distill", *fitting, cwd=root)
    assert result.status == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert "00005.bin is damaged: sample 0 in it (counted from 0) does not match its" in line


def test_a_run_that_the_store_fits_learns(root, forked):
    part = ("--cache.draws", 9, "--cache.max_samples", 8, "--out", "first")
    assert forked("cache_logits", *CACHE, *part, cwd=root).status == 0
    fitting = ("--teacher.logits", "first", *TRAIN, "--train.steps", 2, "--out", "fitting")
    result = forked("distill", *fitting, cwd=root)
    assert result.status == 0, result.err
    shutil.rmtree(root / "fitting")
