"""A rule of your own as one kernel: write it for one tensor, read what it computes, run it fused.

    python examples/any_rule.py

Off a GPU the same program runs in plain torch, and the printed kernel is what a GPU would run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import mixprec


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv:2302.06675: the sign of an average of gradients."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - lr * group["weight_decay"])
                    p.sub_(m.lerp(p.grad, 1 - b1).sign_(), alpha=lr)
                    m.lerp_(p.grad, 1 - b2)


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 1)).to(device)
model = mixprec.cast_model(model, "bf16")
optimizer = mixprec.MixedPrecision(
    Lion(model.parameters()), fused=True, state_formats="8bit", max_grad_norm=1.0
)
print(optimizer.explain(formula=True, source=True))

x = torch.randn(256, 32, device=device, dtype=torch.bfloat16)
target = x.float().sin().sum(1, keepdim=True)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
for step in range(200):
    loss = (model(x).float() - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 50 == 0 or step == 199:
        print(f"step {step:3d}  loss {loss.item():.4f}")
