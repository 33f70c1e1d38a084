"""What casts count on the device: `[8]` int64, by these places."""

from __future__ import annotations

from mixprec.formats import E4M3, Format

__all__ = [
    "AMAX_BITS",
    "FLUSHED",
    "NON_FINITE",
    "NUM_COUNTERS",
    "SATURATED",
    "SEEN",
    "largest_that_fits",
]

AMAX_BITS, SATURATED, FLUSHED, NON_FINITE, SEEN = range(5)
NUM_COUNTERS = 8


def largest_that_fits(format: Format) -> float:
    """The largest FP32 value that rounds to `format.max`, halfway to the next or just below it.

    Halfway ties to an even mantissa, which that of E4M3's 448 is (110) and of E5M2's 57344 is not.

    >>> from mixprec.formats import E5M2
    >>> largest_that_fits(E4M3), largest_that_fits(E5M2)
    (464.0, 61439.99609375)
    """
    return 464.0 if format == E4M3 else 61440.0 - 2.0**-8
