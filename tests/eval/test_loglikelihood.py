"""Log-probabilities of continuations against transformers, one by one, on every topology."""

import pytest
import torch

from minitron.eval.loglikelihood import score_continuations
from minitron.model.llama import freeze
from minitron.parallel import initialize
from tests.runs import VOCAB, build_model, run_on
from tests.tiny import save_llama

CONTEXT = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    options = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT}
    return directory, save_llama(directory, **options)


def draw(reference):
    """Contexts and continuations of all lengths, some greedy, some too long for the model."""
    generator = torch.Generator().manual_seed(3)
    requests = []
    for before, after in [(1, 1), (5, 2), (20, 3), (2, 9), (1, CONTEXT), (30, 4), (7, 7)]:
        tokens = torch.randint(VOCAB, (before + after,), generator=generator).tolist()
        requests.append((tokens[:before], tokens[before:]))
    for before, after in [(4, 3), (CONTEXT, 1)]:
        tokens = torch.randint(VOCAB, (before,), generator=generator).tolist()
        for _ in range(after):
            with torch.no_grad():
                tokens.append(reference(torch.tensor([tokens])).logits[0, -1].argmax().item())
        requests.append((tokens[:before], tokens[before:]))
    return requests


def by_definition(reference, context, continuation):
    tokens = torch.tensor([*context, *continuation])[-(CONTEXT + 1) :]
    with torch.no_grad():
        logits = reference(tokens[None, :-1]).logits[0].double()
    rows, expected = logits[-len(continuation) :], tokens[-len(continuation) :]
    score = rows.log_softmax(-1).gather(1, expected[:, None]).sum()
    return score.item(), torch.equal(rows.argmax(-1), expected)


def _score(parallel, directory, requests, micro_batch_size):
    model = freeze(build_model(directory, initialize(parallel)))
    return score_continuations(model, requests, micro_batch_size=micro_batch_size)


@pytest.mark.parametrize(
    ("topology", "micro_batch_size"),
    [("tp1", 1), ("tp1", 20), ("tp2", 2), ("tp2+sp", 4), ("pp2", 1), ("dp2", 2), ("tp2+sp pp2", 2)],
)
def test_scores_are_those_of_the_definition(model, topology, micro_batch_size):
    directory, reference = model
    requests = draw(reference)
    ranks = run_on(topology, _score, directory, requests, micro_batch_size)
    assert all(found == ranks[0] for found in ranks)
    expected = [by_definition(reference, *request) for request in requests]
    assert [greedy for _, greedy in expected].count(True) >= 2
    for (score, greedy), (expected_score, expected_greedy) in zip(ranks[0], expected, strict=True):
        assert score == pytest.approx(expected_score, rel=1e-5)
        assert greedy == expected_greedy


def test_no_requests(model):
    assert run_on("dp2", _score, model[0], [], 2) == [[], []]
