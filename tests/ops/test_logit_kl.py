"""The losses of one sweep against fp64 autograd on whole logits, on 1, 2 and 4 ranks."""

import contextlib
import functools
import math

import pytest
import torch
import torch.nn.functional as F

from minitron.ops import library, logit_kl_reference
from minitron.ops.logit_kl import logit_kl, logit_kl_fused, logit_kl_merge, logit_losses
from minitron.ops.objectives import KL, Logits
from tests.harness import run_distributed

S, B = 5, 3
LOSSES = ("forward_kl", "reverse_kl", "cross_entropy", "z_loss")
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6}
GRAD_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
DTYPES = pytest.mark.parametrize(
    "dtype", LOSS_TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)
PATHS = pytest.mark.parametrize("fused", [False, True], ids=["two sweeps", "fused"])


def _inputs(seed, dtype, vocabulary, offset=0.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, S, B, vocabulary, generator=generator)
    student = (3 * draw() + offset).to(dtype)
    teacher = (3 * draw() - offset).to(dtype)
    labels = torch.randint(vocabulary, (S, B), generator=generator)
    upstream = torch.rand(4, S, B, generator=generator)
    mask = (torch.rand(S, B, generator=generator) < 0.7).float()
    return tuple(x.to(device) for x in (student, teacher, labels, upstream, mask))


def _expected(student, teacher, labels, upstream, mask, temperature):
    """Losses and the gradient of their weighted sum, in fp64, by autograd."""
    s = student.double().clone().requires_grad_()
    log_p = F.log_softmax(s / temperature, -1)
    log_q = F.log_softmax(teacher.double() / temperature, -1)
    p, q = log_p.exp(), log_q.exp()
    losses = torch.stack(
        [
            torch.where(q > 0, q * (log_q - log_p), 0).sum(-1),
            torch.where(p > 0, p * (log_p - log_q), 0).sum(-1),
            F.cross_entropy(s.flatten(0, 1), labels.flatten(), reduction="none").view(S, B),
            s.logsumexp(-1).square(),
        ]
    )
    losses = torch.where(mask > 0, losses, 0)
    (losses * upstream.double()).sum().backward()
    return losses.detach(), s.grad


def _gradient_by_hand(student, teacher, labels, upstream):
    """What autograd gets of `_expected`, at τ = 1, where logits of −inf do not make it NaN."""
    p, q = student.softmax(-1), teacher.softmax(-1)
    ratio = torch.where(p > 0, student.log_softmax(-1) - teacher.log_softmax(-1), 0)
    slopes = (
        p - q,
        torch.where(p > 0, p * (ratio - (p * ratio).sum(-1, keepdim=True)), 0),
        p - F.one_hot(labels, p.size(-1)),
        2 * student.logsumexp(-1, keepdim=True) * p,
    )
    weights = upstream.double().unsqueeze(-1)
    return torch.where(weights > 0, weights * torch.stack(slopes), 0).sum(0)


