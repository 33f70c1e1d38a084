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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mixprec.optimizer.fused.program.operations import ATOM, OPERATIONS, REDUCTIONS

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


# ---------------------------------------- printing


def _formula(program: Program) -> str:
    uses = Counter(name for op in program.ops for name in op.inputs)
    results = [value for _, value in program.outputs]
    texts: dict[str, tuple[str, int]] = {}
    lines: list[str] = []
    for op in program.ops:
        operation = OPERATIONS[op.name]
        inputs = [texts.get(name, (readable(name), ATOM)) for name in op.inputs]
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
