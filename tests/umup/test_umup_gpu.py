"""Unit-scaled products on a CUDA device: the numbers of the CPU, and no pass of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixprec import umup
from mixprec.umup import functional as U

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (U.linear, ((4, 64, 96), (160, 96))),
    "linear with a bias": (U.linear, ((4, 64, 96), (160, 96), (160,))),
    "linear, vector": (U.linear, ((96,), (160, 96), (160,))),
    "linear, no rows": (U.linear, ((0, 96), (160, 96))),
    "linear_readout": (U.linear_readout, ((256, 96), (160, 96))),
    "matmul": (U.matmul, ((3, 64, 96), (96, 32))),
    "conv1d": (U.conv1d, ((4, 16, 64), (32, 16, 3))),
    "conv2d": (U.conv2d, ((4, 16, 16, 16), (32, 16, 3, 3), (32,))),
    "silu_glu": (U.silu_glu, ((64, 96), (64, 96))),
    "attention": (
        lambda q, k, v: U.scaled_dot_product_attention(q, k, v, is_causal=True, seq_len=64),
        ((2, 4, 64, 32),) * 3,
    ),
}


def results(
    function: Callable[..., Tensor],
    shapes: tuple[tuple[int, ...], ...],
    device: str,
    dtype: torch.dtype,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    # Rounded to BF16 first, so that all devices and dtypes are given the same numbers.
    inputs = [torch.randn(s, generator=g).bfloat16().to(device, dtype) for s in shapes]
    for x in inputs:
        x.requires_grad_()
    y = function(*inputs)
    dy = torch.randn(y.shape, generator=g).bfloat16().to(device, dtype)
    return [t.detach().cpu().double() for t in (y, *torch.autograd.grad(y, inputs, dy))]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_bf16_on_the_device_is_within_bf16_of_fp64_on_the_cpu(name: str, compiled: bool) -> None:
    function, shapes = SHAPES[name]
    exact = results(function, shapes, "cpu", torch.float64)
    if compiled:
        torch._dynamo.reset()
        function: Any = torch.compile(function)
    found = results(function, shapes, "cuda", torch.bfloat16)
    for place, (ours, right) in enumerate(zip(found, exact, strict=True)):
        # One rounding is 1.7e-3 by norm; attention and activations have several.
        error, size = float((ours - right).norm()), float(right.norm())
        assert error <= 1e-2 * size, f"{name}, result {place}: {error:.2e} of {size:.2e}"


def test_a_product_without_a_bias_reads_nothing_that_was_not_given() -> None:
    """Memory that holds NaN is handed to the product as the addend that beta=0 leaves out."""
    for _ in range(4):  # the allocator hands freed blocks out again as they are
        torch.full((1,), torch.nan, device="cuda", dtype=torch.bfloat16)
    x = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
    assert bool((umup.functional.linear(x, x) == 8).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_does_not_round_its_multiplier_to_16_bits(dtype: torch.dtype) -> None:
    x, dy = (torch.zeros(8, 3, device="cuda", dtype=dtype) for _ in range(2))
    x[:, 0], dy[:, 0] = 171.0, 171.0
    x.requires_grad_()
    y = U.linear(x, torch.eye(3, device="cuda", dtype=dtype))
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = (171 * torch.tensor(3.0, dtype=torch.float64) ** -0.5).to(dtype)
    assert y[0, 0].item() == exact.item(), y[0, 0]  # BF16: 98.5; with 3^-1/2 rounded first, 99
    assert dx[0, 0].item() == exact.item(), dx[0, 0]


def test_a_unit_scaled_linear_launches_no_more_kernels_than_a_plain_one() -> None:
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    counts: list[int] = []
    for function in (torch.nn.functional.linear, U.linear):
        y: Tensor = function(x, w)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))  # loads what is loaded once
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            y = function(x, w)
            torch.autograd.grad(y, (x, w), x)
            torch.cuda.synchronize()
        counts.append(sum(event.count for event in profile.key_averages()))
    assert counts[1] <= counts[0], counts
