"""A program's reductions in the order in which they can be made.

A sum over a tensor has to be complete before any of its elements goes on, so each sum that another
one depends on costs a pass over the tensor. A value's level is how many sums stand before it:

    level 0   inputs, scalars, and what is computed of them
    level 1   sums of values of level 0, and what is computed with them
    ...

Values of elements are computed anew in each pass that needs them, from memory that the last pass
alone writes; numbers of the tensor are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mixprec.optimizer.fused.program.operations import REDUCTIONS
from mixprec.optimizer.fused.program.program import NUMEL, Op, Program

__all__ = ["Stage", "elements_for", "kept_numbers", "stages"]


@dataclass(frozen=True)
class Stage:
    """One level of a program.

    Attributes:
        reductions: over values of the level below.
        numbers: operations on numbers of the tensor, after the reductions.
    """

    reductions: tuple[Op, ...]
    numbers: tuple[Op, ...]


def stages(program: Program) -> list[Stage]:
    """The levels of a program that hold reductions or numbers; none for an element-wise one.

    >>> norm = (Op("square", ("grad",), "t0"), Op("sum", ("t0",), "r0"), Op("sqrt", ("r0",), "r1"))
    >>> [(len(s.reductions), len(s.numbers)) for s in stages(Program(norm, (), 0))]
    [(0, 0), (1, 1)]
    """
    if not any(op.output in program.per_tensor for op in program.ops) and not program.reduced:
        return []
    level: dict[str, int] = {}
    found: dict[int, tuple[list[Op], list[Op]]] = {0: ([], [])}
    for op in program.ops:
        here = max((level.get(name, 0) for name in op.inputs), default=0)
        here += op.name in REDUCTIONS
        level[op.output] = here
        if op.output in program.per_tensor:
            reductions, numbers = found.setdefault(here, ([], []))
            (reductions if op.name in REDUCTIONS else numbers).append(op)
    return [Stage(*map(tuple, found.get(here, ([], [])))) for here in range(max(found) + 1)]


def kept_numbers(program: Program) -> list[str]:
    """The numbers of a tensor that passes hand on to each other, old reduced states first."""
    made = [op.output for op in program.ops if op.output in program.per_tensor]
    return [*(name for name in program.reduced if name in program.reads), *made]


def elements_for(program: Program, values: Iterable[str]) -> list[Op]:
    """The operations on elements that these values need, in order."""
    needed = set(values)
    chosen: list[Op] = []
    for op in reversed(program.ops):
        if op.output in needed and op.output not in program.per_tensor:
            chosen.append(op)
            needed.update(name for name in op.inputs if name != NUMEL)
    return chosen[::-1]
