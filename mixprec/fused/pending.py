"""A step that the device may have left undone, and what the host has counted for it on trust."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixprec.fused.cohorts import Entry
from mixprec.fused.plan import Plan
from mixprec.inner import same
from mixprec.masters import MASTER, MasterStore
from mixprec.state_formats import scale_key

__all__ = ["Flag", "Pending", "change"]


class Flag:
    """A number on its way from the device; reading it waits for the step that made it, no more.

    A late one is of a replay to come, and is read where it will be.
    """

    def __init__(self, value: Tensor, *, late: bool = False) -> None:
        self._event: Any = None
        if late or not value.is_cuda:
            self._value = value if late else value.detach().clone()
            return
        self._value = torch.empty((), dtype=value.dtype, pin_memory=True)
        self._value.copy_(value.reshape(()), non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> bool:
        # Entering a capture waits for the device, and to wait in one is an error.
        if self._event is not None and not torch.cuda.is_current_stream_capturing():
            self._event.synchronize()
        return bool(self._value != 0)


class Pending:
    """What a step changes on the host, to be taken back if the device leaves all as it was."""

    def __init__(self, plan: Plan) -> None:
        self.flag: Flag | None = None
        self.made: list[tuple[Entry, str]] = []
        self.changes: list[tuple[dict[Any, Any], Any, Any, Any]] = []
        """Dict, key, value before, value after; the class itself stands for no value."""
        self._states = [(cohort, cohort.own_state()) for cohort in plan.cohorts]
        self._origins = plan.origins if plan.programs is None else {}

    def undo(self, state: dict[Any, Any], store: MasterStore) -> bool:
        """Take it back, and say whether tensors were dropped."""
        for values, key, before, after in self.changes:
            if values.get(key) is not after:
                continue  # somebody has set it since
            if before is Pending:
                del values[key]
            else:
                values[key] = before
        for cohort, before in self._states:
            cohort.set_state(before)
        for entry, name in self.made:
            entry.pop(name, None)
            entry.pop(scale_key(name), None)
        for param, origin in self._origins.items():
            if origin == "early":
                store.early[param] = store.master(state, param).clone()
            if origin != "state":
                state[param].pop(MASTER, None)
            if not state[param]:
                del state[param]
        return bool(self.made or self._origins)


def change(
    where: str,
    values: dict[Any, Any],
    new: Mapping[Any, Any],
    pending: Pending | None,
    *,
    counted: bool,
) -> None:
    """Set what a step counts; compare it where somebody has counted already."""
    for key, value in new.items():
        if not counted:
            if pending is not None:
                pending.changes.append((values, key, values.get(key, Pending), value))
            values[key] = value
        elif not same(values.get(key), value):
            raise RuntimeError(
                f"{where}[{key!r}] became {values.get(key)!r} for some parameters and {value!r} "
                f"for others: this rule couples tensors, so it cannot be fused. Pass fused=False."
            )
