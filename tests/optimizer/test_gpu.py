"""What only a CUDA device can show: the same bits as on a CPU, and a host that never waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from waiting import no_waiting

import mixprec
from mixprec import formats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

Masters = Literal["auto", "full", "split"]
STORAGES: list[tuple[torch.dtype, Masters]] = [
    (torch.bfloat16, "full"),
    (torch.bfloat16, "split"),
    (torch.float16, "full"),
]
SHAPES = [(128, 64), (64,), (), (33, 17)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to("cuda", dtype)) for s in SHAPES]


def give_grads(params: list[nn.Parameter], step: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype).to(p)


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}])
def test_masters_equal_the_rule_on_fp32_parameters(
    dtype: torch.dtype, masters: Masters, options: dict[str, Any]
) -> None:
    params = parameters(dtype)
    reference = [nn.Parameter(p.detach().float()) for p in params]
    inner = AdamW(params, lr=1e-2, **options)
    optimizer = mixprec.MixedPrecision(inner, masters=masters, bucket_numel=4096, fused=False)
    bare = AdamW(reference, lr=1e-2, **options)
    for step in range(5):
        give_grads(params, step, dtype)
        give_grads(reference, step, dtype)
        optimizer.step()
        bare.step()
    for (p, master), q in zip(optimizer.masters(), reference, strict=True):
        assert_same(master, q.detach())
        rounded = formats.split(master)[0] if masters == "split" else master.to(dtype)
        assert_same(p.detach(), rounded)


@pytest.mark.parametrize("rule", ["Muon", "Adafactor", "SOAP", "Shampoo", "Lamb"])
def test_rules_that_mix_elements_run_bucket_by_bucket_with_every_bit(rule: str) -> None:
    def build(dtype: torch.dtype) -> tuple[list[nn.Parameter], Any]:
        params = [p for p in parameters(dtype) if p.ndim == 2]
        if rule in ("Muon", "Adafactor"):
            return params, getattr(torch.optim, rule)(params, lr=1e-2)
        package: Any = pytest.importorskip("pytorch_optimizer")
        return params, getattr(package, rule)(params, lr=1e-2)

    (params, inner), (_, bare) = build(torch.bfloat16), build(torch.bfloat16)
    reference = [nn.Parameter(p.detach().float()) for p in params]
    bare.param_groups[0]["params"][:] = reference
    bare.state.clear()
    optimizer = mixprec.MixedPrecision(inner, fused=False, bucket_numel=4096)
    assert "bucket by bucket" in optimizer.explain()
    for step in range(4):
        give_grads(params, step, torch.bfloat16)
        give_grads(reference, step, torch.bfloat16)
        optimizer.step()
        bare.step()
    for (_, master), q in zip(optimizer.masters(), reference, strict=True):
        assert_same(master, q.detach())


@pytest.mark.parametrize(("dtype", "masters"), STORAGES)
@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_fused_rules_step_and_skip_without_making_the_host_wait(
    dtype: torch.dtype, masters: Masters, rule: str
) -> None:
    rules: dict[str, Callable[[Any], Any]] = {
        "adamw": lambda ps: AdamW(ps, lr=1e-2, fused=True),
        "sgd": lambda ps: SGD(ps, lr=1e-2, momentum=0.9, fused=True),
    }
    params = parameters(dtype)
    scaler = mixprec.DynamicLossScaler(init_scale=2.0**10)
    optimizer = mixprec.MixedPrecision(
        rules[rule](params),
        masters=masters,
        loss_scaler=scaler,
        max_grad_norm=1.0,
        fused=False,
    )
    loss = torch.ones((), device="cuda")
    scaler.multiply(loss)
    give_grads(params, 0, dtype)
    optimizer.step()
    before = [m.clone() for _, m in optimizer.masters()]
    weights = [p.detach().clone() for p in params]
    give_grads(params, 1, dtype)
    assert params[0].grad is not None
    params[0].grad[3, 3] = float("inf")
    torch.cuda.synchronize()
    with no_waiting():
        scaler.multiply(loss)
        optimizer.step()
    assert_same([m for _, m in optimizer.masters()], before)
    assert_same([p.detach() for p in params], weights)
    assert not optimizer.grads_finite and scaler.get_scale() == 2.0**9
    give_grads(params, 2, dtype)
    torch.cuda.synchronize()
    with no_waiting():
        scaler.multiply(loss)
        optimizer.step(grad_factor=torch.ones((), dtype=torch.float64, device="cuda"))
    assert optimizer.grads_finite
    assert any(not torch.equal(p, w) for p, w in zip(params, weights, strict=True))


def test_split_and_join_are_the_same_bits_as_on_the_cpu() -> None:
    high = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    values = (high[:, None] + low).flatten().view(torch.float32)
    ours, theirs = formats.split(values.cuda()), formats.split(values)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left.cpu().view(torch.int16), right.view(torch.int16))
    joined = formats.join(*ours).cpu().view(torch.int32)
    assert torch.equal(joined, formats.join(*theirs).view(torch.int32))


def test_accumulated_window_makes_the_host_wait_nowhere() -> None:
    torch.manual_seed(0)
    model = nn.Linear(64, 64).to("cuda", torch.bfloat16)
    optimizer = mixprec.MixedPrecision(AdamW(model.parameters(), fused=True), max_grad_norm=1.0)
    accumulator = mixprec.GradientAccumulator(optimizer)
    x = torch.randn(4, 8, 64, device="cuda", dtype=torch.bfloat16)
    count = torch.tensor(8, device="cuda")

    def window() -> Tensor:
        for i in range(4):
            loss_sum = model(x[i]).float().square().sum()
            accumulator.backward(loss_sum, count, last=i == 3)
        return accumulator.step()

    for _ in range(3):
        window()
    torch.cuda.synchronize()
    with no_waiting():
        loss = window()
    assert loss.isfinite()


def test_peak_memory_of_a_step_is_the_scratch() -> None:
    params = [
        nn.Parameter(torch.zeros(2**20, device="cuda", dtype=torch.bfloat16)) for _ in range(16)
    ]
    optimizer = mixprec.MixedPrecision(AdamW(params, fused=True), bucket_numel=2**21, fused=False)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    resident = torch.cuda.memory_allocated()
    optimizer.step()
    # Eight bytes an element of the bucket, and what `split` and `join` need for one tensor.
    room = 8 * 2**21 + 8 * 2**20
    few = 2**20 + 2**12  # numbers, each of which takes 512 bytes of the allocator's
    assert torch.cuda.max_memory_allocated() - resident <= room + few
