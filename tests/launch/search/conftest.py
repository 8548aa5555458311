"""One search of four shapes, for all tests of launch/search.py."""

import pytest

from minitron import artifact
from tests.launch.search.searching import call
from tests.prune.scored import save_random
from tests.runs import SEQ_LENGTH, VOCAB, write_tokens
from tests.tiny import save_llama


@pytest.fixture(scope="package")
def inputs(tmp_path_factory):
    """A model, its scores and the arguments of a search that race three of four shapes."""
    root = tmp_path_factory.mktemp("inputs")
    model, scores = root / "model", root / "scores"
    save_llama(model, vocab_size=VOCAB)
    scores.mkdir()
    save_random(scores, model)
    artifact.write_manifest(scores, stage="importance", recipe={}, parents={"model": model})
    write_tokens(root / "train", 23 * SEQ_LENGTH + 1)
    write_tokens(root / "valid", 6 * SEQ_LENGTH + 1, seed=1)
    training = (
        "--data.path", root / "train", "--data.valid_path", root / "valid",
        "--data.seq_length", SEQ_LENGTH, "--train.steps", 4, "--train.global_batch_size", 4,
        "--train.lr", 3e-3, "--train.adam_eps", 1e-6, "--train.valid_interval", 3,
        "--train.checkpoint_interval", 1,
    )  # fmt: skip
    search = (
        "--model", model, "--model.allow_untrained", "--scores", scores, "--grid.num_layers", 2, 4,
        "--grid.ffn_hidden_size", 16, 48, "--grid.hidden_size", 16, "--budget.params", 2.5e4,
        "--race.entrants", 3, "--race.rungs", 2,
    )  # fmt: skip
    return root, model, scores, training, (*search, *training)


@pytest.fixture(scope="package")
def searched(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "out"
    call("search", *inputs[-1], "--out", out)
    return out
