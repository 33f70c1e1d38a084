"""Which states of a rule can never be negative, proved from its programs.

A second moment is a sum of squares, and 8-bit codes for numbers of one sign are twice as fine. No
name says so; the program does. Suppose that some states are not negative before a step, and follow
the operations: squares and magnitudes are not negative, nor are sums, products, maxima and roots of
what is not. A state whose new value is not shown to be so is dropped, and the proof tried again
with those that are left, until all of them hold up.

Nothing is said of NaN, which has no sign. But there are two zeros, and -0 is a trap: it is no
negative number, while its reciprocal is -inf. So a value has one of three levels, and
`operations` says for each operation which one its result has:

    2   not negative and not -0, or NaN      its reciprocal is not negative either
    1   not negative, or NaN
    0   anything

A proof holds for scalars of the same signs: `classes` tells whether another step's are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch

from mixprec.optimizer.fused.program.operations import OPERATIONS, Class
from mixprec.optimizer.fused.program.program import MASTER, NUMEL, Op, Program

__all__ = [
    "Levels",
    "classes",
    "level_of",
    "non_negative_levels",
    "non_negative_states",
    "stay_non_negative",
]

Levels = Mapping[str, int]
"""Of states that are not negative, by name: 1 or 2."""


def classes(scalars: Sequence[float]) -> tuple[Class, ...]:
    """What a proof looks at in scalars, which are rounded to FP32 as a kernel has them.

    >>> classes([0.9, -0.0, -2.0])
    ((2, True, True), (1, False, True), (0, False, True))
    """
    rounded: list[float] = torch.tensor(scalars, dtype=torch.float64).float().tolist()
    return tuple((_level(value), value > 0, value <= 1) for value in rounded)


def _level(scalar: float) -> int:
    if not scalar >= 0:
        return 0
    return 2 if math.copysign(1.0, scalar) > 0 else 1


def non_negative_states(
    recordings: Iterable[tuple[Program, Sequence[float]]], negative: Iterable[str] = ()
) -> frozenset[str]:
    """Names of the states that stay at or above 0 under all of these programs and scalars.

    `negative` names states that are negative already, on which no proof may lean.

    >>> decay = Program((Op("mul", ("v", "s0"), "t0"), Op("addcmul_scaled",
    ...     ("t0", "grad", "grad", "s1"), "v'")), (("v", "v'"),), 2)
    >>> non_negative_states([(decay, [0.9, 0.1])]), non_negative_states([(decay, [0.9, -0.1])])
    (frozenset({'v'}), frozenset())
    """
    return frozenset(non_negative_levels(recordings, negative))


def non_negative_levels(
    recordings: Iterable[tuple[Program, Sequence[float]]], negative: Iterable[str] = ()
) -> Levels:
    """The same, with the level that each of them keeps."""
    steps = [(program, classes(scalars)) for program, scalars in recordings]
    names = {name for program, _ in steps for name in program.writes} - {MASTER}
    levels = dict.fromkeys(sorted(names.difference(negative)), 2)
    while True:
        after = [_levels(*step, levels) for step in steps]
        kept = {
            name: min(level, *(found[name] for found in after)) for name, level in levels.items()
        }
        kept = {name: level for name, level in kept.items() if level}
        if kept == levels:
            return levels
        levels = kept


def stay_non_negative(levels: Levels, program: Program, scalars: tuple[Class, ...]) -> bool:
    """Whether these states, found by `non_negative_levels`, are what they were after this step."""
    after = _levels(program, scalars, levels)
    return all(after[name] >= level for name, level in levels.items())


def _levels(program: Program, scalars: tuple[Class, ...], before: Levels) -> dict[str, int]:
    """The levels of these states after a step."""
    known = {f"s{index}": found for index, found in enumerate(scalars)}
    levels = {**before, NUMEL: 2, **{name: level for name, (level, _, _) in known.items()}}
    for op in program.ops:
        levels[op.output] = level_of(op, [levels.get(name, 0) for name in op.inputs], known)
    outputs = dict(program.outputs)
    return {name: levels.get(outputs.get(name, name), 0) for name in before}


def level_of(op: Op, inputs: Sequence[int], scalars: Mapping[str, Class]) -> int:
    """The level of an operation's result, by those of its inputs."""
    return OPERATIONS[op.name].sign(op.inputs, inputs, scalars)
