"""Sums of numbers of the device that the host reads late enough not to wait for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["LateSums"]


class LateSums:
    """Takes numbers one by one and gives back the sum of each `size` of them, once it is known.

    Numbers of the host and of a CPU are known at once. A sum on a CUDA device is copied to the host
    behind everything that is queued there, and given back by the first later call that finds it
    there. No other device tells when a copy has arrived, so the host waits, once in `size` calls.

    >>> sums = LateSums(2)
    >>> [sums.add(1), sums.add(torch.tensor(2)), sums.add(0), sums.add(0)]
    [None, 3, None, 0]
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._part: list[int | Tensor] = []
        self._under_way: tuple[Tensor, Any] | None = None

    def add(self, number: int | Tensor) -> int | None:
        self._part.append(number)
        if len(self._part) < self.size:
            return self._arrived()
        part, self._part = self._part, []
        here = sum(int(n) for n in part if not isinstance(n, Tensor) or n.device.type == "cpu")
        there = [n for n in part if isinstance(n, Tensor) and n.device.type != "cpu"]
        if not there:
            return here
        total = torch.stack([n.to(there[0].device, torch.int64) for n in there]).sum() + here
        if total.device.type == "meta":
            return None
        if total.device.type != "cuda":
            return int(total)
        if not torch.cuda.is_current_stream_capturing():
            self._send(total)
        return None

    def _send(self, total: Tensor) -> None:
        copy = torch.empty((), dtype=torch.int64, pin_memory=True)
        copy.copy_(total, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(total.device))
        self._under_way = copy, arrival

    def _arrived(self) -> int | None:
        if self._under_way is None or not self._under_way[1].query():
            return None
        copy, self._under_way = self._under_way[0], None
        return int(copy)

    def __getstate__(self) -> dict[str, Any]:
        return {"size": self.size, "_part": [], "_under_way": None}
