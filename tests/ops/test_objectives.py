"""Every objective against its definition in fp64: losses and gradients, on 1, 2 and 4 ranks."""

import functools
import math

import pytest
import torch
import torch.distributed as dist

from minitron.ops.divergences import Divergence
from minitron.ops.logit_loss import logit_loss
from minitron.ops.logit_moments import LogitDistance
from minitron.ops.objectives import KL, KnownTokens, Objective
from minitron.ops.sparse_kl import SparseKL
from minitron.ops.top_tokens import TopKL
from tests.harness import run_distributed
from tests.ops import definitions
from tests.ops.definitions import OBJECTIVES
from tests.ops.shards import DTYPES, B, S, check, scaled, shard

VOCAB = 301
EVERY = pytest.mark.parametrize("name", list(OBJECTIVES))


def _inputs(seed, dtype, *, impossible="", vocabulary=VOCAB, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, S, B, vocabulary, generator=generator)
    student, teacher = 2 * draw() + 300, 2 * draw() - 300
    if impossible:
        student[..., 40:60] = teacher[..., 40:60] = -torch.inf
        if impossible not in ("forward_kl", "top_k", "top_p"):
            student[..., 110] = -torch.inf
        if impossible != "reverse_kl":
            teacher[..., 190:200] = -torch.inf
        student[0, :, 80:180] = teacher[0, :, 80:180] = -torch.inf  # all columns of a rank of four
    mask = (torch.rand(S, B, generator=generator) < 0.7).float()
    upstream = torch.rand(S, B, generator=generator, dtype=torch.float64)
    inputs = (student.to(dtype), teacher.to(dtype), mask, upstream)
    return tuple(tensor.to(device) for tensor in inputs)


def _expected(name, temperature, student, teacher, mask, upstream):
    s = student.double().clone().requires_grad_()
    losses = definitions.objective(name, s, teacher.double(), temperature)
    losses = torch.where(mask > 0, losses, 0)
    (losses * upstream).sum().backward()
    return losses.detach(), s.grad


def _run(rank, size, group, name, temperature, student, teacher, mask, upstream):
    x, valid = shard(student, rank, size)
    y, _ = shard(teacher, rank, size)
    x[mask == 0] = y[mask == 0] = math.nan  # masked tokens are not read
    x.requires_grad_()
    loss = logit_loss(
        x,
        y,
        OBJECTIVES[name],
        valid_columns=valid,
        temperature=temperature,
        loss_mask=mask,
        tp_group=group,
    )
    (loss * upstream).sum().backward()
    return loss.detach(), x.grad, valid


def _on_rank(seed, dtype, temperature, impossible):
    place = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    return {
        name: _run(*place, name, temperature, *_inputs(seed, dtype, impossible=name * impossible))
        for name in OBJECTIVES
    }


@DTYPES
@EVERY
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_loss_and_gradient(name, dtype, temperature, device, seed):
    inputs = _inputs(seed, dtype, device=device)
    expected = _expected(name, temperature, *inputs)
    check([_run(0, 1, None, name, temperature, *inputs)], *expected, dtype)


@DTYPES
@EVERY
def test_a_vocabulary_of_many_tiles(name, dtype, device, seed):
    inputs = _inputs(seed, dtype, vocabulary=9001, device=device)
    expected = _expected(name, 1.7, *inputs)
    check([_run(0, 1, None, name, 1.7, *inputs)], *expected, dtype)


@DTYPES
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("impossible", [False, True], ids=["finite", "with impossible tokens"])
def test_loss_and_gradient_of_a_sharded_vocabulary(dtype, world_size, impossible, seed):
    temperature = 1.7
    by_rank = run_distributed(_on_rank, world_size, seed, dtype, temperature, impossible)
    for name in OBJECTIVES:
        inputs = _inputs(seed, dtype, impossible=name * impossible)
        ranks = [found[name] for found in by_rank]
        expected = _expected(name, temperature, *inputs)
        check(ranks, *expected, dtype)
        with pytest.raises(AssertionError):
            check(scaled(ranks), *expected, dtype)


