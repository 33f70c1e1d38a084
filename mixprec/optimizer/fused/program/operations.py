"""Everything that a program may do: an operation's name in torch, its numbers, text, kernel, sign.

One entry says all of it. To add an operation, add its entry; the interpreter, formulas, kernels,
proofs of signs and the recorder read it from here. `test_fused_elementwise` compares each with
torch, `test_fused_signs` each sign with numbers, and `test_fused_gpu` each kernel with torch's.

Signs have three levels, see `signs`:

    2   not negative and not -0, or NaN      its reciprocal is not negative either
    1   not negative, or NaN
    0   anything

Triton's text gives the bits of torch's kernel. Every product that torch's own CUDA kernels add
without rounding is an explicit `fma`, and kernels are compiled so that nothing else is contracted.
Divisions and roots round to nearest, as torch's do; NaN goes through wherever torch lets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["BOOLEAN", "OPERATIONS", "REDUCTIONS", "Class", "Operation"]

COMPARE, SUM, PRODUCT, ATOM = range(4)
"""How tightly an expression binds."""

Class = tuple[int, bool, bool]
"""Of a scalar: its level, whether it is above 0, whether it is at most 1."""

Sign = Callable[[Sequence[str], Sequence[int], Mapping[str, Class]], int]
"""The level of a result, from its inputs' names and levels and the scalars among them."""


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        compute: the result from tensors, and floats that are FP32 values.
        template: the expression in a formula, with a place for each input.
        level: how tightly the expression binds.
        needs: how tightly each input has to bind to stand without parentheses.
        triton: the expression in a kernel, from identifiers.
        sign: the level of the result.
        near: a cheaper expression for quotients and roots, off by up to 2 ulp.
        torch: names of torch's functions that are this and nothing more.
    """

    compute: Callable[..., Any]
    template: str
    level: int
    needs: tuple[int, ...]
    triton: str | Callable[..., str]
    sign: Sign
    near: str = ""
    torch: tuple[str, ...] = ()


# ---------------------------------------- signs


def _unknown(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return 0


def _always(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return 2


def _as_first(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return levels[0]


def _root(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    """The root of what is negative is NaN."""
    return max(levels[0], 1)


def _inverse(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return 2 if levels[0] == 2 else 0


def _as_scalar(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    """The sign of a number of the host; that of a NaN is anybody's guess."""
    return 2 if names[1] in scalars and levels[1] == 2 else 0


