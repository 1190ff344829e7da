"""The sum of partial results against float64."""

import pytest
import torch
from precision import DTYPES

from vit_triton.cpu.driver import use_cpu_driver
from vit_triton.kernels.launch import launch
from vit_triton.kernels.sums import sum_parts as kernels
from vit_triton.kernels.sums.config import SumConfig

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 11), (32, 257), (33, 64), (396, 40)])
def test_sum_of_parts(shape, dtype):
    parts = torch.randn(shape)
    with use_cpu_driver():
        total = kernels.sum_parts(parts, dtype)
    assert total.dtype == dtype and total.shape == parts.shape[1:] and total.is_contiguous()
    exact, size = parts.double().sum(0), parts.double().abs().sum(0)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + shape[0] * torch.finfo(torch.float32).eps * size
    assert ((total - exact).abs() <= bound).all()


@pytest.mark.parametrize("n_parts", [(1, 1), (1, 3), (3, 20), (396, 396)])
def test_sum_of_a_pair(n_parts, monkeypatch):
    """Sizes that are no multiples of a block, in one launch unless the results are the parts."""
    launches = []
    monkeypatch.setattr(kernels, "launch", lambda *args, **options: launches.append(args) or launch(*args, **options))
    first, second = torch.randn(n_parts[0], 7, 11), torch.randn(n_parts[1], 50)
    with use_cpu_driver():
        totals = kernels.sum_pair(first, second, torch.float32)
        expected = [kernels.sum_parts(parts, torch.float32) for parts in (first, second)]
    for total, reference in zip(totals, expected, strict=True):
        torch.testing.assert_close(total, reference, rtol=1e-6, atol=1e-5)
    assert len(launches) == {(1, 1): 0, (1, 3): 2}.get(n_parts, 3)


def test_strided_parts():
    parts = torch.randn(9, 2, 50)
    with use_cpu_driver():
        total = kernels.sum_parts(parts[:, 1], torch.float32)
    torch.testing.assert_close(total, parts[:, 1].sum(0))


@pytest.mark.parametrize("block_p", [1, 4])
def test_sum_with_every_tile_size(block_p, monkeypatch):
    monkeypatch.setattr(kernels, "pick_sum_parts", lambda *args: SumConfig(block_p, 16, 1))
    parts = torch.randn(10, 37)
    with use_cpu_driver():
        total = kernels.sum_parts(parts, torch.float32)
    torch.testing.assert_close(total, parts.sum(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_part_is_returned_uncopied(dtype):
    assert kernels.new_partials(torch.empty(0), 2, 5, dtype=dtype).dtype == torch.float32
    partials = kernels.new_partials(torch.empty(0), 1, 5, dtype=dtype)
    total = kernels.sum_parts(partials, dtype)
    assert total.dtype == dtype and total.shape == (5,) and total.data_ptr() == partials.data_ptr()
