"""One live line of progress on a terminal; a plain line now and then everywhere else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress"]

_REDRAW_SECONDS = 0.1
_PLAIN_SECONDS = 10.0
_ERASE_LINE = "\r\x1b[2K"


class Progress:
    """Reports on `runs` runs of `steps` steps each.

    On a terminal one line is redrawn in place, at most ten times a second and never wider than the
    window. Into a file or a pipe a line is written every ten seconds and at the end of each run.

    >>> import io
    >>> stream = io.StringIO()
    >>> progress = Progress(stream, runs=2, steps=1, clock=iter([0.0, 2.0]).__next__)
    >>> progress.update("fp32", step=1, loss=5.5, num_tokens=800)
    >>> print(stream.getvalue(), end="")
    fp32  step 1/1  loss 5.500  400 tokens/s  0:02 left
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        runs: int,
        steps: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._steps = steps
        self._clock = clock
        self._began = self._shown = clock()
        self._steps_left = runs * steps
        self._steps_done = 0
        self._tokens_since_shown = 0

    def update(
        self,
        label: str,
        *,
        step: int,
        loss: float,
        num_tokens: int,
        loss_scale: float | None = None,
    ) -> None:
        """Count a step, the `step`-th of its run from 1, that read `num_tokens` tokens."""
        now = self._clock()
        self._steps_done += 1
        self._steps_left -= 1
        self._tokens_since_shown += num_tokens
        seconds = now - self._shown
        if seconds < (_REDRAW_SECONDS if self._live else _PLAIN_SECONDS) and step < self._steps:
            return
        left = (now - self._began) / self._steps_done * self._steps_left
        parts = [
            label,
            f"step {step}/{self._steps}",
            f"loss {loss:.3f}",
            f"{self._tokens_since_shown / max(seconds, 1e-9):,.0f} tokens/s",
            *([] if loss_scale is None else [f"loss scale {loss_scale:g}"]),
            f"{int(left) // 60}:{int(left) % 60:02} left",
        ]
        self._shown, self._tokens_since_shown = now, 0
        self._write("  ".join(parts))

    def clear(self) -> None:
        """Leave the terminal's line empty for what is printed next."""
        if self._live:
            self._stream.write(_ERASE_LINE)
            self._stream.flush()

    def _write(self, line: str) -> None:
        if self._live:
            # A line that wraps cannot be erased, and some terminals wrap in their last column.
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write(_ERASE_LINE + line[:columns])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
