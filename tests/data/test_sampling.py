import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from minitron.data import sampling
from minitron.data.indexed import TokenStream
from minitron.data.sampling import Blend, TokenWindows, permute
from minitron.errors import MinitronError


def test_windows_share_one_token(write_tokens):
    stream = TokenStream(write_tokens([range(10), range(10, 13)]))
    windows = TokenWindows(stream, 4)
    assert [w.tokens.tolist() for w in map(windows.__getitem__, range(3))] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
    ]
    assert not windows.has_remainder
    with pytest.raises(IndexError, match="sample 3 of 3"):
        windows[3]


@pytest.mark.parametrize("num_tokens", [2, 4, 5, 6, 8, 9, 10, 23])
def test_windows_and_remainder_predict_every_token_once(write_tokens, num_tokens):
    windows = TokenWindows(TokenStream(write_tokens([range(num_tokens)])), 4)
    samples = [windows[i].tokens for i in range(len(windows))]
    assert all(len(sample) == 5 for sample in samples)
    if windows.has_remainder:
        samples.append(windows[len(windows)].tokens)
        assert 2 <= len(samples[-1]) <= 4
    labels = np.concatenate([sample[1:] for sample in samples])
    assert labels.tolist() == list(range(1, num_tokens))


def test_too_little_text_is_refused_with_the_arithmetic(write_tokens):
    windows = TokenWindows(TokenStream(write_tokens([range(64)])), 64)
    with pytest.raises(MinitronError, match=r"tokens\.bin has 64 tokens, .*=64 takes 64 \+ 1"):
        Blend([windows])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1025])
def test_permute_is_one_to_one(size):
    for key in ("0", "1"):
        assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


def test_permute_looks_random():
    # Where the first two of ten go, over many keys: 90 pairs, all about equally often.
    pairs = Counter((permute(0, 10, f"{k}"), permute(1, 10, f"{k}")) for k in range(9000))
    chi_squared = sum((count - 100) ** 2 / 100 for count in pairs.values())
    assert len(pairs) == 90
    assert chi_squared < 160  # 89 degrees of freedom: above 160 once in 200,000 tries
    # Neighbours in a large range land far apart, and every part of the range is hit.
    size = 10**9 + 7
    landed = np.array([permute(i, size, "seed/0") for i in range(2000)])
    assert len(set(landed)) == 2000
    assert abs(np.corrcoef(landed[:-1], landed[1:])[0, 1]) < 0.1
    assert np.histogram(landed, bins=10, range=(0, size))[0].min() > 150


def test_permute_never_changes():
    # A resumed run goes on in the order that the interrupted one began, whatever the versions.
    assert [permute(i, 10, "1234/0") for i in range(10)] == [7, 8, 5, 4, 6, 2, 1, 3, 0, 9]


def test_epoch_visits_every_sample_once(write_windows):
    sizes = [5, 1, 7]
    blend = Blend([write_windows(n, name=f"d{i}") for i, n in enumerate(sizes)])
    everything = {(d, s) for d, size in enumerate(sizes) for s in range(size)}
    assert blend.epoch_samples == 13
    epochs = [[blend.locate(13 * e + i, seed=0) for i in range(13)] for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch))
        assert set(epoch) == everything
    assert epochs[0] != epochs[1] != epochs[2]
    assert [blend.locate(i, seed=1) for i in range(13)] != epochs[0]


def test_read_gives_the_tokens_of_the_located_sample(write_windows):
    datasets = [write_windows(3, start=0, name="a"), write_windows(4, start=100, name="b")]
    for blend in (Blend(datasets), Blend(datasets, [Fraction(1), Fraction(3)])):
        for index in range(20):
            dataset, sample = blend.locate(index, seed=3)
            start = 100 * dataset + 4 * sample
            assert blend.read(index, seed=3).tokens.tolist() == list(range(start, start + 5))


def random_weights(rng):
    count = rng.randint(1, 9)
    return [Fraction(rng.choice([rng.randint(1, 5), rng.randint(1, 99)]), 10) for _ in range(count)]


def test_every_prefix_of_a_blend_matches_the_weights(write_windows):
    rng = random.Random(0)
    datasets = [write_windows(n + 1, name=f"d{n}") for n in range(9)]
    for _ in range(25):
        weights = random_weights(rng)
        blend = Blend(datasets[: len(weights)], weights)
        counts = [0] * len(weights)
        for index in range(300):
            counts[blend.locate(index, seed=0)[0]] += 1
            for count, weight in zip(counts, weights, strict=True):
                assert abs(count - (index + 1) * weight / sum(weights)) < 1


def test_unwieldy_weights_are_nearly_exact(write_windows):
    datasets = [write_windows(n + 1, name=f"d{n}") for n in range(3)]
    weights = [Fraction("0.123456789"), Fraction("0.5"), Fraction("1e-9")]
    blend = Blend(datasets, weights)
    samples = 66_000
    counts = Counter(blend.locate(index, seed=0)[0] for index in range(samples))
    for dataset, weight in enumerate(weights):
        assert abs(counts[dataset] / samples - weight / sum(weights)) < 2 / (1 << 16)
    assert counts[2] == 1  # a weight, however small, is not forgotten


def test_blended_dataset_is_used_up_before_it_starts_over(write_windows):
    sizes = [3, 5]
    datasets = [write_windows(n, name=f"d{n}") for n in sizes]
    blend = Blend(datasets, [Fraction("0.7"), Fraction("0.3")])
    drawn = [[], []]
    for index in range(200):
        dataset, sample = blend.locate(index, seed=0)
        drawn[dataset].append(sample)
    for samples, size in zip(drawn, sizes, strict=True):
        epochs = [samples[i : i + size] for i in range(0, len(samples) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_far_samples_are_found_without_the_ones_before(write_windows):
    blend = Blend([write_windows(50), write_windows(70, name="b")], [Fraction(1), Fraction(2)])
    assert blend.locate(10**15, seed=0) == blend.locate(10**15, seed=0)
    assert {blend.locate(10**15 + i, seed=0)[0] for i in range(3)} == {0, 1}


def test_period_is_as_short_as_the_weights_allow():
    assert sampling._integer_shares([Fraction("0.3"), Fraction("0.7")]) == [3, 7]
    assert sampling._integer_shares([Fraction(70), Fraction(30)]) == [7, 3]
    assert sampling._integer_shares([Fraction(2), Fraction(2)]) == [1, 1]
