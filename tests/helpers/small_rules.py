"""Small update rules to record: plain gradient descent, bent by each test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.optimizer.fused.recording.probe import Probe, Recording, RuleState


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or ((4, 6), (5,))
    return [nn.Parameter(torch.randn(s, generator=generator) * 0.1) for s in shapes]


def recordings(optimizer: Optimizer, steps: int) -> list[Recording]:
    """The first steps of the rule, for its first group's first parameter."""
    probe = Probe(optimizer, 0, optimizer.param_groups[0]["params"][0])
    found: list[Recording] = []
    for _ in range(steps):
        found.append(probe.step(found[-1].state if found else RuleState()))
    return found


class Rule(Optimizer):
    """Plain gradient descent, to be bent by subclasses."""

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, p.grad, self.state[p])

    def update(self, group: dict[str, Any], p: Any, grad: Tensor, state: dict[str, Any]) -> None:
        p.add_(grad, alpha=-group["lr"])
