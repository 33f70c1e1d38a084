"""Token counts over ranks, with real processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from mixprec.accumulation import GradientAccumulator
from mixprec.optimizer import MixedPrecision
from mixprec.window.same_tokens import RankTwins
from mixprec.window.token_counts import add_up, check_declared, count_of

COUNTS = [[6, 2], [1, 0]]
"""Tokens of each micro-batch, by rank: uneven, so that no rank's own count is anybody's mean."""


def batch(rank: int, i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + i)
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (6,), generator=generator)
    return inputs, torch.where(torch.arange(6) < COUNTS[rank][i], targets, -100)


def full_gradient(model: nn.Linear) -> Tensor:
    losses = [cross_entropy(model(x), y, reduction="sum") for x, y in everything()]
    (grad,) = torch.autograd.grad(sum(losses, torch.zeros(())) / 9, [model.weight])
    return grad


def everything() -> list[tuple[Tensor, Tensor]]:
    return [batch(rank, i) for rank in range(2) for i in range(2)]


def step_of(rank: int, declared: Any, reduction: str = "mean", wrap: Any = None) -> None:
    """One step of two ranks against the full batch's gradient."""
    model = nn.Linear(4, 3, dtype=torch.float64)
    before, expected = model.weight.detach().clone(), full_gradient(model)
    inner = SGD(model.parameters(), lr=1.0)
    accumulator = GradientAccumulator(
        inner if wrap is None else wrap(inner),
        grad_reduction=reduction,  # pyright: ignore[reportArgumentType]
        presumed_tokens=1,
    )
    called: nn.Module = DistributedDataParallel(model) if reduction == "mean" else model
    if declared is not None:
        accumulator.start(declared)
    for i in range(2):
        x, y = batch(rank, i)
        loss_sum = cross_entropy(called(x), y, reduction="sum")
        accumulator.backward(loss_sum, (y != -100).sum(), last=i == 1)
    if reduction == "sum":
        for param in model.parameters():
            dist.all_reduce(param.grad)
    accumulator.step()
    assert accumulator.num_tokens is not None and int(accumulator.num_tokens) == 9
    torch.testing.assert_close(before - model.weight.detach(), expected, rtol=1e-12, atol=1e-14)


def tokens_of_all_ranks_divide(rank: int) -> None:
    for declared in (None, 9, torch.tensor(9), 9.0):
        for reduction in ("mean", "sum"):
            step_of(rank, declared, reduction)
        step_of(rank, declared, wrap=MixedPrecision)


