"""Trying a rule without a trace: random states, globals of the rule's modules, warnings.

A trial runs the user's code, and several times, which must agree. Code that draws random numbers
agrees only from equal seeds; but to seed a generator of the whole process takes numbers away from
whoever draws from it meanwhile, in another thread perhaps. So a rule is tried without seeds first,
and with them only if it has moved a random state.

A rule may also count in a global, in an attribute of its class or in a variable around a function.
What it finds there must be the same in each trial, and what it leaves be put back.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec.caller_modes import plain_modes
from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.rule.code import RuleCode, code_of
from mixprec.optimizer.rule.copies import Copier, Opaque
from mixprec.optimizer.rule.random_states import generators
from mixprec.torch_modes import run_under

__all__ = ["Trying", "undisturbed"]

T = TypeVar("T")


@contextmanager
def undisturbed(inner: Optimizer, code: RuleCode | None = None) -> Generator[Trying]:
    """Keeps what a trial of `inner`'s rule could change; modes off, and no warnings, for the rule
    will give its own when it really runs."""
    trying = Trying(inner, code_of(inner) if code is None else code)
    try:
        with plain_modes(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield trying
    finally:
        trying.restore()


class Trying:
    """What a rule can reach outside of its optimizer.

    Attributes:
        code: what the rule's code can name.
        seeded: whether each trial is to begin from equal seeds (`begin`).
    """

    def __init__(self, inner: Optimizer, code: RuleCode) -> None:
        self._began_alone = threading.active_count() == 1  # first: a thread may draw and end here
        devices = {p.device for group in inner.param_groups for p in group["params"]}
        self._generators = list(generators(devices))
        self._before = [read() for _, read, _, _ in self._generators]
        self.code = code
        self._variables = _Variables(code)
        self._may_draw = code.everything or not code.names.isdisjoint(_DRAWING)
        self._may_draw_from_torch = code.everything or any(map(_is_random, code.names))
        self.seeded = False

    def _is_alone(self) -> bool:
        """Whether nobody else can have drawn."""
        return self._began_alone and threading.active_count() == 1

    def agreeing(self, attempt: Callable[[], T]) -> T:
        """The outcome of an attempt that runs trials; made again with seeds if one drew."""
        try:
            found = attempt()
        except Exception as error:
            if is_of_the_machine(error) or not self.drew(attempt):
                raise
        else:
            if not self.drew(attempt):
                return found
        self.seeded = True
        return attempt()

    def begin(self) -> None:
        """Before each trial."""
        self._variables.restore()
        if self.seeded:
            for _, _, _, seed in self._generators:
                seed()

    def changed(self) -> dict[str, Any]:
        """Numbers outside of the optimizer that are not what they were, by what to call them."""
        return self._variables.changed()

    def drew(self, attempt: Callable[[], object] | None = None) -> bool:
        """Whether the rule has moved a random state.

        Another thread may have been it. Then torch is asked, by another `attempt`, whether this
        thread draws; of Python and NumPy nobody knows, so the rule's code is asked.
        """
        moved = self._moved()
        if not moved or self._is_alone():
            return bool(moved)
        if not moved <= {"torch"}:
            return self._may_draw
        draws = _Draws()
        if attempt is not None:
            with suppress(Exception):
                run_under([draws], attempt)
        return draws.any

    def drawn(self) -> set[str]:
        """The generators that the rule has moved, as far as that can be told: see `drew`."""
        moved = self._moved()
        if self._is_alone():
            return moved
        found = moved - {"torch"} if self._may_draw else set[str]()
        return found | (moved & {"torch"} if self._may_draw_from_torch else set())

    def restore(self) -> None:
        """Leave everything as it was."""
        self._variables.restore()
        if self.seeded or self.drawn():
            for (_, _, write, _), state in zip(self._generators, self._before, strict=True):
                write(state)

    def _moved(self) -> set[str]:
        pairs = zip(self._generators, self._before, strict=True)
        return {name for (name, read, _, _), before in pairs if not _same(read(), before)}


_DRAWING = {"random", "np", "numpy", "scipy", "secrets", "default_rng", "RandomState"}


_DISTRIBUTIONS = ("normal", "uniform", "bernoulli", "multinomial", "exponential", "geometric")


def _is_random(name: str) -> bool:
    """Whether a function of torch of this name draws numbers, most likely."""
    others = (*_DISTRIBUTIONS, "rand", "cauchy", "poisson", "dropout")
    return any(part in name for part in others)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return Copier({}).same(left, right)


class _Draws(TorchDispatchMode):
    """Sees whether this thread draws random numbers from torch."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.any = self.any or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Variables:
    """Names outside of an optimizer that a rule's code could give other values."""

    def __init__(self, code: RuleCode) -> None:
        self._kept: list[tuple[str, Any, str, Any, Any, Copier]] = []
        for called, holder, name in code.variables():
            copier = Copier({})
            with suppress(Opaque, ValueError):  # a cell may be empty
                value = _get(holder, name)
                self._kept.append((called, holder, name, value, copier.copy(value), copier))

    def changed(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for called, holder, name, _, copy, copier in self._kept:
            now = _get(holder, name, None)
            if not copier.same(copy, now):
                with suppress(Opaque):
                    found[called] = Copier({}).copy(now)
        return found

    def restore(self) -> None:
        for _, holder, name, value, copy, copier in self._kept:
            if _get(holder, name, None) is not value:
                _put(holder, name, value)
            if not copier.same(copy, value):
                _put(holder, name, _refilled(value, Copier({}).copy(copy)))


def _get(holder: Any, name: str, *default: Any) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, *default) if default else holder[name]
    try:
        return getattr(holder, name, *default)
    except ValueError:  # an empty cell
        if default:
            return default[0]
        raise


def _put(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


@torch.no_grad()
def _refilled(value: Any, copy: Any) -> Any:
    """What a value was, by its copy: the same object, where others see it too, if it can be."""
    if type(value) is not type(copy):
        return copy
    if isinstance(value, Tensor) and value.shape == copy.shape and value.dtype == copy.dtype:
        return value.copy_(copy)
    if isinstance(value, dict):
        mine: dict[Any, Any] = value
        items = {key: _refilled(mine.get(key), item) for key, item in copy.items()}
        mine.clear()
        mine.update(items)
    elif isinstance(value, (list, deque)):
        items = list(map(_refilled, value, copy))
        items += list(copy)[len(items) :]
        value.clear()
        value.extend(items)
    elif isinstance(value, tuple):
        return value if len(list(map(_refilled, value, copy))) == len(copy) else copy
    elif isinstance(value, set):
        value.clear()
        value.update(copy)
    elif hasattr(value, "__dict__"):
        _refilled(vars(value), vars(copy))
    else:
        return copy
    return value
