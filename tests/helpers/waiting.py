"""Finding out whether the host waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def no_waiting() -> Generator[None]:
    """Any synchronisation of the host with the device raises inside."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # Torch says once a process that the mode is a prototype, after it has set it.
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("default")
