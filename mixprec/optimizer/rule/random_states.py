"""The random states of the process, to be read, written and seeded alike."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

__all__ = ["Generator", "RandomStates", "generators"]

Generator = tuple[str, Callable[[], Any], Callable[[Any], Any], Callable[[], Any]]
"""What to call it; reads its state, writes it, and seeds it."""


def generators(devices: Iterable[torch.device]) -> Iterator[Generator]:
    """Those that a rule can draw from: torch's, by device, Python's and NumPy's."""
    yield (
        "torch",
        torch.get_rng_state,
        torch.set_rng_state,
        lambda: torch.default_generator.manual_seed(0),
    )
    for device in devices:
        if device.type not in ("cpu", "meta"):
            yield from _of_device(device)
    yield "random", random.getstate, random.setstate, lambda: random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        draws: Any = numpy.random
        yield "numpy", draws.get_state, draws.set_state, lambda: draws.seed(0)


def _of_device(device: torch.device) -> Iterator[Generator]:
    module: Any = torch.get_device_module(device)
    if not hasattr(module, "get_rng_state"):
        return
    # Where there is one device of a kind only, nobody asks which.
    several = hasattr(module, "device")
    which = (device,) if several else ()

    def seed() -> None:
        with module.device(device) if several else nullcontext():
            module.manual_seed(0)

    yield (
        "torch",
        lambda: module.get_rng_state(*which),
        lambda state: module.set_rng_state(state, *which),
        seed,
    )


class RandomStates:
    """The random states as they are now.

    >>> before = RandomStates([])
    >>> first = torch.rand(1)
    >>> before.restore()
    >>> torch.equal(torch.rand(1), first)
    True
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        found = generators(dict.fromkeys(devices))
        self._states = [(write, read()) for _, read, write, _ in found]

    def restore(self) -> None:
        for write, state in self._states:
            write(state)
