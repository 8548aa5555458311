"""Against fp64 sums of the same values."""

import pytest
import torch

from minitron.ops import library
from minitron.ops.activation_stats import activation_stats

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 2, 64), (267, 3, 37), (530, 1, 2100)], ids=str)
def test_sums_over_the_sequence(shape, dtype, device):
    x = (torch.randn(shape, device=device) + 0.5).to(dtype)
    wide = x.double()
    stats = activation_stats(x)
    for found, expected in (
        (stats.abs_sum, wide.abs().sum(0)),
        (stats.square_sum, wide.square().sum(0)),
        (stats.sum, wide.sum(0)),
        (stats.abs_max, wide.abs().amax(0)),
    ):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 5, 16, 128])
def test_norms_of_heads(head_dim, dtype, device):
    x = torch.randn(31, 2, 3 * head_dim, device=device).to(dtype)
    norms = x.double().unflatten(-1, (3, head_dim)).norm(dim=-1)
    if head_dim == 1:
        norms = x.double()
    stats = activation_stats(x, group=head_dim)
    torch.testing.assert_close(stats.abs_sum, norms.abs().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.square_sum, norms.square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.abs_max, norms.abs().amax(0), rtol=1e-6, atol=1e-6)


def test_a_strided_activation(device):
    x = torch.randn(9, 2, 70, device=device)
    cut = x[..., 3:60]
    assert torch.equal(
        torch.stack(activation_stats(cut)), torch.stack(activation_stats(cut.contiguous()))
    )


def test_threads_do_not_change_a_digit():
    x = torch.randn(300, 2, 333)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.stack(activation_stats(x)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("group", [1, 128], ids=["channels", "heads"])
def test_the_same_digits_every_time(group, device):
    x = torch.randn(700, 3, 384, device=device)
    first, second = (torch.stack(activation_stats(x, group=group)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("row", [3, 255, 599])
def test_nan_is_seen_and_the_maximum_passes_over_it(row, device):
    x = torch.zeros(600, 1, 40, device=device)
    x[2, 0, 7] = 5
    x[row, 0, 7] = torch.nan
    *sums, largest = activation_stats(x)
    for total in sums:
        assert total.isnan().sum() == 1
    if x.device.type in library.kernel_devices:
        assert largest.max() == 5


@pytest.mark.parametrize("group", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_op_keeps_the_contract_of_torch(group, dtype, device):
    x = torch.randn(9, 2, 12, device=device).to(dtype).requires_grad_()
    torch.library.opcheck(torch.ops.minitron.activation_stats, (x, group))


def test_an_empty_sequence(device):
    for sums in activation_stats(torch.zeros(0, 2, 12, device=device)):
        assert sums.shape == (2, 12)
        assert sums.count_nonzero() == 0


def test_a_group_must_divide():
    with pytest.raises(ValueError, match="group=5 does not divide 12 channels"):
        activation_stats(torch.zeros(2, 2, 12), group=5)


def test_gradient():
    def gradient(x):
        return torch.autograd.grad(torch.stack(activation_stats(x)).sum(), x)[0]

    x = torch.randn(6, 2, 12, requires_grad=True)
    expected = gradient(x.detach().double().requires_grad_())
    torch.testing.assert_close(gradient(x).double(), expected, rtol=1e-5, atol=1e-5)
