"""What a user gets wrong is one line that says what, with which values, and what to change."""

import inspect
import json
import os
import re
import shutil
import textwrap

import numpy as np
import pytest

from minitron import artifact
from minitron.data.indexed import TokenStream
from minitron.data.preprocess import preprocess
from minitron.data.tokenizer import load_tokenizer, train_sentencepiece
from tests.launch.launcher import Launch
from tests.launch.mistakes import DATA, INIT, OF_SETTINGS, TRAIN, VOCAB
from tests.launch.mistakes_of_files import OF_FILES
from tests.prune.scored import save_random
from tests.tiny import save_llama

# isort: split
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

MISTAKES = OF_SETTINGS | OF_FILES


def write_tokens(prefix, count, *, below=VOCAB):
    tokens = np.random.default_rng(0).integers(below, size=count)
    tokens[-1] = below - 1
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    builder.add_document(tokens, [count])
    builder.finalize(f"{prefix}.idx")


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)


@pytest.fixture(scope="module")
def world(tmp_path_factory, forked):
    """A directory with models, data and runs, sound and damaged."""
    root = tmp_path_factory.mktemp("world")
    long = {"max_position_embeddings": 2048}  # as long as data.seq_length is by default
    for name, options in {"model": {}, "other": {"seed": 1}, "wide": {"vocab_size": 99}}.items():
        save_llama(root / name, **long, **options)
    save_llama(root / "short", max_position_embeddings=15)

    shutil.copytree(root / "model", root / "truncated")
    weights = root / "truncated" / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    shutil.copytree(root / "model", root / "flipped")
    artifact.write_manifest(root / "flipped", stage="train", recipe={}, parents={})
    flip_a_bit(root / "flipped" / "model.safetensors")
    shutil.copytree(root / "model", root / "weightless")
    (root / "weightless" / "model.safetensors").unlink()

    for name, module in {"speaks_a": textwrap, "speaks_b": inspect}.items():
        save_llama(root / name, vocab_size=350, **long)
        train_sentencepiece([inspect.getsource(module)], 350, root / name)
    (root / "text.txt").write_text(inspect.getsource(textwrap))
    preprocess([root / "text.txt"], load_tokenizer(root / "speaks_a"), root / "tokens_a")

    write_tokens(root / "tokens", 400)
    write_tokens(root / "tokens99", 400, below=99)
    write_tokens(root / "ten", 10)
    write_tokens(root / "cut", 400)
    os.truncate(root / "cut.bin", 500)

    (root / "scores").mkdir()
    save_random(root / "scores", root / "model")
    artifact.write_manifest(
        root / "scores", stage="importance", recipe={}, parents={"model": root / "model"}
    )
    (root / "file").write_text("mine")
    (root / "full").mkdir()
    (root / "full" / "thesis.tex").write_text("years of work")
    (root / "typo.yaml").write_text("train: {stepz: 3}")
    (root / "tab.yaml").write_text("train:\n\tsteps: 3")
    (root / "store").mkdir()
    (root / "store" / "store.json").write_text("{}")
    (root / "broken.yaml").write_text("train: {steps: 3")

    (root / "run").mkdir()
    recipe = forked("train", *TRAIN, "--out", "run", "--print_config", cwd=root)
    (root / "run" / "recipe.yaml").write_text(recipe.out)
    inputs = {"model": artifact.fingerprint(root / "model")}
    inputs["data.path"] = f"{TokenStream(root / 'tokens').fingerprint:016x}"
    (root / "run" / "inputs.json").write_text(json.dumps(inputs))
    (root / "run" / "checkpoints" / "iter_0000005").mkdir(parents=True)
    (root / "damaged").mkdir()
    (root / "damaged" / "recipe.yaml").write_text("train: {steps: 3")
    return root


def files(directory):
    """All but the lock of a run, which is open when the process that took it has ended."""
    return sorted(path for path in directory.rglob("*") if path.name != artifact.LOCK)


def is_log(line):
    return re.match(r"\d\d:\d\d:\d\d ", line)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, world, forked):
    stage, arguments, message = MISTAKES[mistake]
    out = () if "--out" in arguments else ("--out", "out")
    before = files(world)
    result = forked(stage, *arguments, *out, cwd=world)
    assert result.status == 2, result
    lines = [line for line in result.err.splitlines() if not is_log(line)]
    assert len(lines) == 1, result.err
    assert re.match(f"error: .*{message}", lines[0]), lines[0]
    assert "wrote" not in result.out
    assert files(world) == before  # nothing is left behind


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (
            "train",
            (*INIT, *DATA, "--parallel.tensor_model_parallel_size", 2),
            "num_attention_heads=3 is not divisible by parallel.tensor_model_parallel_size=2; "
            "use 1 or 3",
        ),
        # Found by the first rank alone, while the other waits for it
        ("eval", ("--model", "flipped", *DATA), "flipped/model.safetensors does not match its SHA"),
    ],
)
def test_a_mistake_on_two_ranks_is_one_line_and_ends_both(stage, arguments, message, world):
    result = Launch(stage, *arguments, "--out", "out", cwd=world, ranks=2).wait()
    assert result.status != 0
    ours, elastic, report = result.err.partition("torch/distributed/elastic")
    assert ours.count("error: ") == ours.count(f"error: {message}") == 1
    assert "Traceback" not in ours
    assert elastic
    assert "exitcode  : 2" in report
    assert f"traceback : error: {message}" in report
    assert not (world / "out").exists()


def test_a_recipe_that_changed_nothing_is_resumed(world, forked):
    """The counterpart of a refusal above: what may differ between attempts does not count."""
    arguments = (*TRAIN, "--train.steps", 1, "--train.checkpoint_interval", 0, "--train.lr", 1e-6)
    assert forked("train", *arguments, "--out", "again", cwd=world).status == 0
    more = ("--train.micro_batch_size", 2, "--train.valid_interval", 7, "--resume")
    manifest = world / "again" / artifact.MANIFEST
    before = manifest.read_bytes()
    result = forked("train", *arguments, *more, "--out", "again", cwd=world)
    assert result.status == 0, result.err
    assert "again is complete; --resume has nothing to do" in result.err
    assert manifest.read_bytes() == before
    manifest.unlink()
    result = forked("train", *arguments, *more, "--out", "again", cwd=world)
    assert result.status == 0, result.err
    assert manifest.exists()
    lines = (world / "again" / "metrics.jsonl").read_text().splitlines()
    (record,) = map(json.loads, lines)
    assert record["step"] == 1
    assert record["lr"] == pytest.approx(1e-7)  # a tenth of what was given, not of the default
    shutil.rmtree(world / "again")
