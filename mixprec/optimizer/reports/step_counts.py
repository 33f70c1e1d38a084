"""What became of the steps so far, counted where it is known: on the host, or on the device.

    skipped            gradients or their factor were not finite
    skipped_in_a_row   the same since the last step that went through
    stepped            went through: the count of steps that the rule itself has
    empty              windows without tokens, and steps without any gradient: nothing was changed
    empty_in_a_row     the same since the last step that was none
    zero               went through, and every gradient was exactly 0
    unusable           skipped, and the factor was to blame

A step is one of skipped, stepped and empty. An empty one leaves a row of skips as it is.

Once a device decides, the counts live there, and the host hears of them late: it has them sent
(`send`), goes on, and opens the letter when it comes by again (`letter`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Letter", "StepCounts"]


class Letter(NamedTuple):
    """The counts, as the host knows them."""

    skipped: int
    skipped_in_a_row: int
    stepped: int
    empty: int
    empty_in_a_row: int
    zero: int
    unusable: int


class StepCounts:
    """The counts of an optimizer.

    >>> counts = StepCounts()
    >>> for overflowed in (True, False, True, True):
    ...     counts.add(overflowed)
    >>> counts.add(False, counted=False)
    >>> counts.skipped, counts.skipped_in_a_row, counts.stepped, counts.empty
    (3, 2, 1, 1)
    """

    def __init__(self) -> None:
        self._counts: list[int] | Tensor = [0] * len(Letter._fields)
        self._sent: tuple[Tensor, Any] | None = None

    def on(self, device: torch.device) -> Tensor:
        """`[7]` int64 on `device`, in the order of `Letter`, for whoever judges there to move."""
        counts = self._counts
        if isinstance(counts, list) or counts.device != device:
            source = torch.as_tensor(counts, dtype=torch.int64)
            pinned = device.type == "cuda" and source.device.type == "cpu"
            source = source.pin_memory() if pinned else source
            self._counts = counts = source.to(device, non_blocking=device.type != "cpu")
        return counts

    def add(
        self,
        overflowed: Tensor | bool,
        counted: Tensor | bool = True,
        zero: Tensor | bool = False,
        usable: Tensor | bool = True,
    ) -> None:
        """Enter a step: whether it overflowed, held anything, had gradients of 0 alone, and a
        factor that gradients can be multiplied by."""
        flags = (overflowed, counted, zero, usable)
        device = next((flag.device for flag in flags if isinstance(flag, Tensor)), None)
        if device is None and isinstance(self._counts, list):
            self._counts = _moved_on_host(self._counts, *map(bool, flags))
            return
        counts = self.on(self._place if device is None else device)
        over, some, none, good = (_flag(flag, counts) for flag in flags)
        empty = 1 - some
        over = over * some
        went = some - over
        more = torch.stack([over, over, went, empty, empty, none * went, over * (1 - good)])
        one = torch.ones_like(over)
        kept = torch.stack([one, over + empty, one, one, empty, one, one])
        counts.mul_(kept).add_(more)

    @property
    def _place(self) -> torch.device:
        return self._counts.device if isinstance(self._counts, Tensor) else torch.device("cpu")

    # ---------------------------------------- a step that comes to nothing

    def saved(self) -> Any:
        """The counts as they are, for `restore`. Those of a device are not copied: a step that is
        stopped after the device has judged it has been entered there."""
        counts = self._counts
        if isinstance(counts, list):
            return counts, None
        return counts, None if counts.is_cuda else counts.clone()

    def restore(self, saved: Any) -> None:
        counts, copy = saved
        self._counts = counts
        if copy is not None:
            counts.copy_(copy)

    # ---------------------------------------- letters

    def send(self) -> None:
        """Have the counts sent to the host, which does not wait."""
        if not isinstance(self._counts, Tensor):
            return
        if not self._counts.is_cuda:
            self._sent = self._counts.clone(), None
            return
        copy = torch.empty(len(self._counts), dtype=torch.int64, pin_memory=True)
        copy.copy_(self._counts, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._counts.device))
        self._sent = copy, event

    def letter(self) -> Letter | None:
        """The counts that were sent, once; None if none were. Waits for their step, no more."""
        sent, self._sent = self._sent, None
        if sent is None:
            return None
        counts, event = sent
        # Entering a capture waits for the device, and to wait in one is an error.
        if event is not None and not torch.cuda.is_current_stream_capturing():
            event.synchronize()
        return Letter(*counts.tolist())

    # ---------------------------------------- looking, which may wait for the device

    def now(self) -> Letter:
        counts = self._counts
        return Letter(*(counts if isinstance(counts, list) else counts.tolist()))

    @property
    def skipped(self) -> int:
        return self.now().skipped

    @property
    def skipped_in_a_row(self) -> int:
        return self.now().skipped_in_a_row

    @property
    def stepped(self) -> int:
        return self.now().stepped

    @property
    def empty(self) -> int:
        return self.now().empty

    @property
    def empty_in_a_row(self) -> int:
        return self.now().empty_in_a_row

    def __getstate__(self) -> dict[str, Any]:
        return {"_counts": self._counts, "_sent": None}  # an event is of this process


def _moved_on_host(
    counts: list[int], overflowed: bool, counted: bool, zero: bool, usable: bool
) -> list[int]:
    skipped, skipped_in_a_row, stepped, empty, empty_in_a_row, zeros, bad = counts
    if not counted:
        return [skipped, skipped_in_a_row, stepped, empty + 1, empty_in_a_row + 1, zeros, bad]
    if overflowed:
        return [skipped + 1, skipped_in_a_row + 1, stepped, empty, 0, zeros, bad + (not usable)]
    return [skipped, 0, stepped + 1, empty, 0, zeros + zero, bad]


def _flag(flag: Tensor | bool, like: Tensor) -> Tensor:
    """0-d, 0 or 1, beside the counts; a fill for what the host knows, which would wait to copy."""
    if isinstance(flag, Tensor):
        return (flag != 0).to(device=like.device, dtype=like.dtype).reshape(())
    return torch.full((), int(flag), dtype=like.dtype, device=like.device)
