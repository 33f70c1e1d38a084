"""An element-wise update rule as a list of operations: what is printed, interpreted and emitted.

A program maps one element's master, gradient and states to their next values. It is in single
assignment form: every operation makes a new value from values and scalars made before.

    grad, master, exp_avg   what the step begins with
    exp_avg'                the value that a state (or the master) leaves the step with
    t0, t1                  in between
    s0, s1                  scalars: learning rate, betas, bias corrections, ... of this step
    r0, r1                  one number of the whole tensor: a sum over its elements, a norm, ...
    numel                   how many elements the tensor has

The scalars are no part of the program. They come from the host at each step, computed in FP64 as
the rule computes them, and rounded to FP32 once. So one program serves all steps.

A reduction (`sum`, `amax`, `amin`) makes one number out of a value of all elements of one tensor.
What is computed of such numbers and scalars alone is again one number of the tensor; beside a value
of elements it stands at every element. A mean is `sum(x) / numel`, a norm `sqrt(sum(x^2))`. Some
rules keep such a number from step to step (NovoGrad's second moment): a *reduced* state.

`Program.run` interprets it in plain torch: in FP32, with torch's own kernel for each operation, in
the order recorded. It is the reference that a generated kernel is compared with, and where the
recorded rule used the same kernels it gives the same bits.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MASTER = "master"
GRAD = "grad"
NUMEL = "numel"


class NotFusible(Exception):
    """Why a rule is no program, as the end of the sentence "it cannot be fused: ..."."""


_OURS = re.compile(r"[rst][0-9]+|master|grad|numel|[%#].*|", re.DOTALL)


def is_free_name(name: object) -> bool:
    """Whether a state of this name can be told from the names that a program makes.

    >>> is_free_name("exp_avg"), is_free_name("t0"), is_free_name("numel")
    (True, False, False)
    """
    return isinstance(name, str) and not _OURS.fullmatch(name) and "'" not in name


def readable(name: str) -> str:
    """A name as formulas show it, which is on one line and of one piece whatever is in it.

    >>> print(readable("exp_avg'"), readable("a + b"))
    exp_avg' 'a + b'
    """
    plain, prime = name.removesuffix("'"), "'" if name.endswith("'") else ""
    return (plain if _OF_ONE_PIECE.fullmatch(plain) else ascii(plain)) + prime


_OF_ONE_PIECE = re.compile(r"[\w.\[\]]+")


@dataclass(frozen=True)
class Op:
    """`output = name(*inputs)`, one of `OPERATIONS` applied to the named values and scalars."""

    name: str
    inputs: tuple[str, ...]
    output: str


@dataclass(frozen=True)
class Program:
    """One step of a rule for one element.

    Attributes:
        ops: in the order they run.
        outputs: pairs of what is updated (`master` or a state) and the value it gets. What is not
            named keeps its value; a state that is named and not read is made by this step.
        num_scalars: how many scalars `ops` read, `s0` to `s{num_scalars - 1}`.
        reduced: those states, read or updated, that are one number of the tensor.

    >>> program = Program((Op("add_scaled", ("master", "grad", "s0"), "master'"),),
    ...                   (("master", "master'"),), 1)
    >>> print(program)
    master' = master + s0 * grad
    >>> program.run(torch.ones(2), torch.ones(2), {}, [-0.5])
    (tensor([0.5000, 0.5000]), {})
    """

    ops: tuple[Op, ...]
    outputs: tuple[tuple[str, str], ...]
    num_scalars: int
    reduced: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """What the step begins with and needs, in order of first use, but for `numel`."""
        made = {NUMEL, *(op.output for op in self.ops)}
        used = [name for op in self.ops for name in op.inputs if not _is_scalar(name)]
        used += [value for _, value in self.outputs]
        return tuple(dict.fromkeys(name for name in used if name not in made))

    @cached_property
    def per_tensor(self) -> frozenset[str]:
        """The values that are one number of the tensor, by name; all others are of elements."""
        states = {name for state in self.reduced for name in (state, f"{state}'")}
        return frozenset({NUMEL, *states, *(op.output for op in self.ops if _is_r(op.output))})

    @property
    def writes(self) -> tuple[str, ...]:
        """What the step updates: `master` and states."""
        return tuple(name for name, _ in self.outputs)

    def run(
        self,
        master: Tensor,
        grad: Tensor,
        states: Mapping[str, Tensor],
        scalars: Sequence[float] | Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next master and the states that the step writes; nothing is changed in place.

        Args:
            master: FP32, any shape.
            grad: FP32, of the same shape, already unscaled and clipped.
            states: those that the program reads, FP32, of the same shape; reduced ones of one
                element, and returned without dimensions.
            scalars: `num_scalars` numbers, rounded to FP32 here.
        """
        if len(scalars) != self.num_scalars:
            raise ValueError(
                f"the program reads {self.num_scalars} scalars and {len(scalars)} were given; "
                f"take them from the recording that the program came with"
            )
        values: dict[str, Any] = {**states, MASTER: master, GRAD: grad}
        values[NUMEL] = torch.full((), master.numel(), dtype=torch.float32, device=master.device)
        values.update((name, states[name].reshape(())) for name in self.reduced if name in states)
        per_tensor = self.per_tensor
        rounded: list[float] = torch.as_tensor(scalars, dtype=torch.float32).tolist()
        values.update((f"s{index}", value) for index, value in enumerate(rounded))
        with torch.no_grad():
            for op in self.ops:
                inputs = [values[name] for name in op.inputs]
                if op.output in per_tensor and not op.name.endswith("_scaled"):
                    # Torch mixes numbers of the host with those of a device in some kernels only.
                    inputs = [_beside(master, value) for value in inputs]
                result = OPERATIONS[op.name].compute(*inputs)
                # Some operations have no value of elements among their inputs.
                values[op.output] = result if op.output in per_tensor else _filled(master, result)
        results = {name: values[value] for name, value in self.outputs}
        return results.pop(MASTER, master), results

    def formula(self, scalars: Sequence[float] | Tensor | None = None) -> str:
        """The program as equations, one for each thing updated and each value used twice.

        With `scalars`, a line with their values follows.
        """
        return _formula(self) + ("" if scalars is None else f"\n{_listed(scalars)}")

    def __str__(self) -> str:
        return self.formula()