@DTYPES
@EVERY
def test_impossible_tokens(name, dtype, device, seed):
    inputs = _inputs(seed, dtype, impossible=name, device=device)
    expected = _expected(name, 1.3, *inputs)
    assert torch.isfinite(expected[0]).all()
    check([_run(0, 1, None, name, 1.3, *inputs)], *expected, dtype)


@DTYPES
@EVERY
@pytest.mark.parametrize("column", [0, 137, VOCAB - 1])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_among_the_logits_shows(name, dtype, column, whose, device, seed):
    student, teacher, *rest = _inputs(seed, dtype, device=device)
    mask, upstream = torch.ones_like(rest[0]), rest[1]
    clean, clean_grad, _ = _run(0, 1, None, name, 1.3, student, teacher, mask, upstream)
    {"student": student, "teacher": teacher}[whose][2, 1, column] = torch.nan
    loss, grad, valid = _run(0, 1, None, name, 1.3, student, teacher, mask, upstream)
    hit = torch.zeros(S, B, dtype=torch.bool, device=device)
    hit[2, 1] = True
    assert torch.equal(loss.isnan(), hit)
    assert torch.equal(grad[..., :valid].isnan().any(-1), hit)
    assert torch.equal(loss[~hit], clean[~hit])
    assert torch.equal(grad[~hit], clean_grad[~hit])


@EVERY
def test_masked_tokens_alone(name):
    student = torch.full((S, B, 33), torch.nan, requires_grad=True)
    loss = logit_loss(
        student, student, OBJECTIVES[name], valid_columns=33, loss_mask=torch.zeros(S, B)
    )
    loss.sum().backward()
    assert loss.count_nonzero() == 0
    assert student.grad.count_nonzero() == 0


@EVERY
def test_power_of_the_temperature(name, seed):
    student, teacher, *_ = _inputs(seed, torch.float64)
    loss = functools.partial(
        logit_loss, student, teacher, OBJECTIVES[name], valid_columns=VOCAB, temperature=1.7
    )
    torch.testing.assert_close(loss(temperature_power=2), loss() * 1.7**2)


@EVERY
def test_is_differentiated_right(name, seed):
    student, teacher, *_ = _inputs(seed, torch.float64)
    loss = functools.partial(
        logit_loss, teacher=teacher[:1], objective=OBJECTIVES[name], valid_columns=VOCAB - 3
    )
    assert torch.autograd.gradcheck(loss, (student[:1].clone().requires_grad_(),))


@DTYPES
@EVERY
def test_inputs_stay_as_they_were(name, dtype, seed):
    student, teacher, *_ = _inputs(seed, dtype)
    x, y = student.clone().requires_grad_(), teacher.clone()
    logit_loss(x, y, OBJECTIVES[name], valid_columns=VOCAB).sum().backward()
    assert torch.equal(x, student)
    assert torch.equal(y, teacher)


