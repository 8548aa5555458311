"""What is encoded comes back; what a file says is wrong by no more than it claims."""

import numpy as np
import pytest

from minitron.distill.offline.block import (
    MAX_ID,
    decode_draws,
    decode_top_k,
    encode_draws,
    encode_top_k,
)

S, K = 12, 9


def _top_k(vocab_size, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(vocab_size, K, replace=False) for _ in range(S)])
    ids[0, :2] = 0, vocab_size - 1
    logits = 4 * rng.standard_normal((S, K + 1))  # the last stands for all others
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return ids, log_probs[:, :K].astype(np.float32)


@pytest.mark.parametrize("vocab_size", [61, 131_073, MAX_ID + 1])
@pytest.mark.parametrize(("floats", "relative"), [("fp16", 2.0**-11), ("fp32", 2.0**-23)])
def test_top_k(vocab_size, floats, relative):
    ids, log_probs = _top_k(vocab_size)
    ids[3, 4:], log_probs[3, 4:] = -1, -np.inf  # four are possible
    targets = decode_top_k(encode_top_k(ids, log_probs, floats), S, floats)
    assert targets.ids.shape == (S, K)
    for row in range(S):
        known = ids[row] >= 0
        order = np.argsort(ids[row][known])
        count = known.sum()
        assert targets.ids[row].tolist() == [*ids[row][known][order], *[-1] * (K - count)]
        exact = log_probs[row][known][order].astype(np.float64)
        error = np.abs(targets.log_probs[row, :count] - exact)
        assert error.max() <= relative * (np.abs(exact).max() + 4) + 1e-6
        tail, exact_tail = (
            1 - np.exp(x.astype(float)).sum() for x in (targets.log_probs[row, :count], exact)
        )
        assert tail == pytest.approx(exact_tail, rel=0.01, abs=1e-5)
    assert not targets.entropy_excess.any()


def test_rounding_costs_little_divergence():
    """KL of 1,000 distributions from themselves after fp16: the module's claim of 2^-12 entropy."""
    rng = np.random.default_rng(1)
    logits = 3 * rng.standard_normal((1000, 64))
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.tile(np.arange(64), (1000, 1))
    block = encode_top_k(ids, log_probs.astype(np.float32), "fp16")
    found = decode_top_k(block, 1000, "fp16").log_probs.astype(np.float64)
    entropy = -(np.exp(log_probs) * log_probs).sum(1)
    cross = -(np.exp(found) * log_probs).sum(1)
    assert (np.abs(cross - entropy) < 2.0**-11 * (entropy + 1)).all()


@pytest.mark.parametrize("draws", [1, 7, 300])
def test_draws(draws):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 20, (S, draws)) * 50_000, axis=1)
    entropy = rng.random(S) * 3
    targets = decode_draws(encode_draws(ids, entropy, "fp16"), S, draws, "fp16")
    for row in range(S):
        distinct, counts = np.unique(ids[row], return_counts=True)
        assert targets.ids[row, : len(distinct)].tolist() == distinct.tolist()
        assert (targets.ids[row, len(distinct) :] == -1).all()
        probs = counts / draws
        np.testing.assert_allclose(np.exp(targets.log_probs[row, : len(distinct)]), probs, 1e-6)
        excess = -(probs * np.log(probs)).sum() - entropy[row]
        assert targets.entropy_excess[row] == pytest.approx(excess, abs=3e-3)
