"""The product of two FP8 matrices, on units for it or by the same steps in FP32.

    out = (left @ right.T) * left_scale * right_scale + bias,    rounded once

Both operands are row-major along the axis that is summed over, the only layout that Hopper's tensor
cores read. Where there are no such units, on a CPU or an older GPU, the bytes are widened and
multiplied in FP32: the same bytes in, sums in another order.

CUDA's rules hold everywhere, so that what runs on a CPU runs on a GPU: sizes that are multiples of
16, and no product of two E5M2 matrices (`Recipe` refuses those).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ALIGNMENT", "has_units", "padded", "scaled_product"]

ALIGNMENT = 16
"""Sizes that are summed over, or contiguous in the result, are multiples of it."""


def padded(size: int) -> int:
    """The multiple of `ALIGNMENT` at or above `size`.

    >>> padded(16), padded(17), padded(0)
    (16, 32, 0)
    """
    return -(-size // ALIGNMENT) * ALIGNMENT


def has_units(device: torch.device) -> bool:
    """Whether `device` multiplies FP8 matrices itself: NVIDIA's from sm_89 on.

    >>> import torch
    >>> from mixprec.float8 import has_units
    >>> has_units(torch.device("cpu"))
    False
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.compiler.is_compiling():  # asks while it traces, which costs a pass nothing
        return torch.cuda.get_device_capability(device) >= (8, 9)
    if device not in _capability:
        _capability[device] = torch.cuda.get_device_capability(device)
    return _capability[device] >= (8, 9)


_capability: dict[torch.device, tuple[int, int]] = {}


def scaled_product(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """`(left @ right.T) * left_scale * right_scale + bias` in `out_dtype`.

    Args:
        left, right: FP8, `[m, k]` and `[n, k]`, contiguous, k and n multiples of 16.
        left_scale, right_scale: FP32 factors, `[1]`, or `[m, 1]` and `[n, 1]`.
        bias: `[n]` in `out_dtype`.
        fast: sums in the tensor cores' short register where there are any.
    """
    _check_sizes(left, right)
    if 0 in (left.shape[0], left.shape[1]):
        return _without_addends(left, right, bias, out_dtype)
    if not has_units(left.device):
        return _emulated(left, right, left_scale, right_scale, bias, out_dtype)
    if left_scale.ndim == 2 or right_scale.ndim == 2:
        left_scale = left_scale.expand(left.shape[0], 1).contiguous()
        right_scale = right_scale.expand(right.shape[0], 1).contiguous().t()
    # Units add a 16-bit bias before they round, but none to an FP32 result.
    added = None if out_dtype == torch.float32 else bias
    product = torch._scaled_mm(
        left,
        right.t(),
        scale_a=left_scale,
        scale_b=right_scale,
        bias=added,
        out_dtype=out_dtype,
        use_fast_accum=fast,
    )
    return product if bias is None or added is not None else product + bias


def _emulated(
    left: Tensor,
    right: Tensor,
    left_scale: Tensor,
    right_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    with torch.autocast(left.device.type, enabled=False):
        product = _widened(left) @ _widened(right).t()
    product = product * (left_scale.view(-1, 1) * right_scale.view(1, -1))
    return (product if bias is None else product + bias).to(out_dtype)


_VALUES = {
    dtype: torch.arange(256, dtype=torch.uint8).view(dtype).float()
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
}


def _widened(matrix: Tensor) -> Tensor:
    """An FP8 matrix in FP32. On a CPU by a table, which takes a twelfth of the time of a cast."""
    if matrix.device.type != "cpu" or torch.compiler.is_compiling():
        return matrix.float()
    codes = matrix.view(torch.uint8).flatten().int()
    return torch.index_select(_VALUES[matrix.dtype], 0, codes).view(matrix.shape)


def _check_sizes(left: Tensor, right: Tensor) -> None:
    for size in (left.shape[1], right.shape[0]):
        if size % ALIGNMENT:
            raise ValueError(
                f"a product of {list(left.shape)} with {list(right.shape)} transposed has a size "
                f"of {size}, which is no multiple of {ALIGNMENT}; FP8 units take no other"
            )


def _without_addends(
    left: Tensor, right: Tensor, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """A sum over nothing, or a result without rows."""
    out = torch.zeros(left.shape[0], right.shape[0], dtype=out_dtype, device=left.device)
    return out if bias is None else out + bias
