"""An operation of a program in Triton, on given identifiers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixprec.optimizer.fused.program.operations import OPERATIONS

__all__ = ["expression"]


def expression(
    name: str, inputs: Sequence[str], operands: Sequence[str], *, near: bool = False
) -> str:
    """The operation `name` of a program on identifiers.

    Args:
        name: of the operation.
        inputs: the program's names of the operands, which tell a scalar from a tensor.
        operands: identifiers.
        near: takes roots and quotients that are off by up to 2 ulp and cost a third: beside 8-bit
            states, whose codes err by 2^-8, the last bit of a root is not worth its time.

    >>> expression("add_scaled", ["master", "grad", "s0"], ["master", "grad", "s0"])
    'tl.fma(s0, grad, master)'
    """
    if name == "div" and _is_number(inputs[1]) and not _is_number(inputs[0]):
        # As torch: a division by a number is a product with its reciprocal.
        return f"{operands[0]} * tl.div_rn(1.0, {operands[1]})"
    operation = OPERATIONS[name]
    write = operation.near or operation.triton if near else operation.triton
    return write.format(*operands) if isinstance(write, str) else write(*operands)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"s[0-9]+", name) is not None
