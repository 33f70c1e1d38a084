"""What a fused rule promises, in numbers: written down here, not read from the code under test."""

from __future__ import annotations

__all__ = ["ROUNDING", "SPACING", "UPDATE"]

ROUNDING = 2.0**-24
"""The error of one operation in FP32, relative to its result: half a unit in the last place."""

SPACING = 2.0**-23
"""Between a master and the next FP32 number, relative to it: it is a rounded sum."""

UPDATE = 2e-6
"""Of an update: 16 operations in the program and 16 in the rule, 32 * 2^-24, rounded up."""
