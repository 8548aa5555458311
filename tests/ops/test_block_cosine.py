"""Against fp64."""

import pytest
import torch

from minitron.ops.block_cosine import block_cosine


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 96, 4097])
def test_cosine_of_every_token(hidden, dtype, device):
    before, noise = torch.randn(2, 7, 3, hidden, device=device)
    before, after = before.to(dtype), (before + 0.3 * noise).to(dtype)
    x, y = before.double(), after.double()
    expected = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    found = block_cosine(before, after)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_token_of_zeros(device):
    ones = torch.ones(1, 1, 20, device=device)
    assert block_cosine(ones - 1, ones).item() == 0


def test_strided_activations(device):
    before, after = torch.randn(2, 5, 3, 40, device=device).transpose(1, 2)
    assert torch.equal(
        block_cosine(before, after), block_cosine(before.contiguous(), after.contiguous())
    )


def test_op_keeps_the_contract_of_torch(device):
    arguments = [torch.randn(4, 2, 33, device=device, requires_grad=True) for _ in range(2)]
    torch.library.opcheck(torch.ops.minitron.block_cosine, arguments)


def test_activations_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"\[1, 2, 3\] of torch.float32 .* \[1, 2, 4\] of"):
        block_cosine(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_gradient():
    before, after = (torch.randn(6, 2, 12, requires_grad=True) for _ in range(2))
    upstream = torch.randn(6, 2)
    found = torch.autograd.grad(block_cosine(before, after), (before, after), upstream)
    wide = [x.detach().double().requires_grad_() for x in (before, after)]
    expected = torch.autograd.grad(torch.cosine_similarity(*wide, dim=-1), wide, upstream.double())
    torch.testing.assert_close([x.double() for x in found], list(expected), rtol=1e-5, atol=1e-6)
