"""Reading a store by names of samples, and refusing what is not what it says."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minitron import artifact
from minitron.data.batches import EvalBatches, TrainBatches, open_train, open_windows
from minitron.distill.offline.block import encode_top_k
from minitron.distill.offline.cache import close_store, describe, open_store
from minitron.distill.offline.files import (
    SAMPLES,
    STORE,
    shard_path,
    split_key,
    tokens_checksum,
    write_shard,
)
from minitron.distill.offline.samples import choose_samples
from minitron.distill.offline.store import LogitStore
from minitron.errors import MinitronError
from minitron.sections.data import DataConfig
from minitron.sections.distill import CacheConfig
from tests.runs import SEQ_LENGTH, write_tokens

SEED = 3
K = 4
VOCAB = 301


def ids_of(sample_id):
    """What the store of these tests says of a sample: a function of its name."""
    gaps = np.random.default_rng(sample_id).integers(1, 50, (SEQ_LENGTH, K))
    return gaps.cumsum(1)


def write(root, data, *, max_samples=None):
    """A store of made-up targets."""
    out = root / "store"
    samples = choose_samples(data, max_samples=max_samples, seed=SEED)
    (root / "teacher").mkdir(exist_ok=True)
    (root / "teacher" / "config.json").write_text("{}")
    info = describe(
        samples,
        CacheConfig(top_k=K),
        teacher=root / "teacher",
        tokenizer=SimpleNamespace(fingerprint="speaks_a", vocab_size=VOCAB - 1),
        vocab_size=VOCAB,
        precision="fp32",
        seed=SEED,
    )
    open_store(out, info, samples)
    log_probs = np.log(np.full((SEQ_LENGTH, K), 0.2, np.float32))
    for number, key in enumerate(samples.keys.tolist()):
        tokens, _, sample_id = samples.read(key)
        block = encode_top_k(ids_of(sample_id), log_probs, "fp16")
        write_shard(shard_path(out, number), [(block, tokens_checksum(tokens[:-1]))])
    close_store(out, info)
    artifact.write_manifest(out, stage="cache_logits", recipe={}, parents={})
    return out


@pytest.fixture
def data(tmp_path):
    write_tokens(tmp_path / "train", 7 * SEQ_LENGTH + 1)
    write_tokens(tmp_path / "more", 5 * SEQ_LENGTH + 1, seed=1)
    write_tokens(tmp_path / "valid", 4 * SEQ_LENGTH + 1, seed=2)
    return DataConfig(
        path=[str(tmp_path / "train"), str(tmp_path / "more")],
        valid_path=[str(tmp_path / "valid")],
        seq_length=SEQ_LENGTH,
    )


def train_batches(data, *, seed=SEED):
    return TrainBatches(
        open_train(data),
        global_batch_size=4,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=1,
        seed=seed,
    )


def eval_batches(data):
    return EvalBatches(
        open_windows(data.valid_path, data.seq_length),
        micro_batch_size=3,
        data_parallel_rank=0,
        data_parallel_size=1,
        include_remainder=False,
    )


def read_all(store, batches):
    for batch in batches:
        names = batch.sample_ids[batch.valid].tolist()
        for name, tokens in zip(names, batch.tokens.numpy(), strict=False):
            targets = store.read(tuple(name), tokens)
            assert targets.ids.tolist() == ids_of(tuple(name)).tolist()
            np.testing.assert_allclose(targets.log_probs, np.log(0.2), rtol=1e-3)


def test_samples_are_found_in_any_order(tmp_path, data):
    store = LogitStore(write(tmp_path, data))
    assert store.info.num_samples == 16
    assert store.info.tokenizer_vocab_size == VOCAB - 1
    for seed in (SEED, 8):
        batches = train_batches(data, seed=seed)
        store.check_holds(batches, eval_batches(data), num_samples=1000)
        read_all(store, batches.microbatches(5))
    read_all(store, eval_batches(data))


def test_same_tokens_under_another_path_are_the_same_samples(tmp_path, data):
    store = LogitStore(write(tmp_path, data))
    write_tokens(tmp_path / "copy", 7 * SEQ_LENGTH + 1)
    copy = DataConfig(path=[str(tmp_path / "copy")], seq_length=SEQ_LENGTH)
    read_all(store, train_batches(copy).microbatches(0))


def test_a_store_of_the_first_samples_serves_that_run_alone(tmp_path, data):
    store = LogitStore(write(tmp_path, data, max_samples=6))
    assert store.info.num_samples == 6 + 4
    store.check_holds(train_batches(data), eval_batches(data), num_samples=6)
    for first in (0, 2):
        read_all(store, train_batches(data).microbatches(first))
    message = (
        r"store lacks sample \d+ of .*(train|more), of whose [75] samples it holds \d; .* raise "
        r"cache\.max_samples, or train with the same seed on no more samples"
    )
    with pytest.raises(MinitronError, match=message):
        store.check_holds(train_batches(data), None, num_samples=7)
    with pytest.raises(MinitronError, match=message):
        store.check_holds(train_batches(data, seed=8), None, num_samples=6)


def test_other_data_is_refused(tmp_path, data):
    store = LogitStore(write(tmp_path, data))
    write_tokens(tmp_path / "other", 7 * SEQ_LENGTH + 1, seed=9)
    other = DataConfig(path=[str(tmp_path / "other")], seq_length=SEQ_LENGTH)
    batches = train_batches(other)
    stream = f"{batches.source.datasets[0].stream.fingerprint:016x}"
    message = rf"holds nothing of the token stream {stream} .* made of .*/train \("
    with pytest.raises(MinitronError, match=message):
        store.check_holds(batches, None, num_samples=1)
    batch = next(train_batches(data).microbatches(0))
    (name, *_), tokens = batch.sample_ids.tolist(), batch.tokens[0].numpy().copy()
    tokens[3] += 1
    message = (
        rf"made of other tokens than the data holds: those of sample {name[1]} of .* have checksum "
        r"[0-9a-f]{8}, the teacher's [0-9a-f]{8}; give the same data or cache the logits again"
    )
    with pytest.raises(MinitronError, match=message):
        store.read(tuple(name), tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "speaks_b"}, r"with tokenizer speaks_a, the student's is speaks_b; give"),
        ({"seq_length": 8}, r"samples of 16 tokens, but data\.seq_length=8; use 16"),
        ({"temperature": 2.0}, r"cache\.temperature=1\.0, but distill\.temperature=2\.0; use 1\.0"),
    ],
)
def test_another_student_is_refused(tmp_path, data, change, message):
    store = LogitStore(write(tmp_path, data))
    fitting = {
        "tokenizer": "speaks_a",
        "seq_length": SEQ_LENGTH,
        "temperature": 1.0,
    }
    store.check(**fitting)
    store.check(**fitting | {"tokenizer": None})
    with pytest.raises(MinitronError, match=message):
        store.check(**fitting | change)


def flip_a_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def test_every_flipped_bit_is_found(tmp_path, data):
    out = write(tmp_path, data)
    samples = choose_samples(data, max_samples=None, seed=SEED)
    tokens, _, sample_id = samples.read(int(samples.keys[2]))
    shard = shard_path(out, 2)
    size = shard.stat().st_size
    for at in range(size):
        flip_a_bit(shard, at)
        with pytest.raises(MinitronError, match=r"00002\.bin is damaged: .*; copy the store again"):
            LogitStore(out).read(sample_id, tokens[:-1])
        flip_a_bit(shard, at)
    LogitStore(out).read(sample_id, tokens[:-1])


def test_files_that_are_missing_or_cut_short_are_named(tmp_path, data):
    out = write(tmp_path, data)
    shard = shard_path(out, 3)
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    size = len(content)
    message = rf"00003\.bin has {size - 1} bytes, but store\.json says {size} bytes; copy the store"
    with pytest.raises(MinitronError, match=message):
        LogitStore(out)
    shard.unlink()
    with pytest.raises(MinitronError, match=r"00003\.bin is missing, but store\.json says \d+ by"):
        LogitStore(out)
    shard.write_bytes(content)
    keys = (out / SAMPLES).read_bytes()
    for damaged in (keys[:-3], keys[:-1] + b"\x01", b""):
        (out / SAMPLES).write_bytes(damaged)
        with pytest.raises(MinitronError, match=r"samples\.npy is missing or damaged: .* copy the"):
            LogitStore(out)
    (out / SAMPLES).write_bytes(keys)
    LogitStore(out)


def test_what_is_no_store_is_refused(tmp_path, data):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        MinitronError, match=r"empty is no store .* \(it has no store\.json\); give"
    ):
        LogitStore(tmp_path / "empty")
    out = write(tmp_path, data)
    text = (out / STORE).read_text()
    (out / STORE).write_text(text.replace('"version": 2', '"version": 1'))
    with pytest.raises(MinitronError, match=r"has version 1, known is 2; write the store again"):
        LogitStore(out)
    (out / STORE).write_text(re.sub('"seq_length"', '"length"', text))
    with pytest.raises(MinitronError, match=r"store\.json is not what minitron wrote \(.*length"):
        LogitStore(out)


def test_keys_are_streams_and_numbers():
    samples = np.array([0, 5, (3 << 40) + 7])
    streams, numbers = split_key(samples)
    assert (streams.tolist(), numbers.tolist()) == ([0, 0, 3], [0, 5, 7])
