"""Torch's operations in terms of a program's: one function for each that is more than a name.

Those that are no more than a name say so themselves (`Operation.torch`).

What has no function here is taken apart by torch's own decompositions first (`decomposition_of`).

Each takes where to write (`Writer`, the recorder) and the operands of a call of torch, in order,
and emits one or more of `OPERATIONS`: values of elements by their names, numbers as they
are. It returns the name of the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol, cast

import torch

from mixprec.optimizer.fused.program.operations import OPERATIONS
from mixprec.optimizer.fused.program.program import NUMEL, NotFusible


def decomposition_of(func: Any, base: str) -> Callable[..., Any] | None:
    """Torch's own Python function that computes `func` of simpler operations, if it has one.

    Of operations in place, into `out` and on lists it is the plain one of the name `base`, which
    a recorder is asked about in turn.
    """
    if func._can_decompose():
        return func.decompose  # autograd would have taken it apart above the recorder
    if func._schema.is_mutable or func._schema.name != f"aten::{base}":
        return getattr(torch.ops.aten, base, None)
    # Half a second of imports, for rules that need them.
    import_module("torch._refs")
    return import_module("torch._decomp").decomposition_table.get(func)


class Writer(Protocol):
    """Where operations are written down."""

    booleans: set[str]
    per_tensor: set[str]

    def emit(self, name: str, *inputs: Any) -> str:
        """Record an operation on values and numbers; returns the name of its value."""
        ...


_Value = str | float
"""The name of a value, or a number."""


def _add(r: Writer, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return r.emit("add", a, b) if alpha is None else r.emit("add_scaled", a, b, alpha)


def _sub(r: Writer, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return r.emit("sub", a, b) if alpha is None else r.emit("sub_scaled", a, b, alpha)


def _rsub(r: Writer, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return _sub(r, b, a, alpha)


def _div(r: Writer, a: _Value, b: _Value, rounding_mode: str | None = None) -> str:
    if rounding_mode == "floor":
        return _floor_divide(r, a, b)
    quotient = r.emit("div", a, b)
    return quotient if rounding_mode is None else r.emit(rounding_mode, quotient)


def _floored(r: Writer, a: _Value, b: _Value) -> tuple[str, str]:
    """The remainder towards zero, and whether the one that has the sign of `b` is another."""
    rest = r.emit("fmod", a, b)
    if not isinstance(b, str):
        return rest, r.emit("gt" if b < 0 else "lt", rest, 0.0)
    apart = r.emit("logical_xor", r.emit("lt", rest, 0.0), r.emit("lt", b, 0.0))
    return rest, r.emit("logical_and", r.emit("ne", rest, 0.0), apart)


def _remainder(r: Writer, a: _Value, b: _Value) -> str:
    rest, differs = _floored(r, a, b)
    return r.emit("where", differs, r.emit("add", rest, b), rest)


def _floor_divide(r: Writer, a: _Value, b: _Value) -> str:
    # As torch: a quotient that was rounded before it is floored would make 10 of 1 // 0.1.
    rest, differs = _floored(r, a, b)
    quotient = r.emit("div", r.emit("sub", a, rest), b)
    quotient = r.emit("where", differs, r.emit("sub", quotient, 1.0), quotient)
    floor = r.emit("floor", quotient)
    is_short = r.emit("gt", r.emit("sub", quotient, floor), 0.5)
    floor = r.emit("where", is_short, r.emit("add", floor, 1.0), floor)
    if not isinstance(b, str):
        return r.emit("div", a, b) if b == 0 else floor
    return r.emit("where", r.emit("eq", b, 0.0), r.emit("div", a, b), floor)


def _round(r: Writer, a: _Value, decimals: int = 0) -> str:
    if decimals == 0:
        return r.emit("round", a)
    there, back = ("mul", "div") if decimals > 0 else ("div", "mul")
    power = 10.0 ** abs(decimals)
    return r.emit(back, r.emit("round", r.emit(there, a, power)), power)


def _fmax(r: Writer, a: _Value, b: _Value, which: str = "max") -> str:
    """The larger one, or the one that is a number."""
    value = r.emit(which, a, b)
    for number, other in ((a, b), (b, a)):
        if isinstance(other, str):
            value = r.emit("where", r.emit("isnan", other), number, value)
    return value


def _fmin(r: Writer, a: _Value, b: _Value) -> str:
    return _fmax(r, a, b, "min")


def _heaviside(r: Writer, a: _Value, b: _Value) -> str:
    return _where(r, r.emit("eq", a, 0.0), b, r.emit("float", r.emit("gt", a, 0.0)))


def _signbit(r: Writer, a: _Value) -> str:
    return r.emit("lt", r.emit("copysign", 1.0, a), 0.0)


def _pow(r: Writer, base: _Value, exponent: _Value) -> str:
    # Torch has kernels of their own for these, and so will ours: the exponent becomes structure.
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if isinstance(base, str) and isinstance(exponent, (int, float)) and exponent in known:
        return r.emit(known[exponent], base)
    return r.emit("pow", base, exponent)


def _addcmul(r: Writer, a: _Value, b: _Value, c: _Value, value: float | None = None) -> str:
    return r.emit("addcmul", a, b, c) if value is None else r.emit("addcmul_scaled", a, b, c, value)


def _addcdiv(r: Writer, a: _Value, b: _Value, c: _Value, value: float | None = None) -> str:
    return r.emit("addcdiv", a, b, c) if value is None else r.emit("addcdiv_scaled", a, b, c, value)


def _clamp(r: Writer, a: _Value, min: _Value | None = None, max: _Value | None = None) -> str:
    value = a
    if min is not None:
        value = r.emit("max", value, min)
    if max is not None:
        value = r.emit("min", value, max)
    return cast(str, value)


def _where(r: Writer, condition: _Value, a: _Value, b: _Value) -> str:
    if isinstance(condition, str):
        return r.emit("where", condition, a, b)
    return _copy(r, a if condition else b)


def _masked_fill(r: Writer, a: _Value, mask: _Value, value: _Value) -> str:
    return r.emit("where", mask, value, a)


def _nan_to_num(
    r: Writer,
    a: _Value,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> str:
    largest = torch.finfo(torch.float32).max
    value = r.emit("where", r.emit("isnan", a), nan or 0.0, a)
    for infinity, given in ((math.inf, posinf), (-math.inf, neginf)):
        finite = math.copysign(largest, infinity) if given is None else given
        value = r.emit("where", r.emit("eq", value, infinity), finite, value)
    return value


def _index_put(
    r: Writer, a: _Value, indices: list[Any], value: _Value, accumulate: bool = False
) -> str:
    """`a[mask] = number`; a mask is as large as the parameter, as all that is recorded."""
    mask = indices[0]
    if len(indices) != 1 or mask not in r.booleans or isinstance(value, str) or accumulate:
        raise NotFusible("torch.index_put is not element-wise")
    return r.emit("where", mask, value, a)


def _copy(r: Writer, source: _Value, *_rest: object) -> str:
    return source if isinstance(source, str) else r.emit("full", source)


def _same_value(r: Writer, a: str, *_rest: object) -> str:
    return a


def _joined(name: str) -> Callable[..., str]:
    """`torch.stack` or `cat` of one number of the tensor; lists of them come from foreach code."""

    def join(r: Writer, parts: list[_Value], *_rest: object) -> str:
        if len(parts) != 1 or parts[0] not in r.per_tensor:
            raise NotFusible(f"torch.{name} is not element-wise")
        return parts[0]

    return join


def _sum(r: Writer, a: str, *_dims: object) -> str:
    return a if a in r.per_tensor else r.emit("sum", a)


def _mean(r: Writer, a: str, *_dims: object) -> str:
    return a if a in r.per_tensor else r.emit("div", _sum(r, a), NUMEL)


def _largest(r: Writer, a: str, *_dims: object) -> str:
    return a if a in r.per_tensor else r.emit("amax", a)


def _smallest(r: Writer, a: str, *_dims: object) -> str:
    return a if a in r.per_tensor else r.emit("amin", a)


def _norm(r: Writer, a: str, p: float | None = 2, *_dims: object) -> str:
    if p is None or p == 2:
        return r.emit("sqrt", _sum(r, r.emit("square", a)))
    size = r.emit("abs", a)
    if p in (math.inf, -math.inf):
        return (_largest if p > 0 else _smallest)(r, size)
    if p == 0:
        return _sum(r, r.emit("float", r.emit("ne", a, 0.0)))
    return _sum(r, size) if p == 1 else _pow(r, _sum(r, _pow(r, size, p)), 1 / p)


def _dot(r: Writer, a: str, b: str) -> str:
    return _sum(r, r.emit("mul", a, b))


def _var(
    r: Writer, a: str, *_dims: object, correction: float | None = None, keepdim: bool = False
) -> str:
    apart = r.emit("square", r.emit("sub", a, _mean(r, a)))
    lost = 1 if correction is None else correction
    return r.emit("div", _sum(r, apart), r.emit("sub", NUMEL, lost))


def _std(r: Writer, a: str, *_dims: object, **kinds: Any) -> str:
    return r.emit("sqrt", _var(r, a, **kinds))


def _zeros(r: Writer, *_: object) -> str:
    return r.emit("zeros")


def _ones(r: Writer, *_: object) -> str:
    return r.emit("ones")


def _full(r: Writer, *operands: _Value) -> str:
    return r.emit("full", operands[-1])


def _plain(name: str) -> Callable[..., str]:
    return lambda r, *operands: r.emit(name, *operands)


OVER_ALL: dict[str, Callable[..., str]] = {
    "sum": _sum,
    "mean": _mean,
    "dot": _dot,
    "std": _std,
    "var": _var,
    **dict.fromkeys(("amax", "max"), _largest),
    **dict.fromkeys(("amin", "min"), _smallest),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
}
"""Over all elements of one tensor."""

TRANSLATIONS: dict[str, Callable[..., str]] = {
    **OVER_ALL,
    **{called: _plain(name) for name, found in OPERATIONS.items() for called in found.torch},
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _zeros),
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided"), _zeros),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _ones),
    **dict.fromkeys(("full_like", "full", "new_full"), _full),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "div": _div,
    "true_divide": _div,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "round": _round,
    "fmax": _fmax,
    "fmin": _fmin,
    "signbit": _signbit,
    "heaviside": _heaviside,
    "pow": _pow,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "index_put": _index_put,
    "nan_to_num": _nan_to_num,
    "copy": _copy,
    "fill": _copy,
    "stack": _joined("stack"),
    "cat": _joined("cat"),
    "clone": _same_value,
    "contiguous": _same_value,
    "_to_copy": _same_value,
    "convert_element_type": _same_value,  # so called in torch's own decompositions
    "float_power": _pow,
}
