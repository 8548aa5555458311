"""Heads, losses and gradients by chunks against fp64 autograd on whole logits, on 1 to 4 ranks."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minitron.ops.linear_kl import linear_kl
from tests.harness import run_distributed

S, B, H, TEACHER_H, VOCAB, PADDED = 8, 3, 20, 28, 301, 320
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize(
    "dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def _inputs(seed, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    tensors = [draw(S, B, H), draw(PADDED, H), draw(S, B, TEACHER_H), draw(PADDED, TEACHER_H)]
    labels = torch.randint(VOCAB, (S, B), generator=generator)
    mask = (torch.rand(S, B, generator=generator) < 0.7).float()
    return tensors, labels.to(device), mask.to(device)


def _run(seed, dtype, temperature, sequence_parallel, rank=0, size=1, group=None, device="cpu"):
    (hidden, head, teacher, teacher_head), labels, mask = _inputs(seed, dtype, device)
    if sequence_parallel:
        hidden, teacher = hidden.chunk(size)[rank], teacher.chunk(size)[rank]
    width = PADDED // size
    hidden = hidden.clone().requires_grad_()
    head = head[rank * width : (rank + 1) * width].clone().requires_grad_()
    result = linear_kl(
        hidden,
        head,
        teacher,
        teacher_head[rank * width : (rank + 1) * width],
        token_weights=mask,
        valid_columns=min(max(VOCAB - rank * width, 0), width),
        labels=labels,
        temperature=temperature,
        sequence_parallel=sequence_parallel,
        chunk_tokens=7,
        tp_group=group,
    )
    (0.3 * (result.forward_kl * mask).sum()).backward()
    return result.forward_kl.detach(), result.cross_entropy, hidden.grad, head.grad


def _on_rank(*args):
    return _run(*args, dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


def _expected(seed, dtype, temperature, device):
    tensors, labels, mask = _inputs(seed, dtype, device)
    hidden, head, teacher, teacher_head = (x.double().clone() for x in tensors)
    hidden.requires_grad_()
    head.requires_grad_()
    logits, target = (hidden @ head.t())[..., :VOCAB], (teacher @ teacher_head.t())[..., :VOCAB]
    log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (logits, target))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1) * mask
    (0.3 * kl.sum()).backward()
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return kl.detach(), cross_entropy.detach().view(S, B) * mask, hidden.grad, head.grad


def _check(ranks, seed, dtype, temperature, sequence_parallel):
    kl, cross_entropy, hidden_grad, head_grad = _expected(
        seed, dtype, temperature, ranks[0][0].device
    )
    tolerance = TOLERANCE[dtype]

    def assert_close(found, expected):
        scale = expected.abs().amax().item()
        torch.testing.assert_close(
            found.double(), expected, rtol=tolerance, atol=tolerance * max(scale, 1)
        )

    for found in ranks:
        assert_close(found[0], kl)
        assert_close(found[1], cross_entropy)
        if not sequence_parallel:
            assert_close(found[2], hidden_grad)
    if sequence_parallel:
        assert_close(torch.cat([found[2] for found in ranks]), hidden_grad)
    head = torch.cat([found[3] for found in ranks])
    assert_close(head, head_grad)
    assert head[VOCAB:].count_nonzero() == 0


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_equals_whole_logits(dtype, temperature, device):
    seed = torch.seed() % 2**31
    result = _run(seed, dtype, temperature, False, device=device)
    _check([result], seed, dtype, temperature, False)


@DTYPES
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp", "sp"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_equals_whole_logits_on_ranks(dtype, world_size, sequence_parallel):
    seed = torch.seed() % 2**31
    ranks = run_distributed(_on_rank, world_size, seed, dtype, 1.7, sequence_parallel)
    _check(ranks, seed, dtype, 1.7, sequence_parallel)


def test_without_gradients():
    (hidden, head, teacher, teacher_head), labels, mask = _inputs(0, torch.float32)
    options = {"token_weights": mask, "valid_columns": VOCAB, "labels": labels}
    with torch.no_grad():
        plain = linear_kl(hidden, head, teacher, teacher_head, **options)
    hidden.requires_grad_()
    tracked = linear_kl(hidden, head, teacher, teacher_head, **options)
    torch.testing.assert_close(plain.forward_kl, tracked.forward_kl.detach())
    torch.testing.assert_close(plain.cross_entropy, tracked.cross_entropy)


def test_a_gradient_out_of_proportion_is_refused():
    (hidden, head, teacher, teacher_head), _, mask = _inputs(0, torch.float32)
    hidden.requires_grad_()
    result = linear_kl(hidden, head, teacher, teacher_head, token_weights=mask, valid_columns=VOCAB)
    with pytest.raises(RuntimeError, match="not proportional to its token_weights"):
        result.forward_kl.square().sum().backward()


def test_masked_tokens_alone():
    (hidden, head, teacher, teacher_head), _, mask = _inputs(0, torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    result = linear_kl(
        hidden, head, teacher, teacher_head, token_weights=mask * 0, valid_columns=VOCAB
    )
    result.forward_kl.sum().backward()
    assert result.forward_kl.count_nonzero() == 0
    assert hidden.grad.count_nonzero() == 0
    assert head.grad.count_nonzero() == 0
