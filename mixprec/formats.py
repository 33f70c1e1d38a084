"""The five number formats of mixed precision as data, and the casts between them.

A format is a count of exponent bits and a count of mantissa bits; range and spacing follow from the
two. Three moves connect the formats:

- `cast` stores a tensor in a format and saturates. Torch's own cast to `float8_e4m3fn` turned 480
  into NaN up to 2.11 and turns it into 448 since 2.12; clamping first gives one answer everywhere.
- `round_to` snaps values to a format and leaves them in FP32, to show what a format does on a
  processor that has no units for it.
- `split` and `join` store an FP32 tensor exactly as a BF16 tensor and 16 bits of remainder:

      bf16 = (bits + 0x8000) >> 16,  int16 = the low half of bits,  bits = (bf16 << 16) + int16

  The BF16 half is the FP32 value rounded to nearest, ties away from zero. With ties to even, an
  even BF16 mantissa would own 65,537 FP32 values, one more than 16 bits can tell apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ALL",
    "BF16",
    "E4M3",
    "E5M2",
    "FP16",
    "FP32",
    "Format",
    "by_dtype",
    "by_name",
    "cast",
    "join",
    "round_to",
    "split",
]


@dataclass(frozen=True)
class Format:
    """A bit layout: one sign, `exponent_bits`, `mantissa_bits`, IEEE 754 bias and subnormals.

    >>> from mixprec import formats
    >>> formats.E4M3.max, formats.E4M3.smallest_subnormal == 2.0**-9
    (448.0, True)
    """

    name: str
    dtype: torch.dtype
    exponent_bits: int
    mantissa_bits: int
    max: float
    """Largest finite value."""
    has_inf: bool = True
    """False where the codes of the infinities hold ordinary values instead."""

    @property
    def bits(self) -> int:
        """Size of one value."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def epsilon(self) -> float:
        """Distance from 1.0 to the next larger value."""
        return 2.0**-self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with the full mantissa."""
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1))

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value; half of it and everything below rounds to 0."""
        return self.smallest_normal * self.epsilon

    def __str__(self) -> str:
        return self.name


FP32 = Format("fp32", torch.float32, 8, 23, max=(2 - 2.0**-23) * 2.0**127)
BF16 = Format("bf16", torch.bfloat16, 8, 7, max=(2 - 2.0**-7) * 2.0**127)
FP16 = Format("fp16", torch.float16, 5, 10, max=65504.0)
# The OCP 8-bit formats. E4M3 gives up the infinities for one more binade: 448 sits where inf would.
E4M3 = Format("e4m3", torch.float8_e4m3fn, 4, 3, max=448.0, has_inf=False)
E5M2 = Format("e5m2", torch.float8_e5m2, 5, 2, max=57344.0)

ALL = (FP32, BF16, FP16, E4M3, E5M2)


def by_name(name: str) -> Format:
    """The format called `name`, here or as a torch dtype: "bf16", "bfloat16", "torch.bfloat16".

    >>> from mixprec import formats
    >>> formats.by_name("float8_e5m2").name
    'e5m2'
    """
    wanted = name.strip().lower().removeprefix("torch.")
    for format in ALL:
        if wanted in (format.name, str(format.dtype).removeprefix("torch.")):
            return format
    raise ValueError(f"unknown format {name!r}; use one of {', '.join(map(str, ALL))}")


def by_dtype(dtype: torch.dtype) -> Format:
    """The format that `dtype` stores.

    >>> import torch
    >>> from mixprec import formats
    >>> formats.by_dtype(torch.half).max
    65504.0
    """
    for format in ALL:
        if dtype == format.dtype:
            return format
    known = ", ".join(str(format.dtype) for format in ALL)
    raise ValueError(f"no format stores {dtype}; use one of {known}")


def cast(tensor: Tensor, format: Format) -> Tensor:
    """`tensor` in `format.dtype`, rounded to nearest even, saturating at +-`format.max`.

    Infinities saturate as well, in every format, so a cast hides an overflow: look for non-finite
    values before it. NaN stays NaN, zeros keep their signs. FP64 is rounded to FP32 on its way to
    fewer bits, as torch does.

    Raises:
        TypeError: if `tensor` is not floating-point.

    >>> import torch
    >>> from mixprec import formats
    >>> formats.cast(torch.tensor([1e9, -480.0, 17.0]), formats.E4M3).float()
    tensor([ 448., -448.,   16.])
    """
    if not tensor.is_floating_point():
        raise TypeError(f"cast got {tensor.dtype}; it needs a floating-point tensor")
    # FP32 holds every value of the narrower formats, and unlike FP16 also every format's max.
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return wide.clamp(-format.max, format.max).to(format.dtype)


