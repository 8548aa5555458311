"""The loss of attention relations."""

import re
from unittest import mock

import pytest
import torch

from minitron.distill.intermediate import find_pairs
from minitron.distill.relations import relation_loss
from minitron.errors import MinitronError
from minitron.model import hf
from minitron.sections.distill import IntermediateConfig
from tests import reference
from tests.tiny import tiny_config

STUDENT = hf.architecture_from_config(tiny_config().to_dict())


def test_relations_of_many_rows_against_whole_matrices():
    """Chunks of rows in fp64: the values and gradients of the whole matrices."""
    generator = torch.Generator().manual_seed(3)
    ours = torch.randn(11, 2, (4 + 2 * 2) * 3, generator=generator, dtype=torch.float64)
    theirs = torch.randn(11, 2, (4 + 2 * 2) * 5, generator=generator, dtype=torch.float64)
    weights = torch.rand(11, 2, generator=generator, dtype=torch.float64)

    def heads(x):
        return [part.permute(1, 2, 0, 3) for part in x.unflatten(-1, (8, -1)).split([4, 2, 2], 2)]

    found, expected = ours.clone().requires_grad_(), ours.clone().requires_grad_()
    with mock.patch("minitron.distill.relations._ROWS", 4):
        losses = relation_loss(found, theirs, 4, 2)
        (losses * weights).sum().backward()
    whole = reference.relation_distance(heads(expected), heads(theirs)).t()
    (whole * weights).sum().backward()
    torch.testing.assert_close(losses, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-14)
    assert relation_loss(theirs, theirs, 4, 2).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("num_attention_heads", "num_attention_heads", 4),
        ("num_key_value_heads", "num_query_groups", 4),
    ],
)
def test_relations_of_other_heads_are_refused(key, name, value):
    other = hf.architecture_from_config(tiny_config(**{key: value}).to_dict())
    message = (
        f"attention_relation compares head with head, but the student has {name}="
        f"{getattr(STUDENT, name)} and the teacher {value}; leave it out of "
        "distill.intermediate.states"
    )
    with pytest.raises(MinitronError, match=f"^{re.escape(message)}$"):
        find_pairs(IntermediateConfig(states=["attention_relation"]), STUDENT, other)
