"""A rule run bare on FP32 parameters beside the same rule wrapped over 16-bit ones, bit by bit.

Both runs start at the same values, which 16 bits can hold, and get the same 16-bit gradients (the
bare rule their FP32 values). After every step

    masters of the wrapper            == parameters of the bare rule
    16-bit weights                    == the masters, rounded
    rule's own state, group values    == those of the bare rule

A closure is evaluated at 16-bit weights on both sides: the bare rule's closure rounds its
parameters first. Gradients change size from step to step; the learning rate changes on the way.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from frozen import bits, difference, frozen
from rules import Group, Recipe
from torch import Tensor, nn
from torch.optim import Optimizer

import mixprec
from mixprec import formats
from mixprec.optimizer import MixedPrecision

Masters = Literal["auto", "full", "split"]

STORAGES: tuple[tuple[torch.dtype, Masters], ...] = (
    (torch.float32, "auto"),
    (torch.bfloat16, "full"),
    (torch.bfloat16, "split"),
    (torch.float16, "full"),
)
"""What parameters are held in, and how their masters are stored."""

GRADIENT_SIZES = (1.0, 1e-2, 10.0, 0.5)
"""Gradient size by step, in turn: within the range of FP16, and across clipping thresholds of 1."""


@dataclass(frozen=True)
class Outcome:
    """How a comparison ended.

    Attributes:
        kind: "exact"; "refused" with a TypeError or ValueError of mixprec's own before any weight
            changed; "unable" if the bare rule cannot run; else "wrong".
        reason: what differed, or the text of the error.
        tier: how the wrapper ran the rule.
    """

    kind: Literal["exact", "refused", "unable", "wrong"]
    reason: str = ""
    tier: str = ""


def compare(
    recipe: Recipe,
    dtype: torch.dtype,
    masters: Masters,
    *,
    bucket_numel: int | None = 32,
    restart: int | None = None,
) -> Outcome:
    """Run `recipe` bare and wrapped over parameters of `dtype`, and say how they compare.

    `bucket_numel=32` is a bucket of one or two of a recipe's parameters, so a rule that is stepped
    bucket by bucket is stepped in several. With `restart` the wrapped run is saved after that step
    and goes on from its checkpoint with an optimizer built anew; its masters are compared with the
    run that never stopped. That is "unable" where the bare rule cannot do it either.
    """
    with process_group(recipe.collective), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        try:
            bare = _Run(recipe, dtype, masters)
            expected = list(bare.records())
            if restart is not None:
                resumed = _Run(recipe, dtype, masters, restart=restart)
                expected = [_masters_only(record) for record in expected]
                if where := difference(expected, [_masters_only(r) for r in resumed.records()]):
                    return Outcome("unable", f"its own checkpoint does not resume: {where}")
        except Exception as error:
            return Outcome("unable", recipe.unable or _text(error))
        if not recipe.still and not all(bare.moved()):
            raise AssertionError(f"{recipe.name}: a weight never moved, so nothing was compared")
        usual = {str(warning.message) for warning in given}
        wrapped = _Run(
            recipe, dtype, masters, held=dtype, bucket_numel=bucket_numel, restart=restart
        )
        outcome = _compare_wrapped(wrapped, expected)
        new = {str(warning.message) for warning in given} - usual
    if outcome.kind == "exact" and new:
        return Outcome("wrong", f"warned: {min(new)}", outcome.tier)
    return outcome


def _compare_wrapped(run: _Run, expected: list[dict[str, Any]]) -> Outcome:
    try:
        run.wrap()
        for step, (right, found) in enumerate(zip(expected, run.records(), strict=True)):
            where = difference(right, {k: found[k] for k in right}) or run.not_rounded()
            if where:
                return Outcome("wrong", f"step {step + 1}: {where}", run.tier)
    except Exception as error:
        clear = isinstance(error, (TypeError, ValueError)) and _raised_by_mixprec(error)
        return Outcome("refused" if clear and not any(run.moved()) else "wrong", _text(error))
    return Outcome("exact", run.reason, run.tier)


def _masters_only(record: dict[str, Any]) -> dict[str, Any]:
    return {"master": record["master"]}


class _Run:
    """One of the two runs: an optimizer, its parameters, and the gradients of each step."""

    def __init__(
        self,
        recipe: Recipe,
        dtype: torch.dtype,
        masters: Masters,
        *,
        held: torch.dtype = torch.float32,
        bucket_numel: int | None = None,
        restart: int | None = None,
    ) -> None:
        self.recipe, self.dtype, self.held = recipe, dtype, held
        self.masters: Masters = masters
        self.bucket_numel, self.restart = bucket_numel, restart
        generator = torch.Generator().manual_seed(0)
        shapes = [shape for group in recipe.shapes for shape in group]
        self.begin = [_values(shape, generator).to(dtype).to(held) for shape in shapes]
        self._build(self.begin)

    def _build(self, values: list[Tensor]) -> None:
        """An optimizer over new parameters."""
        self.params: list[Tensor] = [nn.Parameter(value.clone()) for value in values]
        params = iter(self.params)
        groups: list[Group] = [{"params": [next(params) for _ in g]} for g in self.recipe.shapes]
        _seed(0)
        self.optimizer: Any = self.recipe.build(groups)
        _second_lr(self.optimizer)

    def wrap(self) -> None:
        self.optimizer = MixedPrecision(
            self.optimizer, masters=self.masters, bucket_numel=self.bucket_numel
        )

    def _start_again(self) -> None:
        """Go on from a checkpoint, with nothing else kept."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        wrapped = isinstance(self.optimizer, MixedPrecision)
        if wrapped:
            self.begin = [param.detach().clone() for param in self.params]
        self._build([param.detach() for param in self.params])
        if wrapped:
            self.wrap()
        self.optimizer.load_state_dict(saved)
        if self._has_modes():
            self.optimizer.train()

    def _has_modes(self) -> bool:
        return hasattr(type(getattr(self.optimizer, "inner", self.optimizer)), "train")

    @property
    def tier(self) -> str:
        admission = self.optimizer._calls.admission
        if admission is None:
            return "direct"
        return "bucketed" if admission.per_parameter else "whole"

    @property
    def reason(self) -> str:
        admission = self.optimizer._calls.admission
        return "" if admission is None else str(admission.reason)

    def records(self) -> Iterator[dict[str, Any]]:
        """Parameters in FP32, rule's state, group values and returned loss after each step."""
        if self._has_modes():
            self.optimizer.train()
        for step in range(self.recipe.steps):
            _seed(step)
            yield self._record(self._step(step))
            if step == 2:
                _slower(self.optimizer)
            if step == 3 and self._has_modes():
                self.optimizer.eval()
                yield self._record(None)
                self.optimizer.train()
                yield self._record(None)
            if step + 1 == self.restart:
                self._start_again()

    def _step(self, step: int) -> object:
        drive = self.recipe.drive
        if drive == "grads and closure":
            self._evaluate(step)()
        if drive in ("closure", "grads and closure"):
            return _number(self.optimizer.step(self._evaluate(step)))
        if drive == "loss":
            return _number(self.optimizer.step(self._report(step)))
        self._set_grads(step)
        return _number(self.optimizer.step())

    def _set_grads(self, step: int) -> None:
        generator = torch.Generator().manual_seed(1000 + step)
        size = GRADIENT_SIZES[step % len(GRADIENT_SIZES)]
        for place, param in enumerate(self.params):
            grad = (torch.randn(param.shape, generator=generator) * size).to(self.dtype)
            if self.recipe.drive == "graph":
                bend = (grad.float() * param.float().square()).sum()
                (grad,) = torch.autograd.grad(bend, param, create_graph=True)
            elif self.recipe.drive == "sparse":
                rows = grad.clone()
                rows[step % 2 :: 2] = 0
                grad = rows.to_sparse(1)
            resting = self.recipe.rests and place == len(self.params) - 1 and step % 2 == 0
            param.grad = None if resting else grad.to(param.dtype)

    def _report(self, step: int) -> Callable[[], Tensor]:
        """A closure with the gradients of `_set_grads` and a loss that falls."""

        def closure() -> Tensor:
            self._set_grads(step)
            return torch.tensor(3.0 / (step + 1))

        return closure

    def _evaluate(self, step: int) -> Callable[[], Tensor]:
        """A closure: a bowl, at the 16-bit weights of this moment."""

        def closure() -> Tensor:
            leaves = [_rounded(p, self.dtype, self.masters).requires_grad_() for p in self.params]
            with torch.enable_grad():
                means = torch.stack([leaf.float().mean() for leaf in leaves])
                misses = torch.cat([leaf.float().flatten() - 0.1 * step for leaf in leaves])
                loss = misses.square().sum() + means.sum().square()
                if self.optimizer.param_groups[0].get("maximize"):
                    loss = -loss  # a hill: a bowl has no maximum, and the rule would leave it
                loss.backward()
            for param, leaf in zip(self.params, leaves, strict=True):
                assert leaf.grad is not None
                param.grad = leaf.grad.to(param.dtype)
            return loss.detach()

        return closure

    def _record(self, loss: object) -> dict[str, Any]:
        state = self.optimizer.state
        master = self._masters()
        return {
            "loss": loss,
            "master": [frozen(master.get(id(p), p)) for p in self.params],
            "state": [
                {k: frozen(v) for k, v in state.get(p, {}).items() if k != "master"}
                for p in self.params
            ],
            "shared state": {k: frozen(v) for k, v in state.items() if not isinstance(k, Tensor)},
            "group": [
                {k: frozen(v) for k, v in group.items() if k != "params"}
                for group in self.optimizer.param_groups
            ],
            "state_dict": self._state_dict(),
        }

    def _masters(self) -> dict[int, Tensor]:
        if isinstance(self.optimizer, MixedPrecision):
            return {id(param): master.clone() for param, master in self.optimizer.masters()}
        return {}

    def _state_dict(self) -> object:
        """What a checkpoint of FP32 parameters holds, where the rule leaves its format to torch."""
        rule: Any = type(getattr(self.optimizer, "inner", self.optimizer))
        if self.dtype != torch.float32 or rule.state_dict is not Optimizer.state_dict:
            return None
        found = frozen(self.optimizer.state_dict())
        # A rule may have looked a parameter up without giving it state.
        return {**found, "state": {k: v for k, v in found["state"].items() if v != {}}}

    def not_rounded(self) -> str:
        """Which weight is not the rounding of its master, or the empty string."""
        master = self._masters()
        for place, param in enumerate(self.params):
            wanted = _rounded(master.get(id(param), param), self.dtype, self.masters)
            if not torch.equal(bits(param), bits(wanted)):
                return f"weight {place} is not its master, rounded"
        return ""

    def moved(self) -> list[bool]:
        return [
            not torch.equal(param.detach(), begin)
            for param, begin in zip(self.params, self.begin, strict=True)
        ]


