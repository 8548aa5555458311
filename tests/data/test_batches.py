from fractions import Fraction

import numpy as np
import pytest
import torch

from minitron.data.batches import EvalBatches, TrainBatches, open_train, open_windows, prepare_data
from minitron.data.indexed import TokenStream
from minitron.data.preprocess import preprocess
from minitron.data.sampling import Blend, TokenWindows
from minitron.data.tokenizer import load_tokenizer
from minitron.errors import MinitronError
from minitron.sections.data import DataConfig


def train_batches(source, rank=0, size=1, *, micro=2, total=8, seed=5):
    return TrainBatches(
        source,
        global_batch_size=total,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        seed=seed,
    )


def eval_batches(windows, rank=0, size=1, *, micro=2, remainder=True, max_samples=None):
    return EvalBatches(
        windows,
        micro_batch_size=micro,
        data_parallel_rank=rank,
        data_parallel_size=size,
        include_remainder=remainder,
        max_samples=max_samples,
    )


def test_training_batch_holds_inputs_and_next_tokens(write_windows):
    source = Blend([write_windows(9)])
    batches = train_batches(source)
    assert (batches.num_microbatches, batches.seq_length) == (4, 4)
    for number, batch in enumerate(batches.microbatches(3 * 8)):
        for row in range(2):
            sample = source.read(3 * 8 + number * 2 + row, seed=5).tokens
            assert batch.tokens[row].tolist() == sample[:-1].tolist()
            assert batch.labels[row].tolist() == sample[1:].tolist()
        assert batch.tokens.dtype == batch.labels.dtype == batch.position_ids.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.float32
        assert batch.loss_mask.eq(1).all()
        assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
        assert batch.valid.tolist() == [True, True]


def test_a_sample_has_one_name_in_any_batch(write_windows):
    sources = [write_windows(5), write_windows(4, start=50, name="b")]
    streams = {window.stream.fingerprint: window for window in sources}
    assert len(streams) == 2
    named = {}
    for seed, micro, ranks in ((5, 2, 1), (6, 1, 2), (7, 3, 1)):
        for rank in range(ranks):
            batches = train_batches(Blend(sources), rank, ranks, micro=micro, total=6, seed=seed)
            for batch in [*batches.microbatches(0), *batches.microbatches(1)]:
                for (stream, number), tokens in zip(
                    batch.sample_ids.tolist(), batch.tokens, strict=True
                ):
                    assert streams[stream][number].tokens[:-1].tolist() == tokens.tolist()
                    named[stream, number] = tokens
    assert len(named) == 9
    for batch in eval_batches(sources, micro=4, remainder=False):
        for name, tokens, valid in zip(
            batch.sample_ids.tolist(), batch.tokens, batch.valid, strict=True
        ):
            assert named[tuple(name)].equal(tokens) if valid else name == [-1, -1]


