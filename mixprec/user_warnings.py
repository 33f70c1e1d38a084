"""Warnings that are given once, at the line of the user's own code that led to them."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["Said"]


class Said:
    """What an object has warned of so far."""

    def __init__(self) -> None:
        self._causes: set[str] = set()

    def knows(self, cause: str) -> bool:
        return cause in self._causes

    def keep(self, cause: str) -> None:
        """Say nothing of this cause any more."""
        self._causes.add(cause)

    def warn(self, cause: str, message: str) -> None:
        if cause not in self._causes:
            self._causes.add(cause)
            warnings.warn(message, RuntimeWarning, stacklevel=_user_level())


def _user_level() -> int:
    """`stacklevel` of the first frame outside of this package and of torch."""
    frame, level = inspect.currentframe(), 0
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.split(".")[0] not in ("mixprec", "torch", "contextlib"):
            break
        frame, level = frame.f_back, level + 1
    return level
