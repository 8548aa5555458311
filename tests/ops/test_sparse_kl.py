"""Forward KL to a teacher's known tokens against fp64 autograd over the bins, on 1 to 4 ranks."""

import functools
import math
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron.ops import library
from minitron.ops import sparse_kl as module
from minitron.ops.logit_kl import logit_kl
from minitron.ops.sparse_kl import sparse_kl
from minitron.ops.top_tokens import top_tokens
from tests.harness import run_distributed
from tests.ops.shards import DTYPES, B, S, check, scaled, shard

VOCAB, K = 301, 9


def _inputs(seed, dtype, temperature=1.0, *, scale=1.0):
    """Student logits, ids and log-probabilities of the teacher with gaps, mask, upstream."""
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, S, B, VOCAB, generator=generator, dtype=torch.float64)
    student = (3 * draw() + 300).to(dtype)
    log_q = F.log_softmax(3 * draw() / temperature, -1)
    ids = torch.rand(S, B, VOCAB, generator=generator).topk(K).indices  # any k tokens
    log_q = log_q.gather(-1, ids).to(torch.promote_types(dtype, torch.float32)) + math.log(scale)
    ids[1, :, ::2] = -1
    log_q[1, :, ::2] = 7.0  # beside padding: not looked at
    log_q[2, :, 0] = -torch.inf
    mask = (torch.rand(S, B, generator=generator) < 0.7).float()
    upstream = torch.rand(S, B, generator=generator, dtype=torch.float64)
    return student, ids, log_q, mask, upstream


def _expected(student, ids, log_q, mask, upstream, temperature, tail):
    s = student.double().clone().requires_grad_()
    log_p = F.log_softmax(s / temperature, -1)
    losses = torch.zeros(S, B, dtype=torch.float64)
    for i in range(S):
        for j in range(B):
            known = ids[i, j] >= 0
            columns, w = ids[i, j][known], log_q[i, j][known].double().exp()
            terms = torch.where(w > 0, w * (w.log() - log_p[i, j, columns]), 0)
            losses[i, j] = terms.sum()
            rest = 1 - w.sum()
            if tail and rest > 0:
                others = torch.ones(VOCAB, dtype=torch.bool)
                others[columns] = False
                losses[i, j] = losses[i, j] + rest * (rest.log() - log_p[i, j, others].logsumexp(0))
    losses = torch.where(mask > 0, losses, 0)
    (losses * upstream).sum().backward()
    return losses.detach(), s.grad


def _run(rank, size, group, seed, dtype, temperature, tail):
    student, ids, log_q, mask, upstream = _inputs(seed, dtype, temperature)
    x, valid = shard(student, rank, size)
    x[mask == 0] = math.nan  # masked tokens are not read
    x.requires_grad_()
    loss = sparse_kl(
        x,
        ids,
        log_q,
        tail=tail,
        valid_columns=valid,
        temperature=temperature,
        loss_mask=mask,
        tp_group=group,
    )
    (loss * upstream).sum().backward()
    return loss.detach(), x.grad, valid


def _on_rank(*args):
    return _run(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, *args)


