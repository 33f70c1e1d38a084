"""Norm, finiteness and scaling of gradients against FP64, and their behaviour at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

import mixprec
from mixprec.gradients import grad_norm, local, nonfinite_names, scale_

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
BAD = [float("inf"), -float("inf"), float("nan")]


def random_grads(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3,), (64, 5), (), (0, 4), (1000,)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def sparse(indices: list[int], values: list[float], size: int = 5) -> Tensor:
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(torch.tensor([indices]), torch.tensor(values), (size,))


def exact_norm(grads: list[Tensor]) -> float:
    return torch.cat([grad.double().reshape(-1) for grad in grads]).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_norm_of_16_bit_gradients_is_as_good_as_that_of_fp32_ones(dtype: torch.dtype) -> None:
    grads = random_grads(0, dtype)
    norm = grad_norm(grads)
    assert norm.dtype == torch.float32 and norm.shape == ()
    # Squares and sums each round once in FP32; pairwise sums of 1,324 terms stay within 2^-20.
    assert norm.item() == pytest.approx(exact_norm(grads), rel=2**-20)


def test_norm_takes_all_dtypes_as_one_vector() -> None:
    grads = [torch.tensor([3.0], dtype=dtype) for dtype in (torch.float32, *SIXTEEN_BITS)]
    grads.append(torch.tensor([3.0] * 13))
    assert grad_norm(grads).item() == 12.0


def test_norm_is_fp64_if_any_gradient_is() -> None:
    grads = [grad.double() for grad in random_grads(1)] + random_grads(2)
    norm = grad_norm(grads)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact_norm(grads), rel=1e-13)


def test_norm_of_fp16_gradients_does_not_overflow_where_fp16_does() -> None:
    half = torch.full((1000,), 3000.0, dtype=torch.float16)
    assert torch.linalg.vector_norm(half).isinf()
    assert grad_norm([half]).item() == pytest.approx(3000 * 1000**0.5, rel=1e-6)


def test_norm_of_nothing_is_zero() -> None:
    assert grad_norm([]).item() == 0
    assert grad_norm([torch.empty(0), torch.empty(2, 0)]).item() == 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN_BITS])
def test_one_bad_element_anywhere_makes_the_norm_non_finite(bad: float, dtype: torch.dtype) -> None:
    for index in range(5):
        grads = random_grads(3, dtype)
        if grads[index].numel():
            grads[index].view(-1)[-1] = bad
            assert not torch.isfinite(grad_norm(grads)).item()
            assert nonfinite_names((str(i), grad) for i, grad in enumerate(grads)) == [str(index)]


def test_repeated_indices_of_a_sparse_gradient_count_as_their_sum() -> None:
    assert grad_norm([sparse([1, 1, 4], [1.0, 2.0, 4.0])]).item() == 5.0
    cancelling = sparse([1, 1], [float("inf"), -float("inf")])
    assert nonfinite_names([("embedding", cancelling)]) == ["embedding"]


def test_scaling_multiplies_in_place_every_kind_of_gradient() -> None:
    grads = [*random_grads(4), *random_grads(5, torch.float64), sparse([1, 1], [1.0, 2.0])]
    expected = [grad.to_dense() * 0.25 for grad in grads]
    for factor in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        scale_(grads, factor)
    for grad, want in zip(grads, expected, strict=True):
        assert torch.equal(grad.to_dense(), want)


@pytest.mark.parametrize("exponent", [-40, -1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_by_a_power_of_two_and_back_changes_no_bit(
    exponent: int, dtype: torch.dtype
) -> None:
    grads, before = random_grads(6, dtype), random_grads(6, dtype)
    scale_(grads, torch.tensor(2.0**exponent))
    scale_(grads, torch.tensor(2.0**-exponent))
    assert all(map(torch.equal, grads, before))


def test_an_fp64_factor_is_rounded_once() -> None:
    third = torch.tensor(1 / 3, dtype=torch.float64)
    single, double = torch.ones(7), torch.ones(7, dtype=torch.float64)
    scale_([single, double], third)
    assert torch.equal(single, third.float().expand(7)) and torch.equal(double, third.expand(7))


def test_names_come_in_order_up_to_the_limit_and_skip_missing_gradients() -> None:
    bad = torch.tensor([1.0, float("nan")])
    named = [("a", None), ("b", bad), ("c", torch.ones(2)), ("d", bad), ("e", bad)]
    assert nonfinite_names(named) == ["b", "d", "e"]
    assert nonfinite_names(named, limit=2) == ["b", "d"]


def test_a_plain_tensor_is_its_own_local_part() -> None:
    tensor = torch.ones(2)
    assert local(tensor) is tensor


@pytest.mark.parametrize("view", [Tensor.detach, lambda grad: grad.view(3, 2), Tensor.t])
def test_one_memory_in_two_gradients_is_scaled_once(view: Any) -> None:
    grad = torch.arange(6.0).reshape(2, 3)
    before = grad.clone()
    scale_([grad, view(grad), torch.empty(0), torch.empty(0)], torch.tensor(0.5))
    assert torch.equal(grad, before / 2)


def test_a_step_scales_gradients_that_share_their_memory_once() -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    scaler = mixprec.StaticLossScaler(4.0)
    optimizer = mixprec.MixedPrecision(SGD(params, lr=1.0), loss_scaler=scaler)
    scaler.multiply(torch.ones(()))
    params[0].grad = torch.full((3,), 2.0)
    params[1].grad = params[0].grad.detach()
    optimizer.step()
    assert [p.tolist() for p in params] == [[0.5] * 3] * 2
