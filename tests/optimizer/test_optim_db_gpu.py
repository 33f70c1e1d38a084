"""Every input that torch's own tests try on torch.optim's rules with CUDA, bare and wrapped."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from rules import optim_db
from torch import Tensor, nn

import mixprec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

APART = ("LBFGS", "SparseAdam")
"""Which take a closure, or sparse gradients; their inputs are the same on a CPU."""

RULES: dict[str, Any] = {getattr(info.optim_cls, "__name__", ""): info for info in optim_db}

CASES = [
    pytest.param(info, place, id=f"{name}-{place}")
    for name, info in RULES.items()
    if torch.cuda.is_available() and name not in APART
    for place, given in enumerate(info.optim_inputs_func(device="cuda"))
    if not given.kwargs.get("differentiable")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("info", "place"), CASES)
def test_inputs_for_cuda_give_masters_bit_identical_to_the_bare_rule(
    info: Any, place: int, dtype: torch.dtype
) -> None:
    kwargs = info.optim_inputs_func(device="cuda")[place].kwargs
    generator = torch.Generator().manual_seed(0)
    begin = [(torch.randn(s, generator=generator) * 0.1).to(dtype) for s in ((4, 6), (3, 5))]

    def build(held: torch.dtype) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(value.cuda().to(held)) for value in begin]
        return params, info.optim_cls(params, **copy.deepcopy(kwargs))

    bare, right = build(torch.float32)
    params, inner = build(dtype)
    ours = mixprec.MixedPrecision(inner, fused=False)
    for _ in range(4):
        for param, other in zip(params, bare, strict=True):
            grad = torch.randn(param.shape, generator=generator).to(dtype).cuda()
            param.grad, other.grad = grad, grad.float()
        ours.step()
        right.step()
    masters = {id(param): master for param, master in ours.masters()}
    for param, other in zip(params, bare, strict=True):
        found: Tensor = masters.get(id(param), param.detach())
        assert torch.equal(found, other.detach())
