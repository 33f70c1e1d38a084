"""Seeing every tensor operation of a step and writing down those on elements.

A dispatch mode stands below autograd and above the kernels: each operation of torch passes through
it with its tensors and numbers, whatever Python code called it. What touches the parameter, its
gradient or its states becomes an operation of `program.OPERATIONS`, with the numbers lifted into a
list; the rest (step counts, bias corrections, learning rates held in tensors) just runs. Operations
on lists of tensors (`torch._foreach_*`) are written down tensor by tensor, in-place ones as new
values, so a rule reads the same however it was coded.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec.fused.program import BOOLEAN

RawOp = tuple[str, tuple[str, ...], str]
"""Name, inputs, output. `%3` is the value of the operation 3, `#3` the scalar 3."""


class NotFusible(Exception):
    """Why a rule cannot be recorded, as the end of the sentence "it cannot be fused: ..."."""


class Recorder(TorchDispatchMode):
    """Sees every operation; keeps those on tensors that come from the roots.

    A tensor is known by the memory it lies in, so views and in-place operations need no care: an
    in-place operation gives its memory a new value. The recorder keeps every such tensor alive, so
    no memory is used twice.
    """

    def __init__(self, roots: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.ops: list[RawOp] = []
        self.scalars: list[float] = []
        self.numel = next(iter(roots.values())).numel()
        self._values = {_memory(tensor): name for name, tensor in roots.items()}
        self.booleans: set[str] = set()
        self._alive = [tensor.detach() for tensor in roots.values()]

    def value_of(self, value: Any) -> str | None:
        """The value that lies in a tensor now, if it is one of elements."""
        return self._values.get(_memory(value)) if isinstance(value, Tensor) else None

    def holds(self, value: Any) -> bool:
        """Whether tensors of elements are anywhere inside."""
        return any(self.value_of(tensor) is not None for tensor in _tensors(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotFusible(f"it draws random numbers ({_called(func)})")
        name: str = func._schema.name.partition("::")[2]
        if name.startswith("_foreach_"):
            return self._foreach(func, name, args, kwargs)
        if not self._sees(args, kwargs):
            result = self.call(func, args, kwargs, seen=False)
            if name in _FACTORIES and result.numel() == self.numel:
                self._record(func, name, args, kwargs, result)
            return result
        if name in _READS:
            raise NotFusible(f"it reads values of elements ({_called(func)})")
        result = self.call(func, args, kwargs, seen=True)
        self._record(func, name, args, kwargs, result)
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], *, seen: bool) -> Any:
        """Run an operation; `seen` if it touches elements."""
        return func(*args, **kwargs)

    def _sees(self, args: Any, kwargs: dict[str, Any]) -> bool:
        values = self._values
        for arg in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(arg, Tensor):
                if _memory(arg) in values:
                    return True
            elif isinstance(arg, (list, tuple)) and self.holds(arg):
                return True
        return False

    def _foreach(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record what happens to each tensor of the lists."""
        # Operands are encoded after the call, which an in-place one must not change.
        before = [_shallow(arg) for arg in args]
        results = self.call(func, args, kwargs, seen=self._sees(args, kwargs))
        for place in range(next(len(arg) for arg in args if isinstance(arg, (list, tuple)))):
            single = [arg[place] if isinstance(arg, (list, tuple)) else arg for arg in before]
            named = {k: v[place] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
            if self._sees(single, named):
                result = single[0] if results is None else results[place]
                short = name.removeprefix("_foreach_")
                self._record(func, short, single, named, result)
        return results

    def _record(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        in_place = name.endswith("_") and not name.endswith("__")
        base = name[:-1] if in_place else name
        if base in _VIEWS:
            self._check_view(func, args[0], result)
            return
        if base in MAKERS and result.numel() != self.numel:
            return  # of another size: refused where it meets an element
        translate = _TRANSLATIONS.get(base)
        if translate is None:
            raise NotFusible(_why_not(func))
        target: Tensor = args[0] if in_place else kwargs.get("out", result)
        rest = args[1:] if base in _OVERWRITES else args
        operands = [self._operand(func, arg) for arg in rest]
        named = {k: self._operand(func, v) for k, v in kwargs.items() if k not in _IGNORED}
        self._bind(func, target, translate(self, *operands, **named))

    def _operand(self, func: Any, arg: Any) -> Any:
        """A value's name, a number, or what else an operation takes, unchanged."""
        if isinstance(arg, (list, tuple)):
            return [self._operand(func, item) for item in arg]
        if not isinstance(arg, Tensor):
            return arg
        value = self._values.get(_memory(arg))
        if value is not None:
            return value
        if arg.numel() == 1:
            return arg.item()
        raise NotFusible(
            f"{_called(func)} takes a tensor of {arg.numel()} elements that comes from neither "
            f"the parameter, nor its gradient, nor its state"
        )

    def _check_view(self, func: Any, viewed: Tensor, result: Any) -> None:
        whole = isinstance(result, Tensor) and result.numel() == self.numel
        if not whole or not result.is_contiguous() or result.dtype != viewed.dtype:
            raise NotFusible(_why_not(func))

    def _bind(self, func: Any, target: Tensor, value: str) -> None:
        if target.numel() != self.numel:
            raise NotFusible(
                f"{_called(func)} makes {target.numel()} values of {self.numel}: it mixes elements"
            )
        if target.dtype not in (torch.float32, torch.bool):
            kind = str(target.dtype).removeprefix("torch.")
            raise NotFusible(f"{_called(func)} computes in {kind}, and kernels compute in FP32")
        value = self._as_number(value) if target.dtype == torch.float32 else self._as_truth(value)
        self._values[_memory(target)] = value
        self._alive.append(target)

    def emit(self, name: str, *inputs: Any) -> str:
        """Record an operation on values and numbers; returns the name of its value."""
        if name in _LOGIC:
            inputs = tuple(map(self._as_truth, inputs))
        elif name == "where":
            inputs = (inputs[0], *map(self._as_number, inputs[1:]))
        elif name != "float":
            inputs = tuple(map(self._as_number, inputs))
        named = tuple(map(self._named, inputs))
        output = f"%{len(self.ops)}"
        self.ops.append((name, named, output))
        if name in BOOLEAN:
            self.booleans.add(output)
        return output

    def _as_number(self, operand: Any) -> Any:
        """A value that is no truth value, for arithmetic."""
        return self.emit("float", operand) if operand in self.booleans else operand

    def _as_truth(self, operand: Any) -> Any:
        """A truth value: whether a number is not 0."""
        return operand if operand in self.booleans else self.emit("ne", operand, 0.0)

    def _named(self, operand: Any) -> str:
        if isinstance(operand, str):
            return operand
        if not isinstance(operand, (int, float)):
            raise NotFusible(f"it computes with {operand!r}, which is no real number")
        self.scalars.append(float(operand))
        return f"#{len(self.scalars) - 1}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, deque, dict)):
        items = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from _tensors(item)


def _memory(tensor: Tensor) -> int:
    """What two tensors have in common when they share memory from its beginning."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata  # without data on a meta device


def _shallow(arg: Any) -> Any:
    return list(arg) if isinstance(arg, (list, tuple)) else arg


def _called(func: Any) -> str:
    return str(func._schema.name).replace("aten::", "torch.")


def _why_not(func: Any) -> str:
    if torch.Tag.pointwise in func.tags:
        return f"{_called(func)} has no fused form"
    return f"{_called(func)} is not element-wise"


_READS = {"_local_scalar_dense", "equal", "is_nonzero", "allclose", "item", "is_same_size"}

_VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "detach", "alias", "unsqueeze", "squeeze"),
    *("expand", "as_strided", "t", "transpose", "permute", "slice", "select"),
}
"""What names memory anew: fine if it names all of it, in order."""

_FACTORIES = {"zeros", "ones", "full", "empty", "empty_strided"}

MAKERS = {*_FACTORIES, "new_zeros", "new_ones", "new_full", "new_empty"}
"""What gives nothing of a tensor but its kind."""

_OVERWRITES = {"copy", "fill", "zero"}
"""What gives its first argument a value that does not depend on the old one."""

_LOGIC = {"logical_and", "logical_or", "logical_xor", "logical_not"}

_IGNORED = {"out", "dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}

# ---------------------------------------- torch's operations in terms of a program's

_Value = str | float
"""The name of a value, or a number."""


def _add(r: Recorder, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return r.emit("add", a, b) if alpha is None else r.emit("add_scaled", a, b, alpha)


def _sub(r: Recorder, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return r.emit("sub", a, b) if alpha is None else r.emit("sub_scaled", a, b, alpha)


def _rsub(r: Recorder, a: _Value, b: _Value, alpha: float | None = None) -> str:
    return _sub(r, b, a, alpha)


def _div(r: Recorder, a: _Value, b: _Value, rounding_mode: str | None = None) -> str:
    if rounding_mode is None:
        return r.emit("div", a, b)
    return r.emit(rounding_mode, r.emit("div", a, b))


def _pow(r: Recorder, base: _Value, exponent: _Value) -> str:
    # Torch has kernels of their own for these, and so will ours: the exponent becomes structure.
    known = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if isinstance(base, str) and isinstance(exponent, (int, float)) and exponent in known:
        return r.emit(known[exponent], base)
    return r.emit("pow", base, exponent)


def _addcmul(r: Recorder, a: _Value, b: _Value, c: _Value, value: float | None = None) -> str:
    return r.emit("addcmul", a, b, c) if value is None else r.emit("addcmul_scaled", a, b, c, value)


def _addcdiv(r: Recorder, a: _Value, b: _Value, c: _Value, value: float | None = None) -> str:
    return r.emit("addcdiv", a, b, c) if value is None else r.emit("addcdiv_scaled", a, b, c, value)


def _clamp(r: Recorder, a: _Value, min: _Value | None = None, max: _Value | None = None) -> str:
    value = a
    if min is not None:
        value = r.emit("max", value, min)
    if max is not None:
        value = r.emit("min", value, max)
    return cast(str, value)


def _masked_fill(r: Recorder, a: _Value, mask: _Value, value: _Value) -> str:
    return r.emit("where", mask, value, a)


def _nan_to_num(
    r: Recorder,
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
    r: Recorder, a: _Value, indices: list[Any], value: _Value, accumulate: bool = False
) -> str:
    """`a[mask] = number`; a mask is as large as the parameter, as all that is recorded."""
    mask = indices[0]
    if len(indices) != 1 or mask not in r.booleans or isinstance(value, str) or accumulate:
        raise NotFusible("torch.index_put is not element-wise")
    return r.emit("where", mask, value, a)


def _copy(r: Recorder, source: _Value, *_rest: object) -> str:
    return source if isinstance(source, str) else r.emit("full", source)


def _same_value(r: Recorder, a: _Value, *_rest: object) -> str:
    return cast(str, a)


def _zeros(r: Recorder, *_: object) -> str:
    return r.emit("zeros")


def _ones(r: Recorder, *_: object) -> str:
    return r.emit("ones")


def _full(r: Recorder, *operands: _Value) -> str:
    return r.emit("full", operands[-1])


def _plain(name: str) -> Callable[..., str]:
    return lambda r, *operands: r.emit(name, *operands)


_PLAIN = (
    "neg abs sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan asin acos atan sinh cosh "
    "tanh sigmoid erf relu sign floor ceil trunc round isfinite isnan isinf logical_not mul where "
    "lt le gt ge eq ne logical_and logical_or logical_xor lerp atan2 copysign"
).split()

_TRANSLATIONS: dict[str, Callable[..., str]] = {
    **{name: _plain(name) for name in _PLAIN},
    **{name: _plain("max") for name in ("maximum", "clamp_min")},
    **{name: _plain("min") for name in ("minimum", "clamp_max")},
    **{f"bitwise_{name}": _plain(f"logical_{name}") for name in ("not", "and", "or", "xor")},
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros", "zero"), _zeros),
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided"), _zeros),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _ones),
    **dict.fromkeys(("full_like", "full", "new_full", "fill"), _full),
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "div": _div,
    "true_divide": _div,
    "pow": _pow,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "clamp": _clamp,
    "masked_fill": _masked_fill,
    "index_put": _index_put,
    "nan_to_num": _nan_to_num,
    "copy": _copy,
    "clone": _same_value,
    "contiguous": _same_value,
    "_to_copy": _same_value,
    "sgn": _plain("sign"),
    "float_power": _pow,
}
