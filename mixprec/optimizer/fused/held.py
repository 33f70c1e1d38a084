"""States that programs keep in a form of their own, and the way back to the rule's.

Programs store states as codes and share one step count among many parameters (`cohorts`). Whatever
runs the rule itself on such a parameter, shows its state to a trial, or saves it, asks here first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, cast
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mixprec.optimizer.fused.cohorts import Entry, decoded, separate
from mixprec.optimizer.state_formats import StateFormats

__all__ = ["HeldStates", "separate_numbers"]


_sharing: WeakSet[Optimizer] = WeakSet()
"""Optimizers whose parameters have shared numbers in some fused step."""


def separate_numbers(inner: Optimizer) -> None:
    """Give all parameters numbers of their own, although whoever let them share is gone."""
    if inner in _sharing:
        state = cast(dict[Any, Any], inner.state)
        separate(entry for key, entry in state.items() if isinstance(key, Tensor))


class HeldStates:
    """The parameters of `inner` whose state is not as the rule itself would keep it."""

    def __init__(self, inner: Optimizer, formats: StateFormats) -> None:
        self._inner = inner
        self._formats: StateFormats = formats
        self._params: Any = WeakIdKeyDictionary()
        self.releases = 0
        """How often any were given back; a plan that was made before does not hold."""

    def take(self, params: Iterable[Tensor]) -> None:
        """Programs step these parameters now, which may share numbers from here on."""
        _sharing.add(self._inner)
        self._params.update((param, None) for param in params)

    def adopt(self, params: Iterable[Tensor]) -> None:
        """The state of these parameters was loaded or copied, and of no others."""
        self._params = WeakIdKeyDictionary({p: None for p in params if p in self._inner.state})

    def resting(self, stepping: Iterable[Tensor]) -> list[Entry]:
        """The entries of those that have no part in a step of the others."""
        steps, state = set(map(id, stepping)), self._inner.state
        return [state[p] for p in self._params if id(p) not in steps and p in state]

    def release(self, params: Iterable[Tensor] | None = None) -> None:
        """Leave these parameters' state, or all, as the rule itself keeps it, which will run."""
        everybody = self._params if params is None else params
        chosen = [param for param in everybody if param in self._params]
        if not chosen:
            return
        self.releases += 1
        group_of = {p: group for group in self._inner.param_groups for p in group["params"]}
        for param in chosen:
            self._params.pop(param, None)
            entry = self._inner.state.get(param)
            if entry is not None:
                plain = self.decoded(entry, param)
                entry.clear()
                entry.update(plain)
                _place_step(entry, param, group_of.get(param, {}))

    def decoded(self, entry: Entry, param: Tensor) -> Entry:
        """An entry as the rule itself would keep it, see `cohorts.decoded`."""
        return decoded(entry, param, self._formats)

    @contextmanager
    def shown_plainly(self, params: Iterable[Tensor]) -> Generator[None]:
        """Inside, the rule finds these parameters' states as it keeps them, for a trial."""
        state = cast(dict[Any, Any], self._inner.state)
        held = [param for param in params if param in self._params and param in state]
        if not held:
            yield
            return
        shown = defaultdict[Any, Any](dict, state)
        shown.update((param, self.decoded(state[param], param)) for param in held)
        self._inner.state = shown
        try:
            yield
        finally:
            self._inner.state = cast(Any, state)


def _place_step(entry: Entry, param: Tensor, group: dict[str, Any]) -> None:
    """Torch's rules want the step count beside the parameter if fused or capturable."""
    step = entry.get("step")
    if isinstance(step, Tensor) and (group.get("fused") or group.get("capturable")):
        entry["step"] = step.to(param.device)
