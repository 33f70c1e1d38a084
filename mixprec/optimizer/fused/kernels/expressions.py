"""How each operation of a program is written in Triton, to give the bits of torch's kernel.

Every product that torch's own CUDA kernels add without rounding is an explicit `fma`, and kernels
are compiled so that nothing else is contracted. Divisions and roots round to nearest, as torch's
do; NaN goes through wherever torch lets it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["expression"]


def expression(
    name: str, inputs: Sequence[str], operands: Sequence[str], *, near: bool = False
) -> str:
    """The operation `name` of a program on identifiers.

    Args:
        name: of the operation.
        inputs: the program's names of the operands, which tell a scalar from a tensor.
        operands: identifiers.
        near: takes roots and quotients that are off by up to 2 ulp and cost a third.

    >>> expression("add_scaled", ["master", "grad", "s0"], ["master", "grad", "s0"])
    'tl.fma(s0, grad, master)'
    """
    if name == "div" and _is_number(inputs[1]) and not _is_number(inputs[0]):
        # As torch: a division by a number is a product with its reciprocal.
        return f"{operands[0]} * tl.div_rn(1.0, {operands[1]})"
    write = (_NEAR if near and name in _NEAR else _EXPRESSIONS)[name]
    return write.format(*operands) if isinstance(write, str) else write(*operands)


def _is_number(name: str) -> bool:
    return re.fullmatch(r"s[0-9]+", name) is not None


def _lerp(a: str, b: str, w: str) -> str:
    near, far = f"tl.fma({w}, {b} - {a}, {a})", f"tl.fma({a} - {b}, 1.0 - {w}, {b})"
    return f"tl.where(tl.abs({w}) < 0.5, {near}, {far})"


_LIBDEVICE = (
    "exp expm1 log log1p log2 sin cos tan asin acos atan sinh cosh tanh erf trunc atan2 copysign "
    "pow rsqrt exp2 log10 asinh acosh atanh erfc erfinv lgamma fmod hypot"
).split()

_OF_TWO = ("atan2", "copysign", "pow", "fmod", "hypot")

_EXPRESSIONS: dict[str, str | Callable[..., str]] = {
    **{name: f"libdevice.{name}({{}})" for name in _LIBDEVICE},
    **{name: f"libdevice.{name}({{}}, {{}})" for name in _OF_TWO},
    "round": "libdevice.rint({})",
    "neg": "-{}",
    "abs": "tl.abs({})",
    "sqrt": "tl.sqrt_rn({})",
    "reciprocal": "tl.div_rn(1.0, {})",
    "square": "{0} * {0}",
    "sigmoid": "tl.div_rn(1.0, 1.0 + libdevice.exp(-{}))",
    "relu": "tl.maximum({}, 0.0, ALL)",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
    "floor": "tl.floor({})",
    "ceil": "tl.ceil({})",
    "isfinite": 'tl.abs({}) < float("inf")',
    "isnan": "{0} != {0}",
    "isinf": 'tl.abs({}) == float("inf")',
    "logical_not": "tl.where({}, False, True)",
    "float": "{}.to(tl.float32)",
    "full": "tl.zeros([BLOCK], tl.float32) + {}",
    "zeros": "tl.zeros([BLOCK], tl.float32)",
    "ones": "tl.full([BLOCK], 1.0, tl.float32)",
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "tl.div_rn({}, {})",
    "max": "tl.maximum({}, {}, ALL)",
    "min": "tl.minimum({}, {}, ALL)",
    "lt": "{} < {}",
    "le": "{} <= {}",
    "gt": "{} > {}",
    "ge": "{} >= {}",
    "eq": "{} == {}",
    "ne": "{} != {}",
    "logical_and": "{} & {}",
    "logical_or": "{} | {}",
    "logical_xor": "{} ^ {}",
    "where": "tl.where({}, {}, {})",
    "add_scaled": "tl.fma({2}, {1}, {0})",
    "sub_scaled": "tl.fma(-{2}, {1}, {0})",
    "addcmul": "tl.fma({1}, {2}, {0})",
    "addcmul_scaled": "tl.fma({3}, {1} * {2}, {0})",
    "addcdiv": "{0} + tl.div_rn({1}, {2})",
    "addcdiv_scaled": "tl.fma({3}, tl.div_rn({1}, {2}), {0})",
    "lerp": _lerp,
}

_NEAR: dict[str, str] = {
    "sqrt": "tl.sqrt({})",
    "div": "{} / {}",
    "reciprocal": "1.0 / {}",
    "addcdiv": "{0} + {1} / {2}",
    "addcdiv_scaled": "tl.fma({3}, {1} / {2}, {0})",
}
"""Beside 8-bit states, whose codes err by 2^-8, the last bit of a root is not worth its time."""