def _values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator) * 0.1


def _second_lr(optimizer: Optimizer) -> None:
    """Give the second group a learning rate of its own."""
    if len(optimizer.param_groups) > 1 and optimizer.param_groups[-1].get("lr") is not None:
        optimizer.param_groups[-1]["lr"] = optimizer.param_groups[-1]["lr"] * 0.5


def _slower(optimizer: Optimizer) -> None:
    """What a scheduler does, to floats and to tensors."""
    for group in optimizer.param_groups:
        if isinstance(group.get("lr"), Tensor):
            group["lr"].mul_(0.75)
        elif group.get("lr") is not None:
            group["lr"] *= 0.75


def _rounded(values: Tensor, dtype: torch.dtype, masters: Masters) -> Tensor:
    """A new tensor: `values` in `dtype`, to nearest even, or with ties away where masters split."""
    values = values.detach()
    if masters == "split" and values.dtype == torch.float32:
        return formats.split(values)[0]
    return values.to(dtype, copy=True)


def _seed(seed: int) -> None:
    torch.random.default_generator.manual_seed(seed)  # a tenth of the cost of torch.manual_seed
    random.seed(seed)
    np.random.seed(seed)


def _number(loss: Any) -> float | None:
    return None if loss is None else float(loss)


@contextmanager
def process_group(wanted: bool) -> Generator[None]:
    """A process group of this one process, for rules that gather."""
    if wanted:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        if wanted:
            torch.distributed.destroy_process_group()


def _raised_by_mixprec(error: BaseException) -> bool:
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(mixprec.__file__).parent
    return package in Path(trace.tb_frame.f_code.co_filename).parents


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
