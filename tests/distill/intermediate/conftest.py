"""A student and a teacher of other depth and width, for every test of intermediate losses."""

import pytest

from minitron.sections.distill import IntermediateConfig, TeacherConfig
from tests.distill.intermediate.one_step import ALL_STATES, LAYERS, ONE_STEP
from tests.runs import SEQ_LENGTH, VOCAB, Run, write_tokens
from tests.tiny import save_llama


@pytest.fixture(scope="package")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_llama(root / "student", vocab_size=VOCAB)
    save_llama(
        root / "teacher", seed=1, vocab_size=VOCAB, num_hidden_layers=6, hidden_size=48, head_dim=6
    )
    save_llama(root / "shallow", seed=2, vocab_size=VOCAB, num_hidden_layers=2)
    write_tokens(root / "tokens", 23 * SEQ_LENGTH + 1)
    return root


@pytest.fixture
def run(root, tmp_path):
    return Run(
        model=root / "student",
        teacher=TeacherConfig(path=root / "teacher"),
        tokens=root / "tokens",
        out=tmp_path,
        train=ONE_STEP,
        intermediate=IntermediateConfig(states=ALL_STATES, layers=LAYERS, weight=0.5),
    )
