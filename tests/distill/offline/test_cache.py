"""Stores that ranks write, against plain PyTorch and against each other."""

import io
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minitron import artifact, metrics
from minitron.data.indexed import TokenStream
from minitron.data.sampling import Blend, TokenWindows
from minitron.distill.offline import cache as cache_module
from minitron.distill.offline.cache import check_vocabulary, draw_uniform, open_store
from minitron.distill.offline.earlier import take_over
from minitron.distill.offline.files import shard_path, split_key
from minitron.distill.offline.samples import choose_samples
from minitron.distill.offline.store import LogitStore
from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from tests.distill.offline.stores import describe_store, write_store
from tests.runs import SEQ_LENGTH, VOCAB, run_on, write_tokens
from tests.tiny import save_llama

SEED = 7
DRAWS = CacheConfig(draws=20)
TOP_K = CacheConfig(top_k=5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model = save_llama(root / "teacher", vocab_size=VOCAB)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # distributions with a few likely tokens
    model.save_pretrained(root / "teacher")
    write_tokens(root / "train", 7 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 4 * SEQ_LENGTH + 1, seed=1)
    data = DataConfig(
        path=[str(root / "train")],
        valid_path=[str(root / "valid")],
        valid_samples=3,
        seq_length=SEQ_LENGTH,
    )
    return root, model, data


def _store(world, out, topology, cache, *, resume=False):
    root, _, data = world
    run_on(topology, write_store, root / "teacher", data, cache, out, SEED, resume)
    return LogitStore(out)


def _shards(store):
    return [shard_path(store.path, n).read_bytes() for n in range(store.info.num_shards)]


def _targets(store, data):
    for prefix, count in ((data.path[0], 7), (data.valid_path[0], 3)):
        windows = TokenWindows(TokenStream(prefix), SEQ_LENGTH)
        for number in range(count):
            tokens = windows[number].tokens[:-1]
            yield windows.sample_id(number), tokens, store.read(windows.sample_id(number), tokens)


def _log_probs(model, tokens, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)[None]).logits[0].double()
    return F.log_softmax(logits / temperature, -1)


@pytest.mark.parametrize("topology", ["tp1", "tp2+sp", "pp2", "dp2", "tp2 pp2"])
def test_top_k(world, tmp_path, topology):
    _, model, data = world
    cache = CacheConfig(top_k=5, temperature=1.3, micro_batch_size=2)
    store = _store(world, tmp_path / "store", topology, cache)
    assert store.info.num_samples == 10
    for _, tokens, targets in _targets(store, data):
        expected = _log_probs(model, tokens, 1.3).topk(5)
        ids = expected.indices.sort(-1).values
        assert targets.ids.tolist() == ids.tolist()
        order = expected.indices.argsort(-1)
        exact = expected.values.gather(-1, order).numpy()
        np.testing.assert_allclose(targets.log_probs, exact, rtol=2**-11, atol=4e-3)


@pytest.mark.parametrize("topology", ["tp1", "tp2", "pp2 dp2"])
def test_draws(world, tmp_path, topology):
    _, model, data = world
    store = _store(world, tmp_path / "store", topology, DRAWS)
    wrong = 0
    for sample_id, tokens, targets in _targets(store, data):
        log_q = _log_probs(model, tokens)
        uniform = torch.from_numpy(draw_uniform(SEED, sample_id, SEQ_LENGTH))
        where = (torch.arange(20) + uniform[:, None]) / 20
        drawn = (log_q.exp().cumsum(-1)[:, None] <= where[..., None]).sum(-1)
        counts = F.one_hot(drawn, VOCAB).sum(1)
        found = torch.zeros(SEQ_LENGTH, VOCAB + 1, dtype=torch.int64)
        weights = torch.from_numpy(np.exp(targets.log_probs) * 20).round().long()
        found.scatter_(1, torch.from_numpy(targets.ids) % (VOCAB + 1), weights)
        wrong += int((found[:, :VOCAB] != counts).any(-1).sum())
        entropy = -(log_q.exp() * log_q).sum(-1).numpy()
        own = -(np.exp(targets.log_probs) * targets.log_probs.clip(min=-99)).sum(1)
        np.testing.assert_allclose(own - targets.entropy_excess, entropy, atol=3e-3)
    assert wrong <= 1  # where a draw falls on an edge, rounding decides


@pytest.mark.parametrize("cache", [TOP_K, DRAWS], ids=["top_k", "draws"])
def test_layers_and_replicas_change_no_byte(world, tmp_path, cache):
    shards = _shards(_store(world, tmp_path / "one", "tp1", cache))
    for topology in ("pp2", "dp2"):
        assert _shards(_store(world, tmp_path / topology, topology, cache)) == shards


@pytest.mark.parametrize("cache", [TOP_K, DRAWS], ids=["top_k", "draws"])
def test_an_interrupted_store_is_finished_by_other_ranks(world, tmp_path, cache):
    whole = _shards(_store(world, tmp_path / "whole", "dp2", cache))
    out = tmp_path / "store"
    _store(world, out, "tp1", cache)
    (out / artifact.MANIFEST).unlink()
    kept = shard_path(out, 4)
    before = kept.stat().st_mtime_ns
    for number in (0, 3, 9):
        shard_path(out, number).unlink()
    with pytest.raises(MinitronError, match=r"store is not complete; finish it with .* --resume"):
        LogitStore(out)
    store = _store(world, out, "dp2", cache, resume=True)
    assert _shards(store) == whole
    assert kept.stat().st_mtime_ns == before