def _shard(logits, rank, size):
    """This rank's columns with garbage in the padding, and how many are valid."""
    vocabulary = logits.size(-1)
    width = -(-vocabulary // size) + 13
    padded = logits.new_full((S, B, width * size), 50.0)
    padded[..., :vocabulary] = logits
    start = rank * width
    return padded[..., start : start + width].clone(), min(max(vocabulary - start, 0), width)


def _run(rank, size, group, seed, dtype, vocabulary, temperature, fused=False, device="cpu"):
    student, teacher, labels, upstream, mask = _inputs(seed, dtype, vocabulary, device=device)
    x, valid = _shard(student, rank, size)
    y, _ = _shard(teacher, rank, size)
    x[mask == 0] = math.nan  # masked tokens are not read
    options = {"valid_columns": valid, "temperature": temperature, "tp_group": group}
    return *_losses_and_gradient(fused, x, y, labels, upstream, mask, **options), valid


def _losses_and_gradient(fused, x, y, labels, upstream, mask, **options):
    """All four losses and the gradient of their weighted sum, by one of the two paths."""
    if fused:
        return _fused(x, y, labels, upstream, mask > 0, **options)
    x = x.clone().requires_grad_()
    losses = torch.stack(
        logit_losses(x, y, labels=labels, reverse=True, z_loss=True, loss_mask=mask, **options)
    )
    (losses * upstream).sum().backward()
    return losses.detach(), x.grad


def _fused(x, y, labels, upstream, mask, *, valid_columns, temperature=1.0, tp_group=None):
    assert tp_group is None
    weights = upstream.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    rows = [t.flatten(0, 1) for t in (x, y, labels, mask)]
    grad = torch.empty_like(rows[0])
    statistics = logit_kl_fused(*rows, weights, valid_columns, temperature, True, True, grad)
    losses, _ = logit_kl_merge(statistics[None], rows[3], temperature)
    return losses.view(4, S, B), grad.view(x.shape)


def _on_rank(*args):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _run(rank, size, torch.distributed.group.WORLD, *args)


def _check(results, seed, dtype, vocabulary, temperature):
    losses, grad = _expected(
        *_inputs(seed, dtype, vocabulary, device=results[0][0].device), temperature
    )
    tolerance = LOSS_TOLERANCE[dtype]
    for found, _, _ in results:  # every rank has the whole loss
        torch.testing.assert_close(found.double(), losses, rtol=4 * tolerance, atol=4 * tolerance)
    joined = torch.cat([part[..., :valid] for _, part, valid in results], -1).double()
    tolerance = GRAD_TOLERANCE[dtype]
    atol = min(10 * tolerance, 2e-5)
    torch.testing.assert_close(joined, grad, rtol=tolerance, atol=atol)
    for _, part, valid in results:
        assert part[..., valid:].count_nonzero() == 0


@DTYPES
@PATHS
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("vocabulary", [1, 15, 4097, 8209])
def test_losses_and_gradient(dtype, fused, temperature, vocabulary, device, seed):
    result = _run(0, 1, None, seed, dtype, vocabulary, temperature, fused, device)
    _check([result], seed, dtype, vocabulary, temperature)


@DTYPES
@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_and_gradient_of_a_sharded_vocabulary(dtype, world_size, seed):
    vocabulary, temperature = 4301, 1.7
    ranks = run_distributed(_on_rank, world_size, seed, dtype, vocabulary, temperature)
    _check(ranks, seed, dtype, vocabulary, temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@PATHS
def test_rising_logits_leave_the_first_tiles_references_behind(fused, dtype, offset, device, seed):
    student, teacher, labels, upstream, mask = _inputs(seed, dtype, 9000, offset, device)
    rise = torch.linspace(0, 1, 9000, device=device)
    student = (student.double() + 150 * rise).to(dtype)
    teacher = (teacher.double() + 400 * rise).to(dtype)
    inputs = (student, teacher, labels, upstream, torch.ones_like(mask))
    losses, grad = _expected(*inputs, 1.0)
    found, found_grad = _losses_and_gradient(fused, *inputs, valid_columns=9000)
    torch.testing.assert_close(found.double(), losses, rtol=1e-5, atol=1e-5)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 4e-5  # logits of 700 in fp32: 3e-5
    torch.testing.assert_close(found_grad.double(), grad, rtol=rounding, atol=2e-4)


@DTYPES
@PATHS
def test_a_lone_logit_far_above_the_first_tile(dtype, fused, device, seed):
    student, teacher, labels, upstream, mask = _inputs(seed, dtype, 9000, device=device)
    student[..., 8500] = 150.0
    teacher[..., 8501] = 200.0
    upstream[0], upstream[1:] = 1, 0
    expected, expected_grad = _expected(
        student, teacher, labels, upstream, torch.ones_like(mask), 1.0
    )
    if fused:
        rows = [x.flatten(0, 1) for x in (student.clone(), teacher)]
        weights = upstream[:2].flatten(1).to(torch.promote_types(dtype, torch.float32))
        found = KL().fused(Logits(*rows, valid_columns=9000), weights).objective
        grad = rows[0]
    else:
        x = student.clone().requires_grad_()
        found = logit_kl(x, teacher, valid_columns=9000).flatten()
        found.sum().backward()
        grad = x.grad.flatten(0, 1)
    torch.testing.assert_close(found.double(), expected[0].flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad.flatten(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@PATHS
def test_a_large_offset_costs_no_digits(fused, dtype, device, seed):
    student, _, labels, upstream, mask = _inputs(seed, dtype, 301, device=device)
    teacher = student + 0.01 * torch.randn_like(student)
    student, teacher = student - 300, teacher + 300
    inputs = (student, teacher, labels, upstream, torch.ones_like(mask))
    losses, grad = _losses_and_gradient(fused, *inputs, valid_columns=301)
    expected, expected_grad = _expected(*inputs, 1.0)
    assert expected[0].mean() < 1e-3
    torch.testing.assert_close(losses[0].double(), expected[0], rtol=2e-2, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-4)


@DTYPES
@PATHS
def test_impossible_tokens(fused, dtype, device, seed):
    student, teacher, labels, upstream, mask = _inputs(seed, dtype, 5000, device=device)
    student[..., 4990:] = teacher[..., 4990:] = -torch.inf
    teacher[0, 0, :4600] = -torch.inf  # a whole tile without the teacher
    student[1, 1, :4600] = teacher[1, 1, :4600] = -torch.inf  # and one without either
    student[2, 2, 7] = -torch.inf  # the teacher finds it possible
    labels = labels.clamp(4600, 4989)
    upstream[1, 0, 0] = 0  # of an infinite reverse KL there is no gradient
    inputs = (student, teacher, labels, upstream, torch.ones_like(mask))
    expected, _ = _expected(*inputs, 1.0)
    losses, grad = _losses_and_gradient(fused, *inputs, valid_columns=5000)
    assert losses[0, 2, 2] == losses[1, 0, 0] == torch.inf
    expected[0, 2, 2] = expected[1, 0, 0] = torch.inf
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    expected_grad = _gradient_by_hand(student.double(), teacher.double(), labels, upstream)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=GRAD_TOLERANCE[dtype], atol=2e-5)
    assert grad[..., 4990:].count_nonzero() == 0


def test_masked_tokens_alone(device):
    student = torch.full((S, B, 33), torch.nan, requires_grad=True, device=device)
    mask = torch.zeros(S, B, device=device)
    loss = logit_kl(student, student, valid_columns=33, loss_mask=mask)
    loss.sum().backward()
    assert loss.count_nonzero() == 0
    assert student.grad.count_nonzero() == 0


@DTYPES
def test_power_of_the_temperature(dtype, seed):
    student, teacher, *_ = _inputs(seed, dtype, 33)
    options = {"valid_columns": 33, "temperature": 1.7}
    plain = logit_kl(student, teacher, **options)
    torch.testing.assert_close(
        logit_kl(student, teacher, temperature_power=2, **options), plain * 1.7**2
    )


@pytest.mark.parametrize("destination", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_over_dead_logits(destination, dtype, device, seed):
    student, teacher, _, upstream, _ = _inputs(seed, dtype, 4500, device=device)

    def gradient(where):
        logits = {"student": student.clone(), "teacher": teacher.clone()}
        x = logits["student"].requires_grad_()
        address = logits[where].data_ptr() if where != "new" else None
        loss = logit_kl(x, logits["teacher"], valid_columns=4400, gradient=where)
        (grad,) = torch.autograd.grad(loss, x, upstream[0].to(loss))
        assert address in (None, grad.data_ptr())
        return grad

    assert torch.equal(gradient(destination), gradient("new"))


@pytest.mark.parametrize("destination", ["student", "teacher"])
@pytest.mark.parametrize("through_hooks", [False, True])
def test_going_backward_twice_over_dead_logits_is_refused(destination, through_hooks, seed):
    student, teacher, *_ = _inputs(seed, torch.float32, 20)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with hooks if through_hooks else contextlib.nullcontext():
        x = student.requires_grad_() * 1
        loss = logit_kl(x, teacher, valid_columns=20, gradient=destination).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"second time: .* over the {destination}'s logits"):
        loss.backward()


def test_going_backward_twice_into_new_memory(seed):
    student, teacher, *_ = _inputs(seed, torch.float32, 20)
    loss = logit_kl(student.requires_grad_(), teacher, valid_columns=20).sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *second)


def test_a_gradient_needs_room():
    with pytest.raises(ValueError, match=r"float32 gradient does not fit torch.bfloat16 teacher"):
        logit_kl(
            torch.zeros(1, 1, 4),
            torch.zeros(1, 1, 4).bfloat16(),
            valid_columns=4,
            gradient="teacher",
        )


def test_strided_rows_and_mixed_dtypes(device, seed):
    student, teacher, *_ = _inputs(seed, torch.float32, 700, device=device)
    whole = logit_kl(student[..., 3:610].contiguous(), teacher[..., 3:610].bfloat16(),
                     valid_columns=600)  # fmt: skip
    strided = logit_kl(student[..., 3:610], teacher.bfloat16()[..., 3:610], valid_columns=600)
    assert torch.equal(whole, strided)


def _op_arguments(device="cpu", seed=0):
    student, teacher, labels, upstream, mask = _inputs(seed, torch.float32, 70, device=device)
    rows = (student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten(), mask.flatten() > 0)
    weights = upstream.flatten(1).contiguous()
    options = (66, 0, 1.3, True, True)
    statistics = torch.ops.minitron.logit_kl_statistics(*rows, *options)
    merged = torch.ops.minitron.logit_kl_merge(statistics[None], rows[3], 1.3)[1]
    new = torch.empty_like(rows[0])
    return {
        "logit_kl_statistics": (*rows, *options),
        "logit_kl_merge": (statistics[None].expand(2, -1, -1).contiguous(), rows[3], 1.3),
        "logit_kl_gradient": (*rows, merged, weights, *options, new),
        "logit_kl_fused": (*rows, weights, 66, 1.3, True, True, new),
        "logit_losses": (
            rows[0].clone().requires_grad_(),
            *rows[1:],
            *(66, 1.3, True, True),
            *("new", None),
        ),
    }


@pytest.mark.parametrize("name", list(_op_arguments()))
def test_ops_keep_the_contract_of_torch(name, device, seed):
    torch.library.opcheck(getattr(torch.ops.minitron, name), _op_arguments(device, seed)[name])


@pytest.mark.parametrize("name", [name for name in _op_arguments() if name != "logit_losses"])
@pytest.mark.skipif(not library.extension_built, reason="the extension is not built")
def test_kernels_equal_their_references(name, device, seed):
    arguments = _op_arguments(device, seed)[name]
    results = []
    for run in (
        getattr(torch.ops.minitron, name),
        getattr(logit_kl_reference, name.removeprefix("logit_kl_")),
    ):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        returned = run(*copies)
        returned = returned if isinstance(returned, tuple) else (returned,)
        results.append([*(r for r in returned if r is not None), copies[-1]])
    if name in ("logit_kl_statistics", "logit_kl_fused"):  # references may differ: merge first
        for result in results:
            result[0] = torch.ops.minitron.logit_kl_merge(result[0][None], arguments[3], 1.3)[0]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
