"""The merge of csrc/include/kl_merge.h is associative and commutative and has a neutral element."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.ops import logit_kl_reference as reference

native = pytest.importorskip("minitron._C", reason="the extension is not built")

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

NEUTRAL = (-1e30, -1e30, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
TEMPERATURES = st.sampled_from([0.5, 1.0, 3.0])


@st.composite
def columns(draw):
    """Logits of a student and a teacher [2, n], −inf among them, around offsets of their own."""
    logit = st.one_of(st.floats(-30, 30, width=32), st.just(-math.inf))
    n = draw(st.integers(1, 6))
    offsets = draw(st.tuples(st.floats(-300, 300, width=32), st.floats(-300, 300, width=32)))
    rows = [
        [offset + value for value in draw(st.lists(logit, min_size=n, max_size=n))]
        for offset in offsets
    ]
    for student, teacher in zip(*rows, strict=True):  # both infinities at once mean an infinite KL
        if math.isinf(student) != math.isinf(teacher):
            rows[0][0] = rows[1][0] = 0.0
            rows[0][1:] = rows[1][1:] = [1.0] * (n - 1)
            break
    return torch.tensor(rows)


def statistics(logits, temperature):
    student, teacher = logits.float()
    found = reference.statistics(
        student[None], teacher[None], None, None, student.numel(), 0, temperature, True, True
    )
    return tuple(found[0].tolist())


def assert_equal(found, expected):
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@given(columns(), columns(), TEMPERATURES)
def test_commutative(u, v, temperature):
    a, b = statistics(u, temperature), statistics(v, temperature)
    assert native.kl_merge(a, b, temperature) == native.kl_merge(b, a, temperature)


@given(columns(), columns(), columns(), TEMPERATURES)
def test_associative(u, v, w, temperature):
    a, b, c = (statistics(x, temperature) for x in (u, v, w))
    left = native.kl_merge(native.kl_merge(a, b, temperature), c, temperature)
    right = native.kl_merge(a, native.kl_merge(b, c, temperature), temperature)
    assert_equal(left, right)


@given(columns(), TEMPERATURES)
def test_neutral(u, temperature):
    a = statistics(u, temperature)
    assert native.kl_merge(a, NEUTRAL, temperature) == a
    assert native.kl_merge(NEUTRAL, a, temperature) == a


@given(columns(), columns(), TEMPERATURES)
def test_merged_parts_are_the_whole(u, v, temperature):
    parts = native.kl_merge(statistics(u, temperature), statistics(v, temperature), temperature)
    whole = statistics(torch.cat([u, v], 1), temperature)
    assert_equal(parts, whole)


def test_other_than_eight_statistics():
    with pytest.raises(ValueError, match="8 statistics are expected"):
        native.kl_merge((0.0,) * 7, NEUTRAL, 1.0)
