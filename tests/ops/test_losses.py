"""Both losses against fp64 autograd on whole logits: values and gradients, on 1, 2 and 4 ranks."""

import pytest
import torch
import torch.nn.functional as F

from minitron.ops.cross_entropy import cross_entropy
from minitron.ops.logit_kl import logit_kl
from tests.harness import run_distributed

S, B, VOCAB = 7, 3, 301


def _inputs(seed, dtype=torch.float64, scale=3.0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(S, B, VOCAB, generator=generator, dtype=torch.float64) * scale
    teacher = torch.randn(S, B, VOCAB, generator=generator, dtype=torch.float64) * scale + offset
    labels = torch.randint(0, VOCAB, (S, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) > 0.3).double()
    mask[0] = 0
    return student.to(dtype), teacher.to(dtype), labels, mask


def _reference_kl(student, teacher, temperature):
    log_q = F.log_softmax(teacher.double() / temperature, -1)
    log_p = F.log_softmax(student.double() / temperature, -1)
    terms = torch.where(log_q.exp() > 0, log_q.exp() * (log_q - log_p), 0)
    return terms.sum(-1)


def _shard(logits, rank, size):
    """This rank's columns with garbage in the padding, and how many are valid."""
    width = -(-VOCAB // size) + 13
    padded = torch.full((S, B, width * size), 50.0, dtype=logits.dtype)
    padded[..., :VOCAB] = logits
    start = rank * width
    return padded[..., start : start + width].clone(), min(max(VOCAB - start, 0), width)


def _run_shards(rank, size, seed, dtype, temperature, group):
    student, teacher, labels, mask = _inputs(seed, dtype)
    local_student, valid = _shard(student, rank, size)
    local_teacher, _ = _shard(teacher, rank, size)
    results = {}
    for name in ("kl", "ce"):
        x = local_student.clone().requires_grad_()
        if name == "kl":
            loss = logit_kl(
                x, local_teacher, valid_columns=valid, temperature=temperature, tp_group=group
            )
        else:
            loss = cross_entropy(x, labels, valid_columns=valid, tp_group=group)
        (loss * mask).sum().backward()
        results[name] = (loss.detach(), x.grad)
    return results


def _on_rank(seed, dtype, temperature):
    group = torch.distributed.group.WORLD
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return _run_shards(rank, size, seed, dtype, temperature, group)


def _reference(seed, dtype, temperature):
    student, teacher, labels, mask = _inputs(seed, dtype)
    results = {}
    for name in ("kl", "ce"):
        x = student.double().clone().requires_grad_()
        if name == "kl":
            loss = _reference_kl(x, teacher, temperature)
        else:
            loss = F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
        (loss * mask).sum().backward()
        results[name] = (loss.detach(), x.grad)
    return results


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "grad_tolerance"),
    [
        (torch.float64, 1e-12, 1e-12),
        (torch.float32, 1e-5, 1e-6),
        (torch.bfloat16, 1e-5, 2.0**-8),
    ],
    ids=["fp64", "fp32", "bf16"],
)
def test_values_and_gradients_equal_one_fp64_process(
    world_size, dtype, loss_tolerance, grad_tolerance, seed
):
    temperature = 1.7
    if world_size == 1:
        ranks = [_run_shards(0, 1, seed, dtype, temperature, None)]
    else:
        ranks = run_distributed(_on_rank, world_size, seed, dtype, temperature)
    for name, (loss, grad) in _reference(seed, dtype, temperature).items():
        for rank in ranks:  # every rank has the whole loss
            torch.testing.assert_close(
                rank[name][0].double(), loss, rtol=loss_tolerance, atol=loss_tolerance
            )
        joined = torch.cat(
            [r[name][1][..., : _shard(grad, i, world_size)[1]] for i, r in enumerate(ranks)], -1
        )
        torch.testing.assert_close(
            joined.double(), grad, rtol=grad_tolerance, atol=grad_tolerance * 1e-2
        )
        for i, rank in enumerate(ranks):  # padding has none at all
            assert rank[name][1][..., _shard(grad, i, world_size)[1] :].count_nonzero() == 0


def test_kl_keeps_its_digits_under_a_large_teacher_offset():
    student, noise, _, _ = _inputs(0, torch.float32)
    teacher = student + 0.02 * noise + 300
    loss = logit_kl(student, teacher, valid_columns=VOCAB)
    reference = _reference_kl(student, teacher, 1.0)
    assert 1e-4 < reference.mean() < 1e-2
    # Uncentred sums of terms near 300 would be off by 300 * 2^-24, which is 2e-5.
    torch.testing.assert_close(loss.double(), reference, rtol=0, atol=3e-6)


def test_kl_of_impossible_tokens():
    student, teacher, _, _ = _inputs(1)
    teacher[..., 5] = -torch.inf
    loss = logit_kl(student, teacher, valid_columns=VOCAB)
    torch.testing.assert_close(loss, _reference_kl(student, teacher, 1.0))
    student[2, 1, 7] = -torch.inf
    loss = logit_kl(student, teacher, valid_columns=VOCAB)
    assert loss[2, 1] == torch.inf
    assert loss[torch.isfinite(loss)].numel() == S * B - 1


def test_kl_is_differentiated_right():
    student, teacher, _, _ = _inputs(2)
    x = student[:2, :1, :9].clone().requires_grad_()
    y = teacher[:2, :1, :9].clone()
    assert torch.autograd.gradcheck(
        lambda x: logit_kl(x, y, valid_columns=7, temperature=0.6), (x,)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_stay_as_they_were(dtype):
    student, teacher, labels, _ = _inputs(3, dtype)
    x, y = student.clone().requires_grad_(), teacher.clone()
    cross_entropy(x, labels, valid_columns=VOCAB).sum().backward()
    logit_kl(x, y, valid_columns=VOCAB).sum().backward()
    assert torch.equal(x, student)
    assert torch.equal(y, teacher)


def test_shards_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\[7, 3, 301\] and teacher logits \[7, 3, 300\]"):
        logit_kl(torch.zeros(7, 3, 301), torch.zeros(7, 3, 300), valid_columns=300)
