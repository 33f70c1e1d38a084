"""Byte by byte against torchao.float8, and its own tests' bars for a linear layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixprec import Precision, formats
from mixprec.float8.casts.cast import cast_rowwise, cast_tensorwise
from mixprec.formats import E4M3, E5M2, Format

pytestmark = pytest.mark.thirdparty

NO_EXTRA = "needs the thirdparty extra: pip install -e '.[test,thirdparty]'"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on import: kernels that a CPU build of torch cannot load
    pytest.importorskip("torchao", reason=NO_EXTRA)
    theirs: Any = pytest.importorskip("torchao.float8", reason=NO_EXTRA)
    scaling: Any = pytest.importorskip("torchao.float8.float8_scaling_utils", reason=NO_EXTRA)
    tensors: Any = pytest.importorskip("torchao.float8.float8_training_tensor", reason=NO_EXTRA)
    config: Any = pytest.importorskip("torchao.float8.config", reason=NO_EXTRA)
    utils: Any = pytest.importorskip("torchao.float8.float8_utils", reason=NO_EXTRA)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def their_cast(x: Tensor, format: Format, axis: int | None, power_of_two: bool) -> Any:
    """Their FP8 tensor: `_data` and the multiplier `_scale`."""
    plain: Any = tensors.ScaledMMConfig()
    granularity = config.ScalingGranularity
    return scaling.hp_tensor_to_float8_dynamic(
        x,
        format.dtype,
        tensors.LinearMMConfig(plain, plain, plain),
        scaling_granularity=granularity.TENSORWISE if axis is None else granularity.AXISWISE,
        axiswise_dim=axis,
        round_scales_to_power_of_2=power_of_two,
    )


def matrices(dtype: torch.dtype) -> dict[str, Tensor]:
    """Finite, of sizes from the smallest to the largest; FP32's largest ones, and zeros."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(48, 80, generator=generator)
    wide = normal * torch.exp2(torch.randint(-12, 12, (48, 80), generator=generator))
    smallest = float(torch.finfo(dtype).smallest_normal)
    found = {
        "normal": normal,
        "gradients": normal * 2.0**-12,
        "wide": wide,
        "rows": normal * torch.exp2(torch.arange(48.0)[:, None] / 4),
        "with zeros": normal * (torch.arange(48)[:, None] % 3 > 0),
        "zeros": torch.zeros(48, 80),
        "smallest": normal * smallest,
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def assert_bytes_equal(ours: Tensor | None, other: Tensor) -> None:
    assert ours is not None
    mine, wanted = ours.view(torch.uint8), other.contiguous().view(torch.uint8)
    assert torch.equal(mine, wanted), (mine != wanted).nonzero()[:5]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensorwise_bytes_and_factors_are_theirs(
    dtype: torch.dtype, format: Format, power_of_two: bool
) -> None:
    for name, x in matrices(dtype).items():
        ours = cast_tensorwise(x, format, power_of_two=power_of_two)
        other = their_cast(x, format, None, power_of_two)
        assert_bytes_equal(ours.rows, other._data)
        assert_bytes_equal(ours.cols, other._data.t())
        assert torch.equal(ours.row_scale, other._scale.reciprocal().view(1)), name


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("format", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rowwise_bytes_and_factors_are_theirs(
    dtype: torch.dtype, format: Format, power_of_two: bool
) -> None:
    for name, x in matrices(dtype).items():
        ours = cast_rowwise(x, format, power_of_two=power_of_two)
        by_row, by_col = (their_cast(x, format, axis, power_of_two) for axis in (-1, 0))
        assert_bytes_equal(ours.rows, by_row._data)
        assert_bytes_equal(ours.cols, by_col._data.t())
        assert torch.equal(ours.row_scale, by_row._scale.reciprocal()), name
        assert torch.equal(ours.col_scale, by_col._scale.reciprocal().t()), name


# ------------------------------------------------------------------ a layer


def snr(got: Tensor, exact: Tensor) -> float:
    return float(utils.compute_error(exact.detach().double(), got.detach().double()))


def results(linear: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = linear(x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad, "dw": linear.weight.grad}
    if linear.bias is not None:
        found["db"] = linear.bias.grad
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 16), (2, 16, 16), (3, 2, 16, 16)], ids=str)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_a_layer_is_theirs_and_passes_the_bars_of_their_tests(
    recipe: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    """Their `test_linear_from_recipe`: y at 18 dB, weight gradients at 17, bias gradients equal."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:-1], 32).to(dtype)
    plain = nn.Linear(16, 32, bias, dtype=dtype)
    state = plain.state_dict()
    options = replace(config.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    other = theirs.float8_linear.Float8Linear.from_float(
        nn.Linear(16, 32, bias, dtype=dtype), options
    )
    other.load_state_dict(state)
    model = nn.Sequential(nn.Linear(16, 32, bias, dtype=dtype))
    params = formats.by_dtype(dtype)
    Precision("fp8", recipe=recipe, params=params).convert(model, min_dim=16)
    model[0].load_state_dict(state)

    before, ours, their = (results(layer, x, dy) for layer in (plain, model[0], other))
    assert snr(ours["y"], before["y"]) > 18
    assert snr(ours["dx"], before["dx"]) > 17
    assert snr(ours["dw"], before["dw"]) > 17
    # The same bytes multiplied in FP32: what differs is the order of sums and how often 16-bit
    # results are rounded, 2^-9 of each, 54 dB.
    for name, tensor in ours.items():
        assert snr(tensor, their[name]) > 48, name
