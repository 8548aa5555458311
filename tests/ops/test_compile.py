"""torch.compile takes every function of `minitron.ops` as one graph, on one rank and on two."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from minitron.ops.activation_stats import activation_stats
from minitron.ops.block_cosine import block_cosine
from minitron.ops.cross_entropy import cross_entropy
from minitron.ops.linear_kl import TeacherHidden, linear_kl
from minitron.ops.logit_kl import logit_kl, logit_losses
from minitron.ops.logit_loss import logit_loss
from minitron.ops.objectives import KnownTokens
from minitron.ops.sample_tokens import sample_tokens
from minitron.ops.sparse_kl import SparseKL, sparse_kl
from minitron.ops.top_tokens import top_tokens
from minitron.ops.vocab_parallel import vocab_parallel_argmax
from tests.harness import run_distributed
from tests.ops.definitions import OBJECTIVES

S, B, H, WIDTH, VOCAB = 4, 2, 6, 24, 41
"""Two ranks have 24 columns each, the second with padding; one rank has the first 24 tokens."""

AGREEMENT_STRIDE = 8  # that of training: most chunks have no such position
KINDS_OF_LINEAR_KL = ("forward_kl", "tvd", "cosine", "top_p", "known_tokens")


class Inputs(NamedTuple):
    """Of a rank; the first three have gradients."""

    student: Tensor
    hidden: Tensor
    head: Tensor
    teacher: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    known: KnownTokens
    labels: Tensor
    mask: Tensor


def _inputs(seed: int, rank: int, device: str, s: int = S) -> Inputs:
    common = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(seed + 1 + rank)
    logits = [torch.randn(s, B, WIDTH, generator=own) for _ in range(2)]
    heads = [torch.randn(WIDTH, H, generator=own) for _ in range(2)]
    hidden = [torch.randn(s, B, H, generator=common) for _ in range(2)]
    ids = torch.stack([torch.randperm(WIDTH, generator=common)[:5] for _ in range(s * B)])
    log_probabilities = torch.randn(s, B, 5, generator=common).log_softmax(-1) - 0.3
    known = KnownTokens(ids.view(s, B, 5).to(device), log_probabilities.to(device))
    labels = torch.randint(WIDTH, (s, B), generator=common)
    mask = (torch.rand(s, B, generator=common) < 0.7).float()
    tensors = (logits[0], hidden[0], heads[0], logits[1], hidden[1], heads[1])
    return Inputs(*(x.to(device) for x in tensors), known, labels.to(device), mask.to(device))


def _call(name: str, x: Inputs, options: dict[str, Any]) -> Any:
    """The function under test; its inputs are results of others, so that none is a graph's own."""
    name, _, kind = name.partition(" ")
    student, teacher = 2 * x.student, x.teacher + 1
    match name:
        case "activation_stats":
            return activation_stats(student, group=3)
        case "block_cosine":
            return block_cosine(student, teacher)
        case "cross_entropy":
            return cross_entropy(student, x.labels, **options)
        case "logit_kl":
            return logit_kl(student, teacher, gradient=kind, **options)
        case "logit_losses":
            every = {"reverse": True, "z_loss": True, "loss_mask": x.mask, "temperature": 1.3}
            return logit_losses(student, teacher, labels=x.labels, **every, **options)
        case "logit_loss":
            return logit_loss(student, teacher, OBJECTIVES[kind], loss_mask=x.mask, **options)
        case "sparse_kl":
            return sparse_kl(student, *x.known, tail=True, loss_mask=x.mask, **options)
        case "linear_kl":
            states = TeacherHidden(x.teacher_hidden + 1, x.teacher_head)
            known = kind == "known_tokens"
            return linear_kl(
                2 * x.hidden,
                x.head,
                x.known if known else states,
                objective=SparseKL(tail=True) if known else OBJECTIVES[kind],
                token_weights=x.mask,
                labels=x.labels,
                lm_weight=0.4,
                agreement=1 if kind == "tvd" else AGREEMENT_STRIDE,
                chunk_tokens=3,
                sequence_parallel=kind == "cosine",
                **options,
            )
        case "top_tokens":
            return top_tokens(teacher, 3, p=0.9, **options)
        case "sample_tokens":
            return sample_tokens(teacher, x.mask.double() / 2, 5, **options)
        case "vocab_parallel_argmax":
            return vocab_parallel_argmax(teacher, **options)
    raise ValueError(name)