def test_another_store_is_not_continued(world, tmp_path):
    root, _, data = world
    out = tmp_path / "store"
    _store(world, out, "tp1", TOP_K)
    arguments = (root / "teacher", data)
    message = r"--resume would continue another store .*; take the old values or another --out"
    with pytest.raises(AssertionError, match=rf"{message}") as error:
        run_on("tp1", write_store, *arguments, CacheConfig(top_k=6), out, 8, True)
    assert "seed: 7 -> 8; top_k: 5 -> 6;" in str(error.value)


def _count_samples(parallel, *arguments):
    """Write a store; how many samples this rank's part of the teacher has seen."""
    with mock.patch.object(cache_module, "run_schedule", wraps=cache_module.run_schedule) as runs:
        write_store(parallel, *arguments)
    return sum(int(batch.valid.sum()) for call in runs.call_args_list for batch in call.args[1])


@pytest.mark.parametrize(
    ("cache", "topology", "seen"), [(TOP_K, "pp2 dp2", 2 * 4), (DRAWS, "tp1", 4)]
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_complete_store_is_extended(world, tmp_path, cache, topology, seen, interrupted):
    """The larger one is byte for byte what it would be at once, and the teacher sees the rest."""
    root, _, data = world
    whole = _store(world, tmp_path / "whole", "tp1", cache)
    out = tmp_path / "store"
    part = _store(world, out, "tp1", replace(cache, max_samples=3))
    assert part.info.num_samples == 6
    if interrupted:
        samples, info = describe_store(root / "teacher", data, cache, SEED)
        take_over(out, info, samples)
        open_store(out, info, samples)
    arguments = (root / "teacher", data, cache, out, SEED, True)
    assert sum(run_on(topology, _count_samples, *arguments)) == seen
    store = LogitStore(out)
    assert store.info.num_samples == 10
    assert _shards(store) == _shards(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "whole"]


def test_what_is_not_more_of_the_same_is_refused(world, tmp_path):
    root, _, data = world
    out = tmp_path / "store"

    def refusal(cache, data=data):
        samples, info = describe_store(root / "teacher", data, cache, SEED)
        with pytest.raises(MinitronError) as caught:
            take_over(out, info, samples)
        return str(caught.value)

    part = replace(TOP_K, max_samples=3)
    _store(world, out, "tp1", part)
    train = next(i for i, s in enumerate(LogitStore(out).info.streams) if s.num_windows == 7)
    remedy = "take the old values or another --out"
    another = f"--resume would continue another store than {out / 'store.json'}: "
    assert refusal(replace(part, max_samples=2)) == (
        f"{another}streams.{train}.num_samples: 3 -> 2; {remedy}"
    )
    assert "top_k: 5 -> 6; " in refusal(CacheConfig(top_k=6))
    assert refusal(TOP_K, replace(data, valid_path=[])).startswith(f"{another}streams.0.")
    (out / artifact.MANIFEST).unlink()
    assert refusal(TOP_K) == (
        f"--resume would extend {out}, which is not complete: streams.{train}.num_samples: "
        "3 -> 7; first finish it with the old values"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_samples_of_a_run_are_chosen_in_its_order(world):
    _, _, data = world
    samples = choose_samples(data, max_samples=4, seed=SEED)
    fingerprints = [windows.stream.fingerprint for windows in samples.streams]
    named = {(fingerprints[s], n) for s, n in map(split_key, samples.keys.tolist())}
    train = TokenWindows(TokenStream(data.path[0]), SEQ_LENGTH)
    valid = TokenWindows(TokenStream(data.valid_path[0]), SEQ_LENGTH)
    blend = Blend([train])
    visited = {blend.sample_id(index, seed=SEED) for index in range(4)}
    assert named == visited | {valid.sample_id(n) for n in range(3)}
    assert len(choose_samples(data, max_samples=70, seed=SEED).keys) == 10


def test_choosing_samples_is_said_to_end(world, monkeypatch):
    said = []
    monkeypatch.setattr(metrics, "log", said.append)
    monkeypatch.setattr(metrics.sys, "stderr", io.StringIO())
    choose_samples(world[2], max_samples=6, seed=SEED)
    assert ["choosing samples: 100%, 6/6 samples" in line for line in said] == [True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"give either --cache\.top_k or --cache\.draws; neither was given"),
        ({"top_k": 1, "draws": 1}, r"give either .*; both were given"),
        ({"top_k": 0}, r"cache\.top_k=0 must be at least 1"),
        ({"draws": 0}, r"cache\.draws=0 must be at least 1"),
        ({"draws": 65536}, r"cache\.draws=65536 must be below 65536"),
        ({"top_k": 1, "max_samples": 0}, r"cache\.max_samples=0 must be at least 1"),
        ({"top_k": 1, "micro_batch_size": 0}, r"cache\.micro_batch_size=0 must be at least 1"),
        ({"top_k": 1, "temperature": 0.0}, r"cache\.temperature=0.0 must be positive"),
    ],
)
def test_config_mistakes_are_refused(values, message):
    with pytest.raises(MinitronError, match=message):
        CacheConfig(**values)


def test_a_vocabulary_that_is_too_small_or_too_large_is_refused():
    message = r"cache\.top_k=5 is more than the teacher's vocabulary of 4; lower it"
    with pytest.raises(MinitronError, match=message):
        check_vocabulary(TOP_K, 4)
    with pytest.raises(MinitronError, match=r"vocabulary of 16777217 is above 16777216"):
        check_vocabulary(TOP_K, (1 << 24) + 1)
