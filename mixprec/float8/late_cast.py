"""The transpose of a weight in FP8, made in the backward pass and no earlier.

A layer under FSDP2 saves its gathered weight for the backward pass, which costs nothing: FSDP2
frees the memory behind it, and fills it again before that pass. A transpose in FP8, saved, would
keep a byte of each parameter of the whole model until then. A compiler does see that the transpose
depends on nothing but the weight, and may well move its cast into the forward pass and save it. So
the operator that casts takes the gradient of the output too, and ignores it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixprec import formats
from mixprec.float8.casts.cast import has_kernel
from mixprec.float8.operand import cast_as, cast_named
from mixprec.float8.operators import operator
from mixprec.float8.products import padded
from mixprec.float8.recipe import Cast

__all__ = ["late_cast", "transposed"]


def late_cast(
    weight: Tensor, grad_output: Tensor, cast: Cast, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`weight` `[R, C]` transposed in FP8, `[C, R16]`, and its factor, empty if it was FP8 before.

    Args:
        weight: BF16, FP16 or FP32; or FP8 already, with R a multiple of 16.
        grad_output: any tensor that is not known before the backward pass.
        cast: how.
        scale: FP32 `[2]`, see `cast_scaled`; read if `cast` has an exponent.
    """
    options = cast.format.name, cast.scaling, cast.power_of_two
    if torch.compiler.is_compiling():
        return _op(weight, grad_output, scale, *options)
    return _late_cast(weight, grad_output, scale, *options)


def transposed(weight: Tensor) -> Tensor:
    """`weight.t().contiguous()` of a contiguous FP8 matrix."""
    if weight.numel() and has_kernel(weight.device):
        from mixprec.float8.casts import transpose_kernels as kernels

        return kernels.transpose(weight.view(torch.uint8)).view(weight.dtype)
    return weight.view(torch.uint8).t().contiguous().view(weight.dtype)


def _late_cast(
    weight: Tensor,
    grad_output: Tensor,
    scale: Tensor,
    format: str,
    scaling: str,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    plan = cast_named(format, scaling, power_of_two)
    if weight.dtype == plan.format.dtype:
        return transposed(weight), scale.new_empty(0)
    made = cast_as(plan, weight, scale, None, False, True)
    assert made.cols is not None
    return made.cols, made.col_scale


def _fake(
    weight: Tensor,
    grad_output: Tensor,
    scale: Tensor,
    format: str,
    scaling: str,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, num_cols = weight.shape
    dtype = formats.by_name(format).dtype
    factors = (num_cols, 1) if scaling == "rowwise" else (1,)
    return (
        weight.new_empty(num_cols, padded(num_rows), dtype=dtype),
        scale.new_empty((0,) if weight.dtype == dtype else factors),
    )


_op = operator("float8_late_cast", _late_cast, _fake, mutates=())