@pytest.mark.parametrize(
    ("skewed", "plain"),
    [
        (Divergence("skew_kl", 1e-14), KL()),
        (Divergence("skew_reverse_kl", 1e-14), KL(reverse=True)),
        (TopKL(VOCAB), KL()),
        (TopKL(VOCAB, 1.0), KL()),
    ],
    ids=str,
)
def test_limits(skewed, plain, seed):
    student, teacher, *_ = _inputs(seed, torch.float64)
    found, expected = (
        logit_loss(student, teacher, objective, valid_columns=VOCAB)
        for objective in (skewed, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_limits_of_the_jensen_shannon_divergence(seed):
    student, teacher, *_ = _inputs(seed, torch.float64)
    loss = functools.partial(logit_loss, student, teacher, valid_columns=VOCAB)
    tiny = 1e-7
    for divergence, plain in (
        (Divergence("jsd", tiny), KL()),
        (Divergence("jsd", 1 - tiny), KL(reverse=True)),
    ):
        torch.testing.assert_close(loss(divergence) / tiny, loss(plain), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        loss(Divergence("jsd", 0.5)),
        logit_loss(teacher, student, Divergence("jsd", 0.5), valid_columns=VOCAB),
    )


def test_squared_error_is_the_kl_of_large_temperatures(seed):
    student, teacher, *_ = _inputs(seed, torch.float64)
    kl = logit_loss(
        student, teacher, KL(), valid_columns=VOCAB, temperature=1e4, temperature_power=2
    )
    mse = logit_loss(student, teacher, LogitDistance("mse"), valid_columns=VOCAB)
    torch.testing.assert_close(2 * kl, mse, rtol=1e-3, atol=0)


def test_a_cosine_of_close_logits_keeps_its_digits():
    student = torch.randn(S, B, VOCAB)
    teacher = student + 1e-3 * torch.randn(S, B, VOCAB) + 5
    found = logit_loss(student, teacher, LogitDistance("cosine"), valid_columns=VOCAB)
    expected = definitions.objective("cosine", student.double(), teacher.double(), 1.0)
    assert expected.max() < 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_constant_logits_have_no_gradient(kind):
    student = torch.full((1, 1, 9), 3.0, requires_grad=True)
    loss = logit_loss(student, student.detach(), LogitDistance(kind), valid_columns=9)
    loss.sum().backward()
    assert loss.item() == (kind == "cosine")
    assert student.grad.count_nonzero() == 0


def test_teachers_of_other_shapes_are_refused():
    logits = torch.zeros(7, 3, 301)
    with pytest.raises(ValueError, match=r"\[7, 3, 301\] and a teacher of \[7, 3, 300\]"):
        logit_loss(logits, torch.zeros(7, 3, 300), KL(), valid_columns=300)
    known = KnownTokens(torch.zeros(7, 3, 2), torch.zeros(7, 3, 2))
    with pytest.raises(ValueError, match="only SparseKL makes a loss"):
        logit_loss(logits, known, KL(), valid_columns=300)
    with pytest.raises(ValueError, match="wants known tokens of the teacher"):
        logit_loss(logits, logits, SparseKL(tail=True), valid_columns=300)


def _op_arguments(dtype=torch.float32):
    student, teacher, mask, _ = _inputs(0, dtype)
    labels, read = torch.arange(S * B), mask.flatten() > 0
    rows = (student.flatten(0, 1), teacher.flatten(0, 1))
    merged, weights, new = torch.rand(S * B, 8), torch.rand(2, S * B), torch.empty_like(rows[0])
    merged[:, :2] = torch.stack([row.amax(1) for row in rows], 1)  # as statistics are: no infinity
    return {
        "divergence_sums": (*rows, read, merged, "jsd", 0.3, 290, 1.3),
        "divergence_gradient": (
            *(*rows, labels, read, merged, merged[:, 0].clone(), weights),
            *("tvd", 0.0, 290, 0, 1.3, new),
        ),
        "logit_moments": (*rows, read, 290),
        "logit_moments_gradient": (
            *(*rows, labels, read, merged, torch.rand(S * B, 4), weights[1].clone(), 290, 0, new),
        ),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", list(_op_arguments()))
def test_ops_keep_the_contract_of_torch(op, dtype):
    torch.library.opcheck(getattr(torch.ops.minitron, op), _op_arguments(dtype)[op])


@EVERY
def test_the_op_of_whole_logits_keeps_the_contract_of_torch(name):
    student, teacher, mask, _ = _inputs(0, torch.float32)
    rows = (student.flatten(0, 1).requires_grad_(), teacher.flatten(0, 1), None, mask.flatten() > 0)
    torch.library.opcheck(
        torch.ops.minitron.logit_loss, (*rows, OBJECTIVES[name].name, 290, 1.3, None)
    )


@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), SparseKL(tail=True)], ids=str)
def test_an_objective_has_a_name(objective):
    assert Objective.named(objective.name) == objective