def low_step(rank: int | None, reduction: str, alone: Any = None) -> tuple[Tensor, Tensor]:
    """Masters of a BF16 model after a step, of one of two ranks or of one device with everything;
    and the sum of all micro-batches' gradients, without their signs."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    optimizer = MixedPrecision(SGD(model.parameters(), lr=1.0))
    accumulator = GradientAccumulator(
        optimizer,
        grad_reduction=reduction,  # pyright: ignore[reportArgumentType]
        process_group=alone,
        presumed_tokens=1,
        fp32_sums=reduction == "sum",  # DDP's own gradients are of the parameter's dtype
    )
    mean = rank is not None and reduction == "mean"
    called: nn.Module = DistributedDataParallel(model) if mean else model
    mine = everything() if rank is None else everything()[2 * rank : 2 * rank + 2]
    sizes = torch.zeros(3, 4)
    for i, (x, y) in enumerate(mine):
        loss = cross_entropy(called(x.bfloat16()).float(), y, reduction="sum")
        if rank is None:
            (grad,) = torch.autograd.grad(loss, model.weight, retain_graph=True)
            sizes += grad.float().abs()
        accumulator.backward(loss, (y != -100).sum(), last=i == len(mine) - 1)
    if rank is not None and not mean:
        for param in model.parameters():
            dist.all_reduce(param.grad)
    accumulator.step()
    return next(optimizer.masters())[1].clone(), sizes


def masters_of_all_ranks_are_those_of_one_device(rank: int) -> None:
    groups = [dist.new_group([r]) for r in range(2)]
    one, sizes = low_step(None, "sum", groups[rank])
    for reduction in ("mean", "sum"):
        two, _ = low_step(rank, reduction)
        # Each micro-batch's gradient is the same BF16 numbers. With "sum" four of them and a
        # product are rounded to FP32 in another order, 5 times each way; DDP adds two of them, and
        # two of those, in BF16. Every number is at most all of their sizes.
        rounding = 10 * 2.0**-24 if reduction == "sum" else 3 * 2.0**-9
        assert ((two - one).abs() <= rounding * (sizes + one.abs())).all(), reduction


def own_counts_are_refused_on_every_rank(rank: int) -> None:
    for declared in ([8, 1], [9, 8], [10, 8]):
        with pytest.raises(ValueError, match=rf"was given {declared[rank]} tokens on this rank.*"):
            step_of(rank, declared[rank])


def calls_on_one_rank_are_refused_on_every_rank(rank: int) -> None:
    given = "was given 9 tokens" if rank == 0 else "was not called"
    with pytest.raises(ValueError, match=rf"start\(\) {given} on this rank, and something else"):
        step_of(rank, [9, None][rank])


def a_wrong_count_of_all_ranks_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=r"given 18 tokens, but .* hold 9, over all ranks"):
        step_of(rank, 18)


def counts_beyond_fp32_are_added_up_exactly(rank: int) -> None:
    param = nn.Parameter(torch.zeros(()))
    accumulator = GradientAccumulator(SGD([param], lr=1.0), grad_reduction="sum")
    accumulator.backward(param * 3.0, [2**24 + 1, 2][rank])
    loss = accumulator.step()
    assert accumulator.num_tokens is not None and accumulator.num_tokens.dtype == torch.int64
    assert int(accumulator.num_tokens) == 2**24 + 3 and loss == 0


def losses_beyond_fp32_are_added_up_exactly(rank: int) -> None:
    param = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    accumulator = GradientAccumulator(SGD([param], lr=1.0), grad_reduction="sum")
    accumulator.backward(param * [2.0**24, 1.0][rank], 1)
    assert accumulator.step().item() == (2**24 + 1) / 2


def a_mean_of_the_same_tokens_is_named(rank: int) -> None:
    """Four ranks, of which 0 and 1 hold the same tokens, and 2 and 3."""
    param = nn.Parameter(torch.ones(()))
    accumulator = GradientAccumulator(SGD([param], lr=0.1), grad_reduction="mean")
    for window in range(4):
        accumulator.backward(param * (1.0 + rank // 2), 4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accumulator.step()
        assert len(caught) == (window == RankTwins.WINDOWS - 1)
        for warning in caught:
            text = str(warning.message)
            assert f"ranks '{rank ^ 1}' of the process group" in text
            assert "counted 2 times" in text and 'mesh["dp"].get_group()' in text


def other_tokens_are_not_taken_for_the_same(rank: int) -> None:
    """The first losses are equal, as a fresh model's are; later ones are not."""
    param = nn.Parameter(torch.zeros(()))
    accumulator = GradientAccumulator(SGD([param], lr=0.1), grad_reduction="sum")
    for _ in range(RankTwins.WINDOWS + 1):
        accumulator.backward((param * (1.0 + rank)).exp(), 4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            accumulator.step()


def a_rank_outside_of_the_group_is_refused(rank: int) -> None:
    group = dist.new_group([0])
    param = nn.Parameter(torch.zeros(()))
    accumulator = GradientAccumulator(SGD([param], lr=1.0), process_group=group)
    if rank == 0:
        accumulator.backward(param * 4.0, 4)
        accumulator.step()
        assert param.item() == -1.0
    else:
        with pytest.raises(RuntimeError, match="this rank is not in process_group"):
            accumulator.backward(param * 4.0, 4)


def a_mesh_that_may_hold_tokens_twice_needs_a_group(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    weight: Any = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Replicate(), Shard(0)]))
    optimizer = SGD([("head", weight)], lr=1.0)
    accumulator = GradientAccumulator(optimizer, grad_reduction="mean")
    with pytest.raises(ValueError, match=r"head is sharded over .*\('dp', 'tp'\).*process_group="):
        accumulator.backward(weight.sum().full_tensor(), 4)
    told = GradientAccumulator(optimizer, process_group=mesh["dp"].get_group())
    told.backward(weight.sum().full_tensor(), 4)
    assert rank in (0, 1) and weight.grad is not None
    told.reset()


def counts_that_average_out_are_refused_on_every_rank(rank: int) -> None:
    """Four ranks with 9 tokens; the declared ones add up to 4 * 9, and two of them are 9."""
    param = nn.Parameter(torch.zeros(()))
    accumulator = GradientAccumulator(SGD([param], lr=1.0), grad_reduction="sum")
    declared = [9, 10, 8, 9][rank]
    accumulator.start(declared)
    accumulator.backward(param * 1.0, [6, 1, 1, 1][rank])
    with pytest.raises(ValueError, match=f"was given {declared} tokens on this rank"):
        accumulator.step()


def test_two_ranks_divide_by_the_tokens_of_both_and_refuse_what_is_not() -> None:
    on_ranks(
        tokens_of_all_ranks_divide,
        masters_of_all_ranks_are_those_of_one_device,
        own_counts_are_refused_on_every_rank,
        calls_on_one_rank_are_refused_on_every_rank,
        a_wrong_count_of_all_ranks_is_refused,
        counts_beyond_fp32_are_added_up_exactly,
        losses_beyond_fp32_are_added_up_exactly,
        other_tokens_are_not_taken_for_the_same,
        a_rank_outside_of_the_group_is_refused,
        a_mesh_that_may_hold_tokens_twice_needs_a_group,
    )


def test_four_ranks_find_who_holds_the_same_tokens_or_declares_others() -> None:
    on_ranks(
        a_mean_of_the_same_tokens_is_named,
        counts_that_average_out_are_refused_on_every_rank,
        ranks=4,
    )


@pytest.mark.parametrize("counts", [[3, 4], [torch.tensor(3), 4]])
def test_counts_of_the_host_and_of_the_device_add_up(counts: list[Any]) -> None:
    total = add_up(counts, torch.device("cpu"))
    assert total.dtype == torch.int64 and total.item() == 7


def test_where_only_the_device_knows_the_device_checks() -> None:
    """A meta tensor has no value: whoever reads one raises."""
    tokens = torch.tensor(7, device="meta")
    for declared in (7, torch.tensor(7, device="meta")):
        check_declared(tokens, declared)
    count = count_of(torch.tensor(7.0, device="meta"))
    assert isinstance(count, Tensor) and count.dtype == torch.int64