SHARDED = (
    "cross_entropy",
    *(f"logit_kl {destination}" for destination in ("new", "student", "teacher")),
    "logit_losses",
    *(f"logit_loss {name}" for name in OBJECTIVES),
    "sparse_kl",
    *(f"linear_kl {kind}" for kind in KINDS_OF_LINEAR_KL),
    "top_tokens",
    "sample_tokens",
    "vocab_parallel_argmax",
)


def _run_both(
    name: str, seed: int, backend: str, device: str = "cpu", rank: int = 0, size: int = 1
) -> list[Any]:
    """What the function returns, and its gradients, without torch.compile and with it."""
    options = _options(name, rank, size)
    torch.compiler.reset()
    compiled = torch.compile(_call, fullgraph=True, backend=backend)
    results = []
    for run in (_call, compiled):
        inputs = _inputs(seed, rank, device)
        if name.endswith("cosine") and size > 1:
            parts = (t.chunk(size)[rank] for t in (inputs.hidden, inputs.teacher_hidden))
            inputs = inputs._replace(**dict(zip(("hidden", "teacher_hidden"), parts, strict=True)))
        results.append(_results(run, name, inputs, options))
    return results


def _options(name: str, rank: int = 0, size: int = 1) -> dict[str, Any]:
    if name not in SHARDED:
        return {}
    group = dist.group.WORLD if size > 1 else None
    return {"valid_columns": min(WIDTH, VOCAB - rank * WIDTH), "tp_group": group}


def _results(run: Any, name: str, inputs: Inputs, options: dict[str, Any]) -> list[Any]:
    """What is returned, then the gradients."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    found = run(name, Inputs(*leaves, *inputs[3:]), options)
    found = [found] if isinstance(found, Tensor) else list(found)
    losses = [loss for loss in found if loss.requires_grad]
    weights = inputs.mask if name.startswith("linear_kl") else 1
    if losses:
        sum((weights * loss).sum() for loss in losses).backward()
    return [*(x.detach() for x in found), *(x.grad for x in leaves)]


def _on_rank(name: str, seed: int) -> list[Any]:
    return _run_both(name, seed, "aot_eager", "cpu", dist.get_rank(), dist.get_world_size())


def _check(eager: list[Any], compiled: list[Any], *, rounding: float = 0) -> None:
    assert any(x is not None and x.count_nonzero() for x in eager)
    torch.testing.assert_close(compiled, eager, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("name", ["activation_stats", "block_cosine", *SHARDED])
def test_one_graph(name, device, seed):
    _check(*_run_both(name, seed, "aot_eager", device))


@pytest.mark.parametrize("name", SHARDED)
def test_one_graph_of_a_sharded_vocabulary(name, seed):
    for both in run_distributed(_on_rank, 2, name, seed):
        _check(*both)


@pytest.mark.parametrize(
    "name",
    [
        *("activation_stats", "block_cosine", "cross_entropy", "logit_kl new", "sparse_kl"),
        *(f"logit_loss {name}" for name in ("forward_kl", "jsd", "mse", "top_k")),
        *("linear_kl forward_kl", "linear_kl known_tokens", "top_tokens", "vocab_parallel_argmax"),
    ],
)
def test_one_graph_for_any_number_of_tokens(name, seed):
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_call, fullgraph=True, backend=backend, dynamic=True)
    graphs = []
    for s in (S, S + 3):
        inputs = _inputs(seed, 0, "cpu", s)
        eager, found = (_results(run, name, inputs, _options(name)) for run in (_call, compiled))
        _check(eager, found)
        graphs.append(backend.frame_count)
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize("name", ["linear_kl forward_kl", "logit_loss jsd"])
def test_inductor_takes_the_graph(name, seed):
    _check(*_run_both(name, seed, "inductor"), rounding=1e-6)