def _is_scalar(name: str) -> bool:
    return re.fullmatch(r"s[0-9]+", name) is not None


def _is_r(name: str) -> bool:
    return re.fullmatch(r"r[0-9]+", name) is not None


def _is_temporary(name: str) -> bool:
    return re.fullmatch(r"[rt][0-9]+", name) is not None


def _beside(like: Tensor, value: Tensor | float) -> Tensor | float:
    """A number on a device as a tensor there; on the host as it is."""
    if isinstance(value, Tensor) or like.device.type == "cpu":
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def _filled(like: Tensor, result: Tensor | float) -> Tensor:
    """A result of scalars only, at every element."""
    if isinstance(result, Tensor) and result.shape == like.shape:
        return result
    if isinstance(result, Tensor):
        return result.expand_as(like).clone()
    return torch.full_like(like, result)


# ---------------------------------------- operations

_COMPARE, _SUM, _PRODUCT, _ATOM = range(4)
"""How tightly an expression binds."""


@dataclass(frozen=True)
class Operation:
    """How an operation is computed and written.

    Attributes:
        compute: the result from tensors, and floats that are FP32 values.
        template: the expression, with a place for each input.
        level: how tightly the expression binds.
        needs: how tightly each input has to bind to stand without parentheses.
    """

    compute: Callable[..., Any]
    template: str
    level: int
    needs: tuple[int, ...]


def _tensor(value: Tensor | float) -> Tensor:
    # Never of torch's default dtype, which users set to BF16 now and then.
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)


def _function(name: str, compute: Callable[..., Any], arity: int = 1) -> Operation:
    places = ", ".join(["{}"] * arity)
    return Operation(compute, f"{name}({places})", _ATOM, (_COMPARE,) * arity)


def _binary(
    symbol: str, compute: Callable[..., Any], level: int, *, loose: bool = False
) -> Operation:
    """`a symbol b`, from left to right; `loose` if the right side may be of the same level."""
    right = level if loose else level + 1
    call = lambda a, b: compute(_tensor(a), b)  # noqa: E731
    return Operation(call, f"{{}} {symbol} {{}}", level, (level, right))


def _at_least(value: Any, bound: Any) -> Tensor:
    bounded = torch.maximum if isinstance(bound, Tensor) else torch.clamp_min
    return bounded(_tensor(value), bound)


def _at_most(value: Any, bound: Any) -> Tensor:
    bounded = torch.minimum if isinstance(bound, Tensor) else torch.clamp_max
    return bounded(_tensor(value), bound)


_UNARY = (
    "neg abs sqrt rsqrt reciprocal exp expm1 log log1p log2 sin cos tan asin acos atan sinh cosh "
    "tanh sigmoid erf relu sign floor ceil trunc round isfinite isnan isinf logical_not exp2 log10 "
    "asinh acosh atanh erfc erfinv lgamma"
).split()

_COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}

_LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}

BOOLEAN = frozenset({*_COMPARISONS, *_LOGICAL, "isfinite", "isnan", "isinf", "logical_not"})
"""Operations whose result is true or false."""

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "amax": torch.amax,
    "amin": torch.amin,
}
"""Operations that make one number out of a value of all elements."""

