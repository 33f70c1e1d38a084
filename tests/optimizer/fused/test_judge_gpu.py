"""The kernel that judges gradients and its twin in plain torch: one verdict and the same counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixprec.devices import has_triton
from mixprec.optimizer.fused.judge import DeviceJudge
from mixprec.optimizer.judging.verdict import judge
from mixprec.optimizer.reports.culprits import owners_of_nonfinite
from mixprec.optimizer.reports.step_counts import StepCounts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_triton()), reason="needs a GPU with Triton"
    ),
]

NAN, INF = math.nan, math.inf
POISONED = {"inf": [1], "nan": [3]}


def gradients(poison: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(numel, generator=generator) for numel in (5000, 33, 0, 70000)]
    if poison == "inf":
        grads[1][3] = INF
    if poison == "nan":
        grads[3][60000] = NAN
    scale = {"zero": 0.0, "huge": 1e10}.get(poison, 1.0)
    return [grad.mul_(scale).cuda() for grad in grads]


@pytest.mark.parametrize("external", [None, 0.0, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("poison", ["", "inf", "nan", "zero", "huge"])
@pytest.mark.parametrize("factor", [None, 0.0, 0.5, NAN, INF, -1.0, 1e300, 1e-300, 1e30])
def test_kernel_and_twin_agree(
    factor: float | None, poison: str, clip: float | None, external: float | None
) -> None:
    grads = gradients(poison)
    multiplier = None
    if factor is not None:
        multiplier = torch.tensor(factor, dtype=torch.float64, device="cuda")
    counted = None if multiplier is None else multiplier != 0
    found = None if external is None else torch.tensor([external], device="cuda")
    kernel, twin_counts, counts = DeviceJudge(), StepCounts(), StepCounts()
    assert kernel.takes(grads)
    ours = kernel(
        grads,
        multiplier,
        counted=counted,
        external_found_inf=found,
        max_grad_norm=clip,
        counts=counts,
    )
    twin = judge(
        grads,
        multiplier,
        counted=True if counted is None else counted,
        external_found_inf=found,
        max_grad_norm=clip,
        on_device=True,
    )
    twin_counts.add(twin.overflowed, twin.held, twin.zero, twin.usable)
    for name in ("found_inf", "finite", "counted", "zero", "overflowed"):
        assert bool(getattr(ours, name)) == bool(getattr(twin, name)), name
    if twin.counted:
        assert bool(ours.tells) == bool(twin.tells)
    assert counts.now() == twin_counts.now()
    if not twin.found_inf and twin.factor is not None:
        assert ours.factor is not None
        assert float(ours.factor) == pytest.approx(float(twin.factor), rel=1e-6)
    assert ours.parts is not None
    assert owners_of_nonfinite(*ours.parts) == POISONED.get(poison, [])
