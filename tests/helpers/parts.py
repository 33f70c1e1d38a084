"""Parts of a MixedPrecision that tests put others in the place of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.optim import Optimizer

import mixprec
from mixprec.optimizer.judging.verdict import Verdict


def params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """All parameters, group by group."""
    return (param for group in optimizer.param_groups for param in group["params"])


def judge_on_device(
    optimizer: mixprec.MixedPrecision, monkeypatch: pytest.MonkeyPatch, *, by_kernel: bool = True
) -> None:
    """Make the host believe that the device alone knows whether gradients are finite.

    A kernel enters its verdict into the counts, plain torch leaves that to the host.
    """
    judge = optimizer._take_step.judge

    def on_device(*args: Any, **kwargs: Any) -> Verdict:
        verdict = judge(*args, **{**kwargs, "on_device": True})
        if not by_kernel:
            return verdict
        optimizer._outcome.counts.add(verdict.overflowed, verdict.held)  # as the kernel does
        return replace(verdict, recorded=True)

    on_device.may_stay_on_device = judge.may_stay_on_device  # pyright: ignore
    monkeypatch.setattr(optimizer._take_step, "judge", on_device)
