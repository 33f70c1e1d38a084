"""What memory or a device did to a trial is raised, and never taken for a property of the rule."""

from __future__ import annotations

import errno
import sys
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from parts import params_of
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import mixprec
from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.fused.self_check import admit_fused
from mixprec.optimizer.rule.admission import accepts_sparse, admit

OUT = "CUDA out of memory. Tried to allocate 20.00 MiB"


def wrapped(cause: BaseException) -> Exception:
    try:
        try:
            raise cause
        except BaseException as error:
            raise ValueError("the rule could not make its state") from error
    except ValueError as error:
        return error


MACHINE: list[BaseException] = [
    torch.OutOfMemoryError(OUT),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(errno.ENOSPC, "No space left on device"),
    wrapped(torch.OutOfMemoryError(OUT)),
]
RULE: list[BaseException] = [
    RuntimeError("expected scalar type Float but found Half"),
    OSError("could not get source code"),
    wrapped(KeyError("step")),
    NotImplementedError(),
]


def test_memory_and_devices_are_told_from_rules() -> None:
    assert all(map(is_of_the_machine, MACHINE)) and not any(map(is_of_the_machine, RULE))
    if hasattr(torch, "AcceleratorError"):
        assert is_of_the_machine(torch.AcceleratorError("CUDA error: unspecified launch failure"))


class Calls(threading.local):
    """Steps of all copies of a rule. A trial puts back what the rule's code can name, but this."""

    number, fails_at = 0, 0
    error: BaseException = torch.OutOfMemoryError(OUT)


calls = Calls()


def count() -> None:
    calls.number += 1
    if calls.number == calls.fails_at:
        raise calls.error


sys.modules["count_of_failing_steps"] = count  # pyright: ignore[reportArgumentType]


class FailsOnce(torch.optim.SGD):
    """An SGD whose n-th step of all its copies fails, once."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        cast(Any, sys.modules["count_of_failing_steps"])()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])


def calls_of(run: Callable[[], Any]) -> int:
    calls.number = calls.fails_at = 0
    run()
    return calls.number


def inner(dtype: torch.dtype = torch.bfloat16) -> FailsOnce:
    weights = [
        nn.Parameter(torch.ones(4, 3, dtype=dtype)),
        nn.Parameter(torch.ones(5, dtype=dtype)),
    ]
    return FailsOnce(weights, lr=0.125)


@pytest.mark.parametrize("error", MACHINE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "run",
    [
        lambda: admit(inner()),
        lambda: accepts_sparse(inner()),
        lambda: admit_fused(inner(torch.float32), 0),
    ],
    ids=["admit", "accepts_sparse", "admit_fused"],
)
def test_an_error_of_the_machine_at_any_step_of_a_trial_is_raised(
    run: Callable[[], Any], error: BaseException
) -> None:
    total = calls_of(run)
    assert total > 2
    for place in range(1, total + 1, max(total // 12, 1)):
        calls.number, calls.fails_at, calls.error = 0, place, error
        with pytest.raises(type(error)):
            run()
    calls.fails_at = 0


@pytest.mark.parametrize("options", [{}, {"masters": "split"}, {"fused": True}, {"fused": "auto"}])
def test_a_step_that_ran_out_of_memory_in_its_trial_can_be_taken_again(
    options: dict[str, Any],
) -> None:
    def step(optimizer: mixprec.MixedPrecision) -> None:
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()

    right = mixprec.MixedPrecision(inner(), **options)
    total = calls_of(lambda: step(right))
    for place in range(1, total, max(total // 8, 1)):
        optimizer = mixprec.MixedPrecision(inner(), **options)
        calls.number, calls.fails_at = 0, place
        calls.error = torch.OutOfMemoryError(OUT)
        with pytest.raises(torch.OutOfMemoryError):
            step(optimizer)
        step(optimizer)
        assert optimizer.explain() == right.explain()
        for (_, master), (_, expected) in zip(optimizer.masters(), right.masters(), strict=True):
            assert torch.equal(master, expected)
    calls.fails_at = 0


class OutOfMemoryAt(TorchDispatchMode):
    """Torch's operations, of which the n-th finds no memory."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.left = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise torch.OutOfMemoryError(OUT)
        return func(*args, **(kwargs or {}))


def test_an_operation_that_finds_no_memory_is_raised_wherever_it_is() -> None:
    def admitted(place: int) -> Any:
        adam = AdamW([nn.Parameter(torch.ones(4, 3))], lr=0.125, foreach=False)
        with OutOfMemoryAt(place) as mode:
            found = admit(adam), admit_fused(adam, 0)
        return found, mode.left

    found, left = admitted(10**9)
    assert found[0].per_parameter and found[1].fusible
    total = 10**9 - left
    for place in range(1, total, total // 40):
        with pytest.raises(torch.OutOfMemoryError):
            admitted(place)


def test_an_error_that_somebody_around_is_handling_is_no_cause() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except torch.OutOfMemoryError:
        try:
            raise KeyError("step")  # what a rule does in a trial
        except KeyError as error:
            assert error.__context__ is not None
            assert not is_of_the_machine(error)
