"""The mode in which a wait for the device is an error is left, whatever happens."""

from __future__ import annotations

import warnings

import pytest
import torch
from waiting import no_waiting


@pytest.mark.parametrize("fails", ["entering", "inside", "nowhere"])
def test_no_mode_is_left_behind(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = ["default"]

    def set_mode(mode: str) -> None:
        modes.append(mode)  # as torch does it: first the mode, then the warning
        warnings.warn(
            "Synchronization debug mode is a prototype feature and does not yet detect all",
            stacklevel=1,
        )
        if mode == "error" and fails == "entering":
            raise RuntimeError("stopped")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    if fails == "nowhere":
        with no_waiting():
            assert modes[-1] == "error"
    else:
        with pytest.raises(RuntimeError, match="stopped"), no_waiting():
            raise RuntimeError("stopped")
    assert modes[-1] == "default"