OPERATIONS: dict[str, Operation] = {
    **{name: _function(name, compute) for name, compute in REDUCTIONS.items()},
    **{name: _function(name, getattr(torch, name)) for name in _UNARY},
    "neg": Operation(torch.neg, "-{}", _PRODUCT, (_ATOM,)),
    "reciprocal": Operation(torch.reciprocal, "1 / {}", _PRODUCT, (_ATOM,)),
    "square": Operation(torch.square, "{}^2", _ATOM, (_ATOM,)),
    "float": _function("float", lambda a: _tensor(a).float()),
    "full": Operation(lambda a: a, "{}", _ATOM, (_ATOM,)),
    "zeros": Operation(lambda: 0.0, "0", _ATOM, ()),
    "ones": Operation(lambda: 1.0, "1", _ATOM, ()),
    "add": _binary("+", torch.add, _SUM, loose=True),
    "sub": _binary("-", torch.sub, _SUM),
    "mul": _binary("*", torch.mul, _PRODUCT, loose=True),
    "div": _binary("/", torch.div, _PRODUCT),
    "pow": Operation(lambda a, b: torch.pow(_tensor(a), b), "{}^{}", _ATOM, (_ATOM, _ATOM)),
    "atan2": _function("atan2", lambda a, b: torch.atan2(_tensor(a), _tensor(b)), 2),
    "copysign": _function("copysign", lambda a, b: torch.copysign(_tensor(a), b), 2),
    "fmod": _function("fmod", lambda a, b: torch.fmod(_tensor(a), b), 2),
    "hypot": _function("hypot", lambda a, b: torch.hypot(_tensor(a), _tensor(b)), 2),
    "max": _function("max", _at_least, 2),
    "min": _function("min", _at_most, 2),
    **{k: _binary(v, getattr(torch, k), _COMPARE) for k, v in _COMPARISONS.items()},
    **{k: _binary(v, getattr(torch, k), _COMPARE) for k, v in _LOGICAL.items()},
    "where": _function("where", lambda a, b, c: torch.where(a, _tensor(b), _tensor(c)), 3),
    # Kept whole: torch's kernels round once where the separate operations would round twice.
    "add_scaled": Operation(
        lambda a, b, s: torch.add(_tensor(a), _tensor(b), alpha=s),
        "{0} + {2} * {1}", _SUM, (_SUM, _PRODUCT, _PRODUCT),
    ),
    "sub_scaled": Operation(
        lambda a, b, s: torch.sub(_tensor(a), _tensor(b), alpha=s),
        "{0} - {2} * {1}", _SUM, (_SUM, _ATOM, _PRODUCT),
    ),
    "addcmul": Operation(
        lambda a, b, c, s=1: torch.addcmul(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {1} * {2}", _SUM, (_SUM, _PRODUCT, _PRODUCT),
    ),
    "addcmul_scaled": Operation(
        lambda a, b, c, s: torch.addcmul(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {3} * {1} * {2}", _SUM, (_SUM, _PRODUCT, _PRODUCT, _PRODUCT),
    ),
    "addcdiv": Operation(
        lambda a, b, c, s=1: torch.addcdiv(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {1} / {2}", _SUM, (_SUM, _PRODUCT, _ATOM),
    ),
    "addcdiv_scaled": Operation(
        lambda a, b, c, s: torch.addcdiv(_tensor(a), _tensor(b), _tensor(c), value=s),
        "{0} + {3} * {1} / {2}", _SUM, (_SUM, _PRODUCT, _ATOM, _PRODUCT),
    ),
    "lerp": _function("lerp", lambda a, b, w: torch.lerp(_tensor(a), _tensor(b), w), 3),
}  # fmt: skip
"""Everything that a program may do.

`lerp(a, b, w)` is `a + w * (b - a)`; for w of at least 0.5 `b - (1 - w) * (b - a)`, as in torch.
"""


# ---------------------------------------- printing


def _formula(program: Program) -> str:
    uses = Counter(name for op in program.ops for name in op.inputs)
    results = [value for _, value in program.outputs]
    texts: dict[str, tuple[str, int]] = {}
    lines: list[str] = []
    for op in program.ops:
        operation = OPERATIONS[op.name]
        inputs = [texts.get(name, (readable(name), _ATOM)) for name in op.inputs]
        places = [
            text if level >= need else f"({text})"
            for (text, level), need in zip(inputs, operation.needs, strict=True)
        ]
        text = operation.template.format(*places)
        kept = op.name in REDUCTIONS or op.output in results or uses[op.output] != 1
        if _is_temporary(op.output) and not kept:
            texts[op.output] = (text, operation.level)
        else:
            lines.append(f"{readable(op.output)} = {text}")
    named = [(f"{name}'", value) for name, value in program.outputs]
    lines += [f"{readable(new)} = {readable(value)}" for new, value in named if value != new]
    return "\n".join(lines)


def _listed(scalars: Sequence[float] | Tensor) -> str:
    numbers: list[float] = scalars.tolist() if isinstance(scalars, Tensor) else list(scalars)
    return ", ".join(
        f"s{index} = {value:.8g}" if math.isfinite(value) else f"s{index} = {value}"
        for index, value in enumerate(numbers)
    )