def round_to(tensor: Tensor, format: Format) -> Tensor:
    """The values of `tensor` after a trip through `format`, still in the dtype of `tensor`.

    Equal to `tensor.to(format.dtype).to(tensor.dtype)`: nearest even, and overflow gives inf where
    the format has one. E4M3 has none and saturates. In autograd the gradient makes the same trip.

    Raises:
        TypeError: if `tensor` is neither FP32 nor FP64, which hold all values of every format.

    >>> import torch
    >>> from mixprec import formats
    >>> formats.round_to(torch.tensor([257.0, 1e5]), formats.FP16)
    tensor([257.,  inf])
    >>> formats.round_to(torch.tensor([257.0, 1e5]), formats.BF16)
    tensor([  256., 99840.])
    """
    if tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"round_to got {tensor.dtype}, which cannot hold the values of every format; "
            "give it tensor.float()"
        )
    rounded = tensor.to(format.dtype) if format.has_inf else cast(tensor, format)
    return rounded.to(tensor.dtype)


@torch.no_grad()
def split(
    fp32: Tensor, *, out: tuple[Tensor, Tensor] | None = None, scratch: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fp32` as its BF16 rounding and an int16 remainder, from which `join` restores every bit.

    Exact for all finite values, both zeros and both infinities, with ties rounded away from zero.
    Above 3.3961775e38 the BF16 half is inf and the remainder still exact. Every NaN becomes the
    BF16 pattern 0x7FC0 with remainder 0.

    Args:
        fp32: any shape and strides. Local tensors only: give the shard of a DTensor.
        out: the BF16 and the int16 tensor to write, shaped as `fp32`; also returned.
        scratch: int32, shaped as `fp32`, overwritten; spares an allocation. May be
            `fp32.view(torch.int32)` if `fp32` is no longer needed.

    >>> import torch
    >>> from mixprec import formats
    >>> weight, remainder = formats.split(torch.tensor([1.0, 1.001, 257.0]))
    >>> weight
    tensor([  1.,   1., 258.], dtype=torch.bfloat16)
    >>> remainder
    tensor([     0,   8389, -32768], dtype=torch.int16)
    """
    _require("split", "fp32", fp32, torch.float32, fp32.shape)
    if out is None:
        out = (
            torch.empty_like(fp32, dtype=torch.bfloat16),
            torch.empty_like(fp32, dtype=torch.int16),
        )
    bf16, int16 = out
    _require("split", "out[0]", bf16, torch.bfloat16, fp32.shape)
    _require("split", "out[1]", int16, torch.int16, fp32.shape)
    if scratch is None:
        scratch = torch.empty_like(fp32, dtype=torch.int32)
    _require("split", "scratch", scratch, torch.int32, fp32.shape)
    bits = fp32.view(torch.int32)
    if _may_hold_nan(fp32):
        # Other NaN patterns would round to inf or, from 0x7FFF8000 on, wrap around to zero.
        one_nan = scratch.view(torch.float32)
        torch.nan_to_num(fp32, nan=math.nan, posinf=math.inf, neginf=-math.inf, out=one_nan)
        bits = scratch
    int16.copy_(bits)
    torch.add(bits, 0x8000, out=scratch).bitwise_right_shift_(16)
    bf16.view(torch.int16).copy_(scratch)
    return bf16, int16


@torch.no_grad()
def join(
    bf16: Tensor, int16: Tensor, *, out: Tensor | None = None, scratch: Tensor | None = None
) -> Tensor:
    """The FP32 tensor whose `split` is `(bf16, int16)`.

    Defined for every pair, also when the BF16 half was overwritten and the remainder was not: the
    result still rounds to `bf16`. Where no FP32 value does (a zero with a negative remainder, an
    infinity with a positive one) the remainder counts as 0. So pruned weights are zero, or at most
    4.6e-41, which is the remainder that a zero can have. NaN stays NaN.

    Args:
        bf16: any shape and strides.
        int16: remainder, shaped as `bf16`.
        out: the FP32 tensor to write, shaped as `bf16`; also returned.
        scratch: int32, shaped as `bf16`, overwritten; spares an allocation.

    >>> import torch
    >>> from mixprec import formats
    >>> weight, remainder = formats.split(torch.tensor([0.1, -0.1]))
    >>> formats.join(weight, remainder)
    tensor([ 0.1000, -0.1000])
    >>> formats.join(weight.zero_(), remainder)
    tensor([0., 0.])
    """
    if out is None:
        out = torch.empty_like(bf16, dtype=torch.float32)
    _require("join", "bf16", bf16, torch.bfloat16, bf16.shape)
    _require("join", "int16", int16, torch.int16, bf16.shape)
    _require("join", "out", out, torch.float32, bf16.shape)
    if scratch is None:
        scratch = torch.empty_like(int16, dtype=torch.int32)
    _require("join", "scratch", scratch, torch.int32, bf16.shape)
    out.copy_(bf16)
    out.view(torch.int32).add_(scratch.copy_(int16))
    if _may_hold_nan(out):
        # The bits of an impossible pair, and of no possible one, form a NaN.
        out.copy_(torch.where(out.isnan(), bf16, out))
    return out


def _may_hold_nan(tensor: Tensor) -> bool:
    """Whether there may be a NaN. On a CPU a finite sum proves that there is none, at a tenth of a
    comparison's cost; elsewhere the host would have to wait for the sum, so the answer is True.
    """
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    return not math.isfinite(tensor.sum().item())


def _require(
    function: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: torch.Size
) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise TypeError(
            f"{function} got {argument} as {tensor.dtype} {list(tensor.shape)}; "
            f"it must be {dtype} {list(shape)}"
        )