@DTYPES
@pytest.mark.parametrize("tail", [False, True], ids=["no tail", "tail"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_loss_and_gradient(dtype, temperature, tail, seed):
    expected = _expected(*_inputs(seed, dtype, temperature), temperature, tail)
    check([_run(0, 1, None, seed, dtype, temperature, tail)], *expected, dtype)


@DTYPES
@pytest.mark.parametrize("tail", [False, True], ids=["no tail", "tail"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_loss_and_gradient_of_a_sharded_vocabulary(dtype, world_size, tail, seed):
    ranks = run_distributed(_on_rank, world_size, seed, dtype, 1.7, tail)
    expected = _expected(*_inputs(seed, dtype, 1.7), 1.7, tail)
    check(ranks, *expected, dtype)
    with pytest.raises(AssertionError):
        check(scaled(ranks), *expected, dtype)


def test_all_tokens_known_is_the_whole_kl(seed):
    student, *_ = _inputs(seed, torch.float64)
    teacher = 3 * torch.randn_like(student)
    teacher[..., 40:60] = -torch.inf
    x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
    options = {"valid_columns": VOCAB, "temperature": 1.3, "temperature_power": 2}
    support = top_tokens(teacher, VOCAB, valid_columns=VOCAB, temperature=1.3)
    whole, sparse = (
        logit_kl(x, teacher, **options),
        sparse_kl(y, *support, tail=True, **options),
    )
    torch.testing.assert_close(sparse, whole)
    whole.sum().backward()
    sparse.sum().backward()
    torch.testing.assert_close(y.grad, x.grad)


def test_samples_are_unbiased():
    """Counts over their number have the whole gradient as their mean; so has no top k."""
    student, teacher = 2 * torch.randn(2, 1, 1, 40, dtype=torch.float64)
    p, q = student.softmax(-1), teacher.softmax(-1)
    draws, number = 20000, 30
    counts = torch.distributions.Multinomial(number, q.flatten()).sample((draws,))[:, None]
    ids = torch.where(counts > 0, torch.arange(40), -1)
    x = student.expand(draws, 1, 40).clone().requires_grad_()
    sparse_kl(x, ids, (counts / number).log(), tail=False, valid_columns=40).sum().backward()
    error = (x.grad.mean(0) - (p - q)[0]).abs().amax()
    assert error < 6 * math.sqrt(0.25 / number / draws)


@DTYPES
def test_impossible_tokens(dtype, seed):
    student, ids, log_q, _, _ = _inputs(seed, dtype)
    student[0, 0, ids[0, 0, 3]] = -torch.inf  # known to the teacher
    others = torch.ones(VOCAB, dtype=torch.bool)
    others[ids[0, 1]] = False
    student[0, 1, others] = -torch.inf  # an impossible tail
    student[3:, :, ids[3, 0, 0]] = -torch.inf
    log_q = torch.where(ids == ids[3, 0, 0], -torch.inf, log_q)
    ones = torch.ones(S, B)
    expected, grad = _expected(student, ids, log_q, ones, ones.double(), 1.0, True)
    x = student.clone().requires_grad_()
    loss = sparse_kl(x, ids, log_q, tail=True, valid_columns=VOCAB)
    assert loss[0, 0] == loss[0, 1] == torch.inf
    assert torch.isfinite(loss[1:]).all()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    loss[1:].sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(x.grad[1:].double(), grad[1:], rtol=2.0**-8, atol=1e-5)


@DTYPES
def test_masked_or_unknown_tokens_alone(dtype):
    student, ids, log_q, mask, _ = _inputs(0, dtype)
    for options in (
        {"ids": ids, "loss_mask": mask * 0, "tail": True},
        {"ids": ids * 0 - 1, "tail": False},
        {"ids": ids * 0 - 1, "tail": True},  # one bin, of which both are certain
    ):
        x = student.clone().requires_grad_()
        loss = sparse_kl(x, log_probabilities=log_q, valid_columns=VOCAB, **options)
        loss.sum().backward()
        assert loss.count_nonzero() == 0
        assert x.grad.count_nonzero() == 0


def test_is_differentiated_right(seed):
    student, ids, log_q, _, _ = _inputs(seed, torch.float64)
    for tail in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, tail=tail: sparse_kl(
                x, ids[:2], log_q[:2], tail=tail, valid_columns=VOCAB, temperature=0.6
            ),
            (student[:2].clone().requires_grad_(),),
        )


def _op_arguments(dtype=torch.float32):
    student, ids, log_q, mask, _ = _inputs(0, dtype)
    ids, weights = ids.flatten(0, 1), log_q.flatten(0, 1).exp()
    labels = torch.arange(S * B)
    rows = (student.flatten(0, 1), ids, weights, labels, mask.flatten() > 0)
    merged = torch.rand(S * B, 6)
    by_losses = torch.rand(2, S * B)
    return {
        "sparse_kl_statistics": (*rows, 290, 0, 1.3),
        "sparse_kl_gradient": (
            *rows, merged, by_losses, 290, 0, 1.3, torch.empty_like(rows[0]),
        ),
    }  # fmt: skip


KERNEL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LONG = 20001


def _long_rows(dtype):
    """Rows of several tiles, strided, of which one rises far above its first tile in the last."""
    student = (3 * torch.randn(9, LONG + 7) + 300).to(dtype)[:, :LONG]
    student[1, 19000], student[2, :9000] = 385, -torch.inf
    student[3, 100:200] = -torch.inf
    ids = torch.rand(9, LONG).topk(70).indices + 50  # the last few are another rank's
    ids[4, ::3] = -1
    ids[1, ids[1] == 19050] = -1
    ids[1, 5] = 19050
    weights = torch.rand(9, 70) / 70
    weights[5, 3] = 0
    labels, mask = torch.randint(50, LONG, (9,)), torch.arange(9) != 6
    labels[7] = ids[7, 2]
    student[6] = torch.nan  # masked
    return student, ids, weights, labels, mask


@KERNEL_DTYPES
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("labelled", [False, True], ids=["", "labels"])
@pytest.mark.skipif(not library.extension_built, reason="the extension is not built")
def test_kernels_equal_their_references(dtype, temperature, labelled):
    student, ids, weights, labels, mask = _long_rows(dtype)
    rows = (ids, weights, labels if labelled else None, mask)
    options = (LONG - 3, 50, temperature)
    found = torch.ops.minitron.sparse_kl_statistics(student, *rows, *options)[mask].double()
    expected = module._statistics(student.double(), ids, weights.double(), *rows[2:], *options)
    expected = expected[mask]
    m, shift = found[:, 0], (found[:, 0] - expected[:, 0]) / temperature
    torch.testing.assert_close(
        torch.stack([*found[:, 1:3].log().t() + shift, found[:, 3] - shift * found[:, 4]]),
        torch.stack([*expected[:, 1:3].log().t(), expected[:, 3]]),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(found[:, 4], expected[:, 4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[:, 6], expected[:, 6], rtol=0, atol=0)
    if labelled:
        log_sums = (m + found[:, 5].log(), expected[:, 0] + expected[:, 5].log())
        torch.testing.assert_close(*log_sums, rtol=1e-6, atol=0)
    merged = torch.stack([student.amax(1), *(torch.rand(5, 9) + 0.5)], 1)
    upstream = torch.rand(2, 9)
    gradients = [student.clone(), torch.empty_like(student)]
    torch.ops.minitron.sparse_kl_gradient(
        gradients[0], *rows, merged, upstream, *options, gradients[0]
    )
    module._gradient(student, *rows, merged, upstream, *options, gradients[1])
    unit = 2.0**-7 if dtype == torch.bfloat16 else 1e-5  # a tie may go either way
    torch.testing.assert_close(*gradients, rtol=unit, atol=1e-6)


def test_more_columns_than_a_gpus_usual_shared_memory_has_bits(device):
    columns = 400_001
    student = torch.randn(2, columns, device=device)
    ids = torch.tensor([[5, 399_999, 400_000], [-1, 0, 31]], device=device)
    weights = torch.full((2, 3), 0.3, device=device)
    arguments = (ids, weights, None, None, columns, 0, 1.0)
    found = module.sparse_kl_statistics(student, *arguments).double()
    wide = module._statistics(student.double(), ids, weights.double(), *arguments[2:])
    sums, expected = (x[:, 1:3] * x[:, :1].exp() for x in (found, wide))
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=0)


@KERNEL_DTYPES
@pytest.mark.parametrize("name", list(_op_arguments()))
def test_ops_keep_the_contract_of_torch(name, dtype):
    torch.library.opcheck(getattr(torch.ops.minitron, name), _op_arguments(dtype)[name])


def test_ids_must_go_with_the_logits():
    message = "logits [2, 1, 9] and a teacher of [2, 1, 3] and [2, 1, 4] do not go together"
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_kl(
            torch.zeros(2, 1, 9),
            torch.zeros(2, 1, 3, dtype=torch.int64),
            torch.zeros(2, 1, 4),
            tail=False,
            valid_columns=9,
        )
