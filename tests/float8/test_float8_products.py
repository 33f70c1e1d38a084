"""Scaled products by the rules of CUDA, on a device without units for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixprec.float8.products import scaled_product

ONE = torch.ones(1)


def fp8(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(-4, 5, shape).float().to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("left", "right", "size"), [((4, 24), (16, 24), 24), ((4, 32), (17, 32), 17)]
)
def test_sizes_that_no_tensor_core_takes_are_refused_on_a_cpu_too(
    left: tuple[int, int], right: tuple[int, int], size: int
) -> None:
    with pytest.raises(ValueError, match=f"has a size of {size}, which is no multiple of 16"):
        scaled_product(fp8(*left), fp8(*right), ONE, ONE, None, torch.float32, False)


@pytest.mark.parametrize("shape", [(5, 0), (0, 32)])
def test_sums_over_nothing_are_the_bias(shape: tuple[int, int]) -> None:
    bias = torch.arange(16).bfloat16()
    right = fp8(16, shape[1])
    got = scaled_product(fp8(*shape), right, ONE, ONE, bias, torch.bfloat16, False)
    assert torch.equal(got, bias.expand(shape[0], 16))
    assert not scaled_product(fp8(*shape), right, ONE, ONE, None, torch.bfloat16, False).any()


@pytest.mark.parametrize("rows", [ONE * 2, torch.tensor([[1.0], [2.0], [4.0]])])
@pytest.mark.parametrize("columns", [ONE * 0.5, 2.0 ** torch.arange(16).view(16, 1)])
def test_factors_of_rows_and_of_the_whole_go_together(rows: Tensor, columns: Tensor) -> None:
    left, right, bias = fp8(3, 32), fp8(16, 32), torch.arange(16.0)
    got = scaled_product(left, right, rows, columns, bias, torch.float32, False)
    a, b = left.double() * rows.view(-1, 1), right.double() * columns.view(-1, 1)
    assert torch.equal(got.double(), a @ b.T + bias)  # small integers and powers of two: exact


def test_the_result_is_rounded_once() -> None:
    left, right = fp8(3, 32), fp8(16, 32)
    third = torch.tensor([1 / 3])
    got = scaled_product(left, right, third, ONE, None, torch.bfloat16, False)
    assert torch.equal(got, ((left.float() @ right.float().T) * third).bfloat16())
