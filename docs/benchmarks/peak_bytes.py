"""The most bytes that some work holds on a CPU, from the allocator's own events."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that `work` holds on top of what it started with."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in events:
        if event.get("name") == "[memory]":
            held += event["args"]["Bytes"]
            peak = max(peak, held)
    return peak
