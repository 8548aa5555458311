"""Evaluation against transformers, token by token, on every topology."""

import pytest
import torch
import torch.nn.functional as F

from minitron.data.batches import EvalBatches, open_windows
from minitron.data.indexed import TokenStream
from minitron.eval.perplexity import evaluate
from minitron.parallel import initialize
from minitron.train.objective import LanguageModeling
from tests.runs import SEQ_LENGTH, VOCAB, build_chunks_of, run_on, write_tokens
from tests.tiny import save_llama

# Ten whole samples and two shorter ones.
LENGTHS = (7 * SEQ_LENGTH + 6, 3 * SEQ_LENGTH + 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    return directory, save_llama(directory, vocab_size=VOCAB, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    return [
        str(write_tokens(directory / f"{i}", length, seed=i)) for i, length in enumerate(LENGTHS)
    ]


def _expected(model, prefixes):
    """Mean cross-entropy of every token but the first of each file."""
    total, count = 0.0, 0
    for prefix in prefixes:
        stream = TokenStream(prefix)
        tokens = torch.from_numpy(stream.read(0, stream.num_tokens))
        for start in range(0, len(tokens) - 1, SEQ_LENGTH):
            sample = tokens[start : start + SEQ_LENGTH + 1]
            with torch.no_grad():
                logits = model(sample[None, :-1]).logits[0].double()
            total += F.cross_entropy(logits, sample[1:], reduction="sum").item()
            count += len(sample) - 1
    assert count == sum(LENGTHS) - len(LENGTHS)
    return total / count, count


def _evaluate(parallel, directory, prefixes, micro_batch_size, training):
    topology = initialize(parallel)
    model = [chunk.train(training) for chunk in build_chunks_of(directory, topology)]
    batches = EvalBatches(
        open_windows(prefixes, SEQ_LENGTH),
        micro_batch_size=micro_batch_size,
        data_parallel_rank=topology.dp_rank,
        data_parallel_size=topology.dp_size,
        include_remainder=True,
    )
    objective = LanguageModeling()
    means = evaluate(model, batches, objective.validation, objective.validation_losses)
    assert all(chunk.training == training for chunk in model)
    assert not any(p.grad is not None for chunk in model for p in chunk.parameters())
    return means


@pytest.mark.parametrize(
    ("topology", "micro_batch_size"),
    [
        ("tp1", 1),  # three groups of micro-batches, the last one smaller
        ("tp1", 5),  # three rows of padding
        ("tp2+sp", 5),
        ("pp2", 1),
        ("pp2 vpp2", 5),  # three micro-batches for groups of two
        ("dp2", 5),  # the second rank's last micro-batch is all padding
        ("dp2", 7),
        ("tp2 dp2", 3),
        ("pp2 dp2", 5),
    ],
)
def test_every_token_counts_once(model, prefixes, topology, micro_batch_size):
    directory, reference = model
    expected, count = _expected(reference, prefixes)
    training = topology == "tp1"
    ranks = run_on(topology, _evaluate, directory, prefixes, micro_batch_size, training)
    for means in ranks:
        assert means == ranks[0]
        assert means["tokens"] == count
        assert means["val_loss"] == pytest.approx(expected, rel=1e-6)
