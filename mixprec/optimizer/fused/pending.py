"""What a fused step changes on the host, to be taken back if it comes to nothing.

A step comes to nothing where the device leaves all as it was, which the host hears of later, and
where something stops it. Either way it has counted, made states and told masters apart before the
first kernel started: the record of it begins before the first of these changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mixprec.optimizer.fused.cohorts import Cohort, Entry
from mixprec.optimizer.fused.kernels.launch import Begun
from mixprec.optimizer.masters import MasterStore
from mixprec.optimizer.rule.stand_ins import same

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


class Pending(Begun):
    """What a step changes on the host. To take it back may be done twice.

    Attributes:
        flag: what the device makes of the step, if it decides.
        changes: dict, key, value before, value after; the class itself stands for no value.
        begun: whether a kernel may have started.
        finished: whether the last one has.
    """

    def __init__(self) -> None:
        self.flag: Flag | None = None
        self.changes: list[tuple[dict[Any, Any], Any, Any, Any]] = []
        super().__init__()
        self.finished = False
        self._entries: dict[int, tuple[weakref.ref[Tensor], Entry | None, Entry]] = {}
        self._early: list[tuple[Tensor, Tensor]] = []
        self._numbers: list[tuple[Cohort, Any]] = []

    def keep(
        self, state: Mapping[Tensor, Entry], store: MasterStore, params: Iterable[Tensor]
    ) -> None:
        """Before entries of these parameters are made, or held in another way."""
        self._early += [(p, m) for p, m in store.early.items() if id(p) not in self._entries]
        for param in params:
            if id(param) not in self._entries:
                entry = state.get(param)
                self._entries[id(param)] = weakref.ref(param), entry, dict(entry or {})

    def keep_numbers(self, cohorts: Iterable[Cohort]) -> None:
        """Before parameters are counted."""
        self._numbers = [(cohort, cohort.own_state()) for cohort in cohorts]

    def undo(self, state: dict[Any, Any], store: MasterStore) -> bool:
        """Take it back, and say whether entries are others now, so that no plan holds."""
        for values, key, before, after in self.changes:
            if values.get(key) is not after:
                continue  # somebody has set it since
            if before is Pending:
                del values[key]
            else:
                values[key] = before
        for cohort, numbers in self._numbers:
            cohort.set_state(numbers)
        for ref, entry, kept in self._entries.values():
            param = ref()
            if param is None:
                continue
            if entry is None:
                state.pop(param, None)
            else:
                entry.clear()
                entry.update(kept)
                state[param] = entry
        for param, master in self._early:
            store.early[param] = master
        return bool(self._entries)


def change(
    where: str,
    values: dict[Any, Any],
    new: Mapping[Any, Any],
    pending: Pending,
    *,
    counted: bool,
) -> None:
    """Set what a step counts; compare it where somebody has counted already."""
    for key, value in new.items():
        if not counted:
            pending.changes.append((values, key, values.get(key, Pending), value))
            values[key] = value
        elif not same(values.get(key), value):
            raise RuntimeError(
                f"{where}[{key!r}] became {values.get(key)!r} for some parameters and {value!r} "
                f"for others: this rule couples tensors, so it cannot be fused. Pass fused=False."
            )
