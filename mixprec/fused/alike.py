"""Whether two probes do the same, so that one may serve for both."""

from __future__ import annotations

from contextlib import suppress
from itertools import starmap

from mixprec.fused.record import Probe, Recording, RuleState
from mixprec.inner import same

__all__ = ["first_steps", "step_alike"]


def first_steps(probe: Probe, count: int) -> list[Recording]:
    """Recordings of a rule's first steps, at its group's present values, as far as there are."""
    found: list[Recording] = []
    with suppress(Exception):  # it may want a first step of its own, or a state made for it
        for _ in range(count):
            found.append(probe.step(found[-1].state if found else RuleState()))
    return found


def step_alike(left: Probe, right: Probe) -> bool:
    """Whether two kinds of parameters are stepped by the same programs and numbers."""
    steps = first_steps(left, 8), first_steps(right, 8)
    if not steps[0] or len(steps[0]) != len(steps[1]):
        return False
    return all(starmap(_same_recording, zip(*steps, strict=True)))


def _same_recording(left: Recording, right: Recording) -> bool:
    return (
        left.program == right.program
        and same(
            (left.scalars, left.group, left.shared), (right.scalars, right.group, right.shared)
        )
        and same(left.attributes, right.attributes)
        and left.state.elements == right.state.elements
        and dict(left.state.reduced) == dict(right.state.reduced)
        and same(dict(left.state.numbers), dict(right.state.numbers))
    )
