"""Which states of a rule can never be negative, proved from its programs.

A second moment is a sum of squares, and 8-bit codes for numbers of one sign are twice as fine. No
name says so; the program does. Suppose that some states are not negative before a step, and follow
the operations: squares and magnitudes are not negative, nor are sums, products, maxima and roots of
what is not. A state whose new value is not shown to be so is dropped, and the proof tried again
with those that are left, until all of them hold up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixprec.fused.program import Op, Program

__all__ = ["non_negative_states"]

_ALWAYS = {
    *("square", "abs", "sqrt", "exp", "sigmoid", "relu", "zeros", "ones", "float", "rsqrt", "cosh"),
}
_IF_ALL_INPUTS_ARE = {
    *("add", "mul", "div", "sign", "floor", "ceil", "trunc", "round", "full", "add_scaled", "min"),
    *("addcmul", "addcmul_scaled", "addcdiv", "addcdiv_scaled", "reciprocal", "tanh", "log1p"),
    *("pow", "expm1", "sinh", "erf", "atan", "copysign", "sum", "amax", "amin"),
}


def non_negative_states(recordings: Iterable[tuple[Program, Sequence[float]]]) -> frozenset[str]:
    """Names of the states that stay at or above 0 under all of these programs and scalars.

    >>> decay = Program((Op("mul", ("v", "s0"), "t0"), Op("addcmul_scaled",
    ...     ("t0", "grad", "grad", "s1"), "v'")), (("v", "v'"),), 2)
    >>> non_negative_states([(decay, [0.9, 0.1])]), non_negative_states([(decay, [0.9, -0.1])])
    (frozenset({'v'}), frozenset())
    """
    steps = list(recordings)
    states = {name for program, _ in steps for name in program.writes} - {"master"}
    while True:
        kept = {name for name in states if all(_holds(name, states, *step) for step in steps)}
        if kept == states:
            return frozenset(states)
        states = kept


def _holds(state: str, assumed: set[str], program: Program, scalars: Sequence[float]) -> bool:
    """Whether a step leaves `state` at or above 0 if all `assumed` ones are."""
    known = {*assumed, "numel", *(f"s{i}" for i, value in enumerate(scalars) if value >= 0)}
    value = dict(program.outputs).get(state)
    if value is None:
        return True  # it keeps its value
    small = {f"s{i}" for i, number in enumerate(scalars) if 0 <= number <= 1}
    for op in program.ops:
        if _follows(op, known, small):
            known.add(op.output)
    return value in known


def _follows(op: Op, known: set[str], at_most_one: set[str]) -> bool:
    inputs = op.inputs
    if op.name in _ALWAYS:
        return True
    if op.name == "mul" and inputs[0] == inputs[1]:
        return True
    if op.name in ("addcmul", "addcmul_scaled") and inputs[1] == inputs[2]:
        return {inputs[0], *inputs[3:]} <= known
    if op.name == "lerp":
        return {*inputs[:2]} <= known and inputs[2] in at_most_one
    if op.name == "max":
        return bool(known & {*inputs})
    if op.name == "where":
        return {*inputs[1:]} <= known
    return op.name in _IF_ALL_INPUTS_ARE and {*inputs} <= known
