"""Accelerate prepares, saves and loads the wrapper; it once turned FP32 state into BF16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mixprec

pytestmark = pytest.mark.thirdparty
accelerate: Any = pytest.importorskip("accelerate", reason="needs the thirdparty extra")


def prepared() -> tuple[Any, nn.Module, Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5).bfloat16()
    optimizer = mixprec.MixedPrecision(torch.optim.AdamW(model.parameters(), lr=1e-2))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    accelerator = accelerate.Accelerator(cpu=True)
    return accelerator, *accelerator.prepare(model, optimizer, schedule)


def train(accelerator: Any, model: nn.Module, optimizer: Any, schedule: Any, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    accelerator.backward(model(torch.randn(4, 6).bfloat16()).float().square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()


def masters(optimizer: Any) -> list[torch.Tensor]:
    return [master.clone() for _, master in optimizer.optimizer.masters()]


@pytest.mark.filterwarnings("ignore")
def test_accelerate_saves_and_loads_masters_bit_for_bit(tmp_path: Path) -> None:
    accelerator, model, optimizer, schedule = prepared()
    for seed in range(3):
        train(accelerator, model, optimizer, schedule, seed)
    accelerator.save_state(str(tmp_path))
    states = optimizer.optimizer.state.values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}
    again, other_model, other, other_schedule = prepared()
    again.load_state(str(tmp_path))
    train(accelerator, model, optimizer, schedule, 3)
    train(again, other_model, other, other_schedule, 3)
    torch.testing.assert_close(masters(other), masters(optimizer), rtol=0, atol=0)
