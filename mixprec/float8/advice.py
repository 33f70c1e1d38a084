"""The one advice on exponents: which one an operand should have, and what to write for it.

`stats` knows what casts have counted, `watch` a histogram of what they would meet. Both ask here,
so the same tensor gets the same exponent, the one that the recipe "adaptive" would move to:

    2^(top - 2) <= amax * 2^exponent < 2^(top - 1),    2^top <= format.max < 2^(top + 1)

It depends on the largest value alone, and clips nothing. Where small values are lost even so, no
exponent is advised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mixprec.binades import MAX_FLUSHED, MAX_SATURATED, Window, percent, signed
from mixprec.float8.recipe import MAX_EXPONENT, Cast
from mixprec.formats import E4M3, Format

__all__ = ["better", "fitting", "lost", "remedy"]


def fitting(amax: float, format: Format) -> int | None:
    """The exponent that leaves one to two binades above `amax`; None for 0, inf and NaN.

    >>> from mixprec.formats import E5M2
    >>> fitting(300.0, E4M3), fitting(2.0**-20, E5M2)
    (-2, 33)
    """
    if not 0 < amax < math.inf:
        return None
    top = math.frexp(format.max)[1] - 1
    return max(-MAX_EXPONENT, min(top - 1 - math.frexp(amax)[1], MAX_EXPONENT))


def better(
    amax: float, format: Format, exponent: int | None, *, saturates: bool, flushes: bool
) -> int | None:
    """The exponent to use instead of `exponent`; None if nothing is wrong, or none mends it."""
    wanted = fitting(amax, format)
    if exponent is None or wanted is None or saturates == flushes:
        return None
    helps = wanted < exponent if saturates else wanted > exponent
    return wanted if helps else None


def lost(
    format: Format, saturated: float, flushed: float, place: str, *, how: str = "above"
) -> str:
    """What is lost, as the beginning of a sentence; empty where that is little enough."""
    name, parts = format.name.upper(), list[str]()
    if saturated > MAX_SATURATED:
        parts.append(f"{percent(saturated)} of values are {how} {name}'s {format.max:g}")
    if flushed > MAX_FLUSHED:
        parts.append(f"{percent(flushed)} of values become 0 in {name}")
    return f"{' and '.join(parts)} {place}" if parts else ""


def remedy(
    pattern: str,
    role: str,
    cast: Cast | None,
    format: Format,
    fixes: Sequence[int],
    window: Window | None = None,
) -> str:
    """What to do about an operand that loses too much, as sentences that name the call to write.

    Args:
        pattern: the name of the layer, or what matches the names of several.
        cast: how the layer casts the operand now; None if it is not in FP8 yet.
        fixes: what `better` gives for each of the layers, where it gives anything.
        window: all exponents that fit, where they are known and it is one layer.

    >>> print(remedy("0", "input", Cast(E4M3, "adaptive"), E4M3, [-6]))
    It adapts: the next optimizer step moves its exponent to -6.
    """
    begin = "Write mixprec.Precision('fp8')." + "revert(model) and " * (cast is not None)
    scaling = None if cast is None else cast.scaling
    if not fixes:
        bf16 = _override(pattern, "'bf16'")
        if scaling == "rowwise":
            return f"A multiplier for each row does not hold it. {begin}convert(model, {bf16})."
        rowwise = _override(pattern, "'rowwise'")
        return (
            f"No exponent holds both its ends. {begin}convert(model, {rowwise}), which gives each "
            f"row its own, or {bf16}."
        )
    low, high = signed(min(fixes)), signed(max(fixes))
    if scaling == "adaptive":
        to = low if low == high else f"{low} to {high}"
        return f"It adapts: the next optimizer step moves its exponent to {to}."
    adaptive = f"{begin}convert(model, {_override(pattern, repr('adaptive'))})"
    if low != high:
        return f"They need exponents {low} to {high}. {adaptive}, which finds them."
    fit = f" ({signed(window.low)} to {signed(window.high)} fit)" if window else ""
    fixed = f"mixprec.float8.Recipe({role}={_cast(format, fixes[0])})"
    return (
        f"It needs exponent {low}{fit}. {adaptive}, which finds it, or "
        f"{_override(pattern, fixed)}, which sets it."
    )


def _override(pattern: str, recipe: str) -> str:
    return f"overrides={{{pattern!r}: {recipe}}}"


def _cast(format: Format, exponent: int) -> str:
    """The `Cast` as one writes it."""
    kind = "" if format == E4M3 else f"mixprec.formats.{format.name.upper()}, "
    return f"mixprec.float8.Cast({kind}exponent={exponent})"