def test_batch_moves_to_a_device(write_windows):
    batch = next(train_batches(Blend([write_windows(9)])).microbatches(0))
    moved = batch.to(torch.device("meta"))
    for name in ("tokens", "labels", "loss_mask", "position_ids", "valid"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("weights", [None, [Fraction(1), Fraction(2)]])
def test_ranks_together_read_the_global_batch(write_windows, size, weights):
    source = Blend([write_windows(9), write_windows(5, start=50, name="b")], weights)
    for step in (0, 1, 7):
        expected = [source.read(step * 8 + j, seed=5).tokens[0] for j in range(8)]
        ranks = [list(train_batches(source, r, size).microbatches(step * 8)) for r in range(size)]
        rows = [
            batch.tokens[row, 0].item()
            for number in range(8 // (2 * size))
            for batch in (rank[number] for rank in ranks)
            for row in range(2)
        ]
        assert rows == expected


def test_one_epoch_of_steps_reads_every_sample_once(write_windows):
    batches = train_batches(Blend([write_windows(24)]))
    first_tokens = [
        token
        for k in range(3)
        for b in batches.microbatches(k * 8)
        for token in b.tokens[:, 0].tolist()
    ]
    assert sorted(first_tokens) == [4 * i for i in range(24)]
    assert first_tokens != sorted(first_tokens)


def test_indivisible_batch_is_refused_with_the_arithmetic(write_windows):
    source = Blend([write_windows(9)])
    with pytest.raises(MinitronError, match=r"=10 is not .* = 2 x 2 = 4; use 8 or 12"):
        train_batches(source, 0, 2, total=10)
    with pytest.raises(MinitronError, match=r"=3 is not .* = 2 x 2 = 4; use 4"):
        train_batches(source, 0, 2, total=3)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_evaluation_predicts_every_token_once_in_order(write_windows, size, remainder, micro):
    windows = [
        write_windows(5, extra=2),
        write_windows(3, start=100, name="b"),
        write_windows(2, start=200, extra=3, name="c"),
    ]
    expected = [*range(1, 21 + 2 * remainder), *range(101, 113), *range(201, 209 + 3 * remainder)]
    loaders = [
        eval_batches(windows, r, size, micro=micro, remainder=remainder) for r in range(size)
    ]
    ranks = [list(loader) for loader in loaders]
    assert {len(batches) for batches in ranks} == {len(loaders[0])}
    labels, num_valid = [], 0
    for number in range(len(loaders[0])):
        for batch in (rank[number] for rank in ranks):
            assert batch.tokens.shape == (micro, 4)
            mask = batch.loss_mask.bool()
            labels += batch.labels[mask].tolist()
            assert (batch.labels - batch.tokens)[mask].eq(1).all()
            assert not batch.tokens[~mask].any()
            assert torch.equal(mask.any(1), batch.valid)
            num_valid += int(batch.valid.sum())
    assert labels == expected
    assert num_valid == loaders[0].num_samples == 10 + 2 * remainder


def test_evaluation_stops_at_max_samples(write_windows):
    windows = [write_windows(3), write_windows(3, start=100, name="b")]
    firsts = []
    for rank in range(2):
        loader = eval_batches(windows, rank, 2, micro=1, max_samples=4)
        assert (loader.num_samples, len(loader)) == (4, 2)
        firsts += [batch.tokens[0, 0].item() for batch in loader]
    assert sorted(firsts) == [0, 4, 8, 100]
    assert eval_batches(windows, max_samples=100).num_samples == 6


def test_evaluation_takes_text_shorter_than_a_sample(write_tokens):
    windows = [TokenWindows(TokenStream(write_tokens([[7, 8, 9]])), 8)]
    (batch,) = eval_batches(windows)
    assert batch.labels[0].tolist() == [8, 9, 0, 0, 0, 0, 0, 0]
    assert batch.loss_mask.tolist() == [[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    with pytest.raises(MinitronError, match="has 3 tokens"):
        eval_batches(windows, remainder=False)
    windows = [TokenWindows(TokenStream(write_tokens([[7]])), 8)]
    with pytest.raises(MinitronError, match="has 1 tokens"):
        eval_batches(windows)


def test_nothing_to_evaluate_is_no_batches():
    assert len(eval_batches([])) == 0
    assert list(eval_batches([])) == []


def test_text_and_tokens_are_prepared_and_opened(
    documents, sentencepiece_dir, write_tokens, tmp_path, monkeypatch
):
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    tokenizer = load_tokenizer(sentencepiece_dir)
    (tmp_path / "a.txt").write_text(documents[0])
    tokens = write_tokens([np.arange(500)])
    config = DataConfig(
        path=[f"0.25:{tmp_path / 'a.txt'}", f"3:{tokens}.bin"],
        valid_path=[str(tmp_path / "a.txt")],
        seq_length=16,
    )
    prepared = prepare_data(config, tokenizer, vocab_size=tokenizer.vocab_size)
    assert prepared.path[0].startswith(f"0.25:{tmp_path / 'cache'}")
    assert prepared.path[1] == f"3:{tokens}"
    assert prepared.valid_path == [prepared.path[0].removeprefix("0.25:")]
    assert prepare_data(prepared, tokenizer, vocab_size=600) == prepared

    source = open_train(prepared)
    drawn = [source.locate(i, seed=0)[0] for i in range(13)]
    assert (drawn.count(0), drawn.count(1)) == (1, 12)
    (windows,) = open_windows(prepared.valid_path, prepared.seq_length)
    assert (
        tokenizer.decode(windows[0].tokens[:16].tolist())
        == documents[0][: len(tokenizer.decode(windows[0].tokens[:16].tolist()))]
    )


def test_unweighted_paths_are_one_dataset(write_windows):
    windows = [write_windows(2, name="a"), write_windows(6, name="b")]
    config = DataConfig(path=[str(w.stream.prefix) for w in windows], seq_length=4)
    source = open_train(prepare_data(config, None, vocab_size=100))
    drawn = [source.locate(i, seed=0)[0] for i in range(8)]
    assert (drawn.count(0), drawn.count(1)) == (2, 6)


def test_data_the_model_cannot_read_is_refused(
    documents, sentencepiece_dir, hugging_face_dir, write_tokens, tmp_path
):
    tokens = write_tokens([[1, 2], [3, 99]])
    for key in ("path", "valid_path"):
        good = write_tokens([[1] * 30], name="good")
        config = DataConfig(**{"path": [str(good)], key: [str(tokens)]})
        with pytest.raises(MinitronError, match=r"tokens\.bin: token 3, in document 1 .* id 99"):
            prepare_data(config, None, vocab_size=99)
        prepare_data(config, None, vocab_size=100)
    (tmp_path / "a.txt").write_text(documents[0])
    preprocess([tmp_path / "a.txt"], load_tokenizer(sentencepiece_dir), tmp_path / "a", workers=1)
    with pytest.raises(MinitronError, match="was tokenised with"):
        prepare_data(
            DataConfig(path=[str(tmp_path / "a")]),
            load_tokenizer(hugging_face_dir),
            vocab_size=10**6,
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": []}, r"data\.path is empty"),
        ({"path": ["0.5:a", "b"]}, r"weights for some paths only; write all as WEIGHT:PATH"),
        ({"path": ["0:a", "1:b"]}, r"data\.path=0:a has weight 0.0; .* above 0"),
        ({"path": ["-0.5:a"]}, r"weight -0.5; "),
        ({"path": ["a"], "valid_path": ["1:b"]}, r"data\.valid_path=1:b has a weight"),
        ({"path": ["a"], "seq_length": 0}, r"data\.seq_length=0 must be at least 1"),
        ({"path": ["a"], "workers": 0}, r"data\.workers=0 must be"),
        ({"path": ["a"], "valid_samples": 0}, r"data\.valid_samples=0 must be"),
    ],
)
def test_config_mistakes_are_refused(values, message):
    with pytest.raises(MinitronError, match=message):
        DataConfig(**values)


def test_weights_are_refused_where_data_is_read_in_order():
    with pytest.raises(MinitronError, match=r"data\.path=2:a has a weight, .* give the path alone"):
        open_windows(["2:a"], 8)


def test_colon_without_a_number_is_part_of_the_path():
    assert DataConfig(path=["s3:bucket", "c:/x"]).path == ["s3:bucket", "c:/x"]
