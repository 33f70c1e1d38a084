"""How many values of a tensor lie in each binade, and what a format would make of them.

A binade is the stretch from 2^b to 2^(b + 1), b = floor(log2 |x|), and b is the exponent field of
x in FP32: counting is integer arithmetic on bits. Multiplying by 2^e moves every value by e binades
and changes nothing else, so one histogram answers for every format at every exponent:

    saturated   |x| * 2^e > max
    flushed     |x| * 2^e <= half the smallest subnormal: rounds to 0
    subnormal   neither, and below the smallest normal: fewer digits than the format promises

Both 8-bit formats end at 1.75 times a power of two, and a tie rounds to 0 where |x| is a power of
two exactly. So each binade is counted in three parts: the power of two itself, what is above it up
to 1.75 times it, and the rest. The shares are exact then. Two exceptions: FP16's and BF16's last
binades count as held to their ends, which are 0.05 % and 0.4 % short of the next power of two, and
FP32's subnormals count as one binade, -127.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mixprec.formats import Format

__all__ = [
    "BINS",
    "MAX_FLUSHED",
    "MAX_SATURATED",
    "Binades",
    "Rates",
    "Window",
    "count",
    "percent",
    "signed",
]

MAX_SATURATED = 1e-4
"""Share of saturated values that a tensor may have: what is clipped is most of its energy."""
MAX_FLUSHED = 0.05
"""Share of values that may become 0: they are the smallest."""
BINS = 1024
"""Four for each exponent field of FP32: a power of two, up to 1.75 times it, beyond, none."""
_PIECE = (2**22, 2**18)
"""Elements counted at once, elsewhere and on a CPU: bounds the scratch, four int32 an element."""
_BIAS = 127
_INF = 255 * 4


class Rates(NamedTuple):
    """Shares of all values counted."""

    saturated: float
    subnormal: float
    flushed: float

    @property
    def fits(self) -> bool:
        """Whether both losses are within their limits."""
        return self.saturated <= MAX_SATURATED and self.flushed <= MAX_FLUSHED


class Window(NamedTuple):
    """The exponents `low..high` keep both losses within their limits; none does if low > high."""

    low: int
    high: int

    @property
    def middle(self) -> int:
        """Halfway between the ends; where nothing fits, the highest that does not saturate."""
        return (self.low + self.high) // 2 if self.low <= self.high else self.high

    def __contains__(self, exponent: object) -> bool:
        return isinstance(exponent, int) and self.low <= exponent <= self.high


@torch.no_grad()
def count(x: Tensor, counts: Tensor) -> None:
    """Add the values of `x` to `counts`, without waiting for the device.

    Args:
        x: floating-point, any shape and strides, also empty. FP64 counts as rounded to FP32.
        counts: int64 [BINS], on the device of `x`; changed in place.

    >>> import torch
    >>> from mixprec.binades import BINS, Binades, count
    >>> counts = torch.zeros(BINS, dtype=torch.int64)
    >>> count(torch.tensor([0.0, 1.0, -1.5, 6.0]), counts)
    >>> Binades(counts.tolist()).histogram
    {0: 2, 2: 1}
    """
    for piece in x.detach().reshape(-1).split(_PIECE[x.device.type == "cpu"]):
        bits = piece.float().view(torch.int32) & 0x7FFFFFFF
        mantissa = bits & 0x7FFFFF
        bins = (bits >> 23).mul_(4).add_(mantissa > 0).add_(mantissa > 0x600000)
        if x.device.type == "cpu":
            counts += torch.bincount(bins, minlength=BINS)
        elif torch.are_deterministic_algorithms_enabled():
            counts.scatter_add_(0, bins.long(), torch.ones_like(bins, dtype=torch.int64))
        else:
            # Not bincount, which waits for the largest bin; histc counts in shared memory besides.
            counts += torch.histc(bins, bins=BINS, min=0, max=BINS)


@dataclass(frozen=True)
class Binades:
    """Counts that were read back, and what follows from them."""

    counts: list[int] = field(repr=False)

    @cached_property
    def _up_to(self) -> list[int]:
        """Finite values other than 0 in bins below each place."""
        finite = [0, *self.counts[1:_INF], *[0] * (BINS - _INF)]
        return [0, *itertools.accumulate(finite)]

    @property
    def zeros(self) -> int:
        return self.counts[0]

    @property
    def infs(self) -> int:
        return self.counts[_INF]

    @property
    def nans(self) -> int:
        return sum(self.counts[_INF + 1 :])

    @property
    def present(self) -> int:
        """Finite values other than 0."""
        return self._up_to[-1]

    @cached_property
    def values(self) -> int:
        """All values counted."""
        return sum(self.counts)

    @cached_property
    def histogram(self) -> dict[int, int]:
        """Count by binade, ascending, of the finite values other than 0."""
        binades = range(-_BIAS, _BIAS + 1)
        found = {b: self._below(b + 1) - self._below(b) for b in binades}
        return {binade: number for binade, number in found.items() if number}

    def rates(self, format: Format, exponent: int = 0) -> Rates:
        """What `format` would lose of the values multiplied by 2^exponent; zeros without a value.

        >>> import torch
        >>> from mixprec import formats
        >>> counts = torch.zeros(BINS, dtype=torch.int64)
        >>> count(torch.tensor([2.0**-12, 2.0**-8, 1.0, 449.0]), counts)
        >>> Binades(counts.tolist()).rates(formats.E4M3)
        Rates(saturated=0.25, subnormal=0.25, flushed=0.25)
        """
        if not self.values:
            return Rates(0.0, 0.0, 0.0)
        flushed = self._flushed(format, exponent)
        normal = _log2(format.smallest_normal) - exponent
        subnormal = self._below(normal) - flushed
        saturated = self._saturated(format, exponent)
        return Rates(saturated / self.values, subnormal / self.values, flushed / self.values)

    def highest(self, format: Format) -> int:
        """The highest exponent at which no whole binade is above `format.max`; 0 without values."""
        return _log2(format.max) - max(self.histogram, default=_log2(format.max))

    def window(self, format: Format) -> Window | None:
        """The exponents at which `format` loses no more than the limits; None where all values are
        0 or not finite, to which any exponent is the same.

        >>> import torch
        >>> from mixprec import formats
        >>> counts = torch.zeros(BINS, dtype=torch.int64)
        >>> count(torch.tensor([2.0**-20, 2.0**-18]), counts)
        >>> Binades(counts.tolist()).window(formats.E4M3)
        Window(low=11, high=26)
        """
        if not self.present:
            return None
        # Losses are monotonous in the exponent: look where each passes its limit.
        largest, smallest = max(self.histogram), min(self.histogram)
        high = _log2(format.max) - smallest
        while self._saturated(format, high) > MAX_SATURATED * self.values:
            high -= 1
        low = _log2(format.smallest_subnormal) - 1 - largest
        while self._flushed(format, low) > MAX_FLUSHED * self.values:
            low += 1
        return Window(low, high)

    def _below(self, binade: int, part: int = 0) -> int:
        """Finite values other than 0 that are in lower binades, or in lower parts of this one."""
        return self._up_to[min(max(4 * (binade + _BIAS) + part, 0), BINS)]

    def _saturated(self, format: Format, exponent: int) -> int:
        top = _log2(format.max) - exponent
        held = 3 if math.ldexp(format.max, -_log2(format.max)) > 1.75 else 2
        return self.present - self._below(top, held)

    def _flushed(self, format: Format, exponent: int) -> int:
        return self._below(_log2(format.smallest_subnormal) - 1 - exponent, 1)


def percent(share: float) -> str:
    """How a share is written: as a percentage of two digits, "-" for NaN.

    >>> percent(0.0213), percent(0.0), percent(3e-6), percent(1.0)
    ('2.1 %', '0', '0.0003 %', '100 %')
    """
    if math.isnan(share):
        return "-"
    number = 100 * share
    return f"{number:.0f} %" if number >= 9.95 else f"{number:.2g} %" if number else "0"


def signed(exponent: int) -> str:
    """How an exponent is written: 0, +3, -2.

    >>> signed(0), signed(3), signed(-2)
    ('0', '+3', '-2')
    """
    return f"{exponent:+d}" if exponent else "0"


def _log2(value: float) -> int:
    """floor(log2(value)), exactly."""
    return math.frexp(value)[1] - 1