def _larger(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    above = any(name in scalars and scalars[name][1] for name in names)
    return 2 if above or min(levels) == 2 else min(max(levels), 1)


def _smaller(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return min(levels[-2:])


def _between(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    level, _, at_most_one = scalars.get(names[2], (0, False, False))
    return min(levels[:2]) if level and at_most_one else 0


def _sum(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    """Of the first and the product of the others; 0 + -0 is 0."""
    rest = min(levels[1:])
    return max(levels[0], rest) if levels[0] and rest else 0


def _product(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return 2 if names[0] == names[1] else min(levels)


def _quotient(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
    return levels[0] if levels[1] == 2 else 0


def _plus(of_two: Sign) -> Sign:
    """That of a sum: the first input, and `of_two` of the next two, perhaps times the fourth."""

    def rule(names: Sequence[str], levels: Sequence[int], scalars: Mapping[str, Class]) -> int:
        added = min([of_two(names[1:3], levels[1:3], scalars), *levels[3:]])
        return _sum((), (levels[0], added), scalars)

    return rule


# ---------------------------------------- how entries are written


def _tensor(value: Tensor | float) -> Tensor:
    # Never of torch's default dtype, which users set to BF16 now and then.
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)


def _function(
    name: str,
    compute: Callable[..., Any],
    triton: str | Callable[..., str],
    sign: Sign,
    **rest: Any,
) -> Operation:
    """`name(a, b)`, with as many inputs as `rest` says, or one."""
    arity = rest.pop("arity", 1)
    return Operation(
        compute,
        f"{name}({', '.join(['{}'] * arity)})",
        ATOM,
        (COMPARE,) * arity,
        triton,
        sign,
        **rest,
    )


def _binary(
    symbol: str, compute: Callable[..., Any], level: int, triton: str, sign: Sign, **rest: Any
) -> Operation:
    """`a symbol b`, from left to right; with `loose` the right side may be of the same level."""
    right = level if rest.pop("loose", False) else level + 1
    call = lambda a, b: compute(_tensor(a), b)  # noqa: E731
    return Operation(call, f"{{}} {symbol} {{}}", level, (level, right), triton, sign, **rest)


def _of_torch(names: str, triton: str, sign: Sign) -> dict[str, Operation]:
    """Functions of one value that are called the same in torch; `{name}` is theirs in Triton."""
    return {
        name: _function(
            name, getattr(torch, name), triton.replace("{name}", name), sign, torch=(name,)
        )
        for name in names.split()
    }


def _truths(symbols: dict[str, str], triton: dict[str, str]) -> dict[str, Operation]:
    """Comparisons and logic."""
    return {
        name: _binary(
            symbol,
            getattr(torch, name),
            COMPARE,
            f"{{}} {triton.get(name, symbol)} {{}}",
            _always,
            torch=(name, name.replace("logical", "bitwise")),
        )
        for name, symbol in symbols.items()
    }


def _at_least(value: Any, bound: Any) -> Tensor:
    bounded = torch.maximum if isinstance(bound, Tensor) else torch.clamp_min
    return bounded(_tensor(value), bound)


def _at_most(value: Any, bound: Any) -> Tensor:
    bounded = torch.minimum if isinstance(bound, Tensor) else torch.clamp_max
    return bounded(_tensor(value), bound)


def _lerp_in_triton(a: str, b: str, w: str) -> str:
    near, far = f"tl.fma({w}, {b} - {a}, {a})", f"tl.fma({a} - {b}, 1.0 - {w}, {b})"
    return f"tl.where(tl.abs({w}) < 0.5, {near}, {far})"


# ---------------------------------------- the entries

_ONE, _TWO = "libdevice.{name}({})", "libdevice.%s({}, {})"

_ORDERS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_LOGIC = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
_TESTS = {
    **_of_torch("isfinite", 'tl.abs({}) < float("inf")', _always),
    **_of_torch("isnan", "{0} != {0}", _always),
    **_of_torch("isinf", 'tl.abs({}) == float("inf")', _always),
    "logical_not": _function(
        "logical_not", torch.logical_not, "tl.where({}, False, True)", _always,
        torch=("logical_not", "bitwise_not"),
    ),
    **_truths(_ORDERS, {}),
    **_truths(_LOGIC, {"logical_and": "&", "logical_or": "|", "logical_xor": "^"}),
}  # fmt: skip

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
}
"""Operations that make one number out of a value of all elements."""

OPERATIONS: dict[str, Operation] = {
    **{name: _function(name, compute, "", _as_first) for name, compute in REDUCTIONS.items()},
    **_TESTS,
    **_of_torch("exp exp2 cosh erfc", _ONE, _always),
    **_of_torch("trunc log1p expm1 sinh tanh erf asin atan asinh atanh erfinv", _ONE, _as_first),
    **_of_torch("log log2 log10 sin cos tan acos acosh lgamma", _ONE, _unknown),
    **_of_torch("rsqrt", _ONE, _inverse),
    **_of_torch("abs", "tl.abs({})", _always),
    **_of_torch("sigmoid", "tl.div_rn(1.0, 1.0 + libdevice.exp(-{}))", _always),
    **_of_torch("relu", "tl.maximum({}, 0.0, ALL)", _root),
    **_of_torch("floor", "tl.floor({})", _as_first),
    **_of_torch("ceil", "tl.ceil({})", _as_first),
    "sqrt": _function(
        "sqrt", torch.sqrt, "tl.sqrt_rn({})", _root, near="tl.sqrt({})", torch=("sqrt",)
    ),
    "sign": _function(
        "sign", torch.sign, "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))", _as_first,
        torch=("sign", "sgn"),
    ),
    # Torch rounds to decimals too, which is more than this.
    "round": _function("round", torch.round, "libdevice.rint({})", _as_first),
    "neg": Operation(torch.neg, "-{}", PRODUCT, (ATOM,), "-{}", _unknown, torch=("neg",)),
    "reciprocal": Operation(
        torch.reciprocal, "1 / {}", PRODUCT, (ATOM,), "tl.div_rn(1.0, {})", _inverse,
        near="1.0 / {}", torch=("reciprocal",),
    ),
    "square": Operation(torch.square, "{}^2", ATOM, (ATOM,), "{0} * {0}", _always),
    "float": _function("float", lambda a: _tensor(a).float(), "{}.to(tl.float32)", _as_first),
    "full": Operation(
        lambda a: a, "{}", ATOM, (ATOM,), "tl.zeros([BLOCK], tl.float32) + {}", _as_first
    ),
    "zeros": Operation(lambda: 0.0, "0", ATOM, (), "tl.zeros([BLOCK], tl.float32)", _always),
    "ones": Operation(lambda: 1.0, "1", ATOM, (), "tl.full([BLOCK], 1.0, tl.float32)", _always),
    "add": _binary("+", torch.add, SUM, "{} + {}", _sum, loose=True),
    "sub": _binary("-", torch.sub, SUM, "{} - {}", _unknown),
    "mul": _binary("*", torch.mul, PRODUCT, "{} * {}", _product, loose=True, torch=("mul",)),
    "div": _binary("/", torch.div, PRODUCT, "tl.div_rn({}, {})", _quotient, near="{} / {}"),
    "pow": Operation(
        lambda a, b: torch.pow(_tensor(a), b), "{}^{}", ATOM, (ATOM, ATOM), _TWO % "pow", _inverse
    ),
    "atan2": _function(
        "atan2", lambda a, b: torch.atan2(_tensor(a), _tensor(b)), _TWO % "atan2", _inverse,
        arity=2, torch=("atan2",),
    ),
    "copysign": _function(
        "copysign", lambda a, b: torch.copysign(_tensor(a), b), _TWO % "copysign", _as_scalar,
        arity=2, torch=("copysign",),
    ),
    "fmod": _function(
        "fmod", lambda a, b: torch.fmod(_tensor(a), b), _TWO % "fmod", _as_first,
        arity=2, torch=("fmod",),
    ),
    "hypot": _function(
        "hypot", lambda a, b: torch.hypot(_tensor(a), _tensor(b)), _TWO % "hypot", _always,
        arity=2, torch=("hypot",),
    ),
    "max": _function(
        "max", _at_least, "tl.maximum({}, {}, ALL)", _larger,
        arity=2, torch=("maximum", "clamp_min"),
    ),
    "min": _function(
        "min", _at_most, "tl.minimum({}, {}, ALL)", _smaller,
        arity=2, torch=("minimum", "clamp_max"),
    ),
    "where": _function(
        "where", lambda a, b, c: torch.where(a, _tensor(b), _tensor(c)),
        "tl.where({}, {}, {})", _smaller, arity=3,
    ),
    # Kept whole: torch's kernels round once where the separate operations would round twice.
    "add_scaled": Operation(
        lambda a, b, s: torch.add(_tensor(a), _tensor(b), alpha=s),
        "{0} + {2} * {1}", SUM, (SUM, PRODUCT, PRODUCT), "tl.fma({2}, {1}, {0})", _sum,
    ),
    "sub_scaled": Operation(
        lambda a, b, s: torch.sub(_tensor(a), _tensor(b), alpha=s),
        "{0} - {2} * {1}", SUM, (SUM, ATOM, PRODUCT), "tl.fma(-{2}, {1}, {0})", _unknown,
    ),
    "addcmul": Operation(
        lambda a, b, c, s=1: torch.addcmul(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {1} * {2}", SUM, (SUM, PRODUCT, PRODUCT), "tl.fma({1}, {2}, {0})", _plus(_product),
    ),
    "addcmul_scaled": Operation(
        lambda a, b, c, s: torch.addcmul(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {3} * {1} * {2}", SUM, (SUM, PRODUCT, PRODUCT, PRODUCT),
        "tl.fma({3}, {1} * {2}, {0})", _plus(_product),
    ),
    "addcdiv": Operation(
        lambda a, b, c, s=1: torch.addcdiv(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {1} / {2}", SUM, (SUM, PRODUCT, ATOM),
        "{0} + tl.div_rn({1}, {2})", _plus(_quotient), near="{0} + {1} / {2}",
    ),
    "addcdiv_scaled": Operation(
        lambda a, b, c, s: torch.addcdiv(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {3} * {1} / {2}", SUM, (SUM, PRODUCT, ATOM, PRODUCT),
        "tl.fma({3}, tl.div_rn({1}, {2}), {0})", _plus(_quotient),
        near="tl.fma({3}, {1} / {2}, {0})",
    ),
    "lerp": _function(
        "lerp", lambda a, b, w: torch.lerp(_tensor(a), _tensor(b), w),
        _lerp_in_triton, _between, arity=3, torch=("lerp",),
    ),
}  # fmt: skip
"""By the name that programs call them by.

`lerp(a, b, w)` is `a + w * (b - a)`; for w of at least 0.5 `b - (1 - w) * (b - a)`, as in torch.
"""

BOOLEAN = frozenset(_TESTS)
"""Operations whose result is true or false."""
