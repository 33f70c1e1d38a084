"""A wrapped optimizer and the bare rule on FP32 parameters, doing the same actions side by side.

After every action

    masters            == the oracle's parameters, bit by bit
    16-bit weights     == their rounding: ties away from zero in split masters, else nearest even
    states and groups  == those of the bare rule

A fused rule may be off by 2e-6 of each update. The oracle then goes on from what was found, so that
errors do not add up.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from bounds import SPACING, UPDATE
from frozen import difference, frozen
from oracle import Oracle, Setup, equal, unscaled
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

import mixprec

Write = Literal["no_grad", "data", "vector"]

PRESUMED_TOKENS = 16


@dataclass
class Live:
    """What a user holds: parameters, their optimizer, a schedule."""

    model: list[nn.Parameter]
    optimizer: mixprec.MixedPrecision
    scheduler: Any = None

    def record(self) -> Any:
        """Everything that a step may change."""
        masters = [m for _, m in self.optimizer.masters()]
        scaler = self.optimizer.loss_scaler
        scale = None if scaler is None else scaler.get_scale()
        return frozen([self.model, masters, self.optimizer.state_dict(), scale])


@dataclass
class Snapshot:
    live: Any
    oracle: Any
    weights: list[Tensor]


@dataclass
class Pair:
    """A wrapped optimizer and its oracle. Every method is something that users do."""

    setup: Setup
    snapshots: list[Snapshot] = field(default_factory=list[Snapshot])

    def __post_init__(self) -> None:
        self._made = self._edits = 0
        groups = [self._new_group(2), {**self._new_group(1), "lr": 0.02}]
        self.oracle = Oracle(self.setup, groups)
        scaler = None
        if self.setup.scaled:
            # FP16 overflows at 2^16 times a gradient of 1, and so the scale goes up and down.
            scaler = mixprec.DynamicLossScaler(
                init_scale=2.0**14, growth_interval=2, max_scale=2.0**16
            )
        optimizer = mixprec.MixedPrecision(
            self.setup.rule(groups),
            masters=self.setup.masters,
            loss_scaler=scaler,
            max_grad_norm=self.setup.max_grad_norm,
            bucket_numel=self.setup.bucket_numel,
            fused=self.setup.fused,
            state_formats=self.setup.state_formats,
        )
        model = [p for group in optimizer.param_groups for p in group["params"]]
        self.live = Live(model, optimizer)
        self._groups = list(optimizer.param_groups)
        self._schedule: Any = None
        self._left: tuple[Live, Any] | None = None
        self._scale = 1.0
        self._scaled_since_step = False
        self.check()

    @property
    def optimizer(self) -> mixprec.MixedPrecision:
        return self.live.optimizer

    @property
    def model(self) -> list[nn.Parameter]:
        return self.live.model

    def _new_param(self) -> nn.Parameter:
        generator = torch.Generator().manual_seed(self._made)
        dtype = self.setup.dtypes[self._made % len(self.setup.dtypes)]
        value = torch.randn(self.setup.shape(self._made), generator=generator) * 0.5
        self._made += 1
        return nn.Parameter(value.to(dtype))

    def _new_group(self, size: int) -> dict[str, Any]:
        params: list[Any] = []
        for _ in range(size):
            name = f"weight{self._made}"
            param = self._new_param()
            params.append((name, param) if self.setup.named else param)
        return {"params": params}

    # ---------------------------------------- gradients and steps

    def backward(self, seed: int, bad: float | None = None) -> None:
        """One backward pass. With `bad`, an infinity or a NaN is in one gradient."""
        slopes = self._slopes(seed, bad)
        if any(slope is not None for slope in slopes):
            self._backward(self.live, _loss(self.model, slopes))

    def _slopes(self, seed: int, bad: float | None = None) -> list[Tensor | None]:
        """Gradients: small multiples of 1/32, exact in every dtype; some parameters get none."""
        generator = torch.Generator().manual_seed(seed)
        slopes: list[Tensor | None] = []
        for param in self.model:
            slope = torch.randint(-40, 41, param.shape, generator=generator) / 32
            rests = int(torch.randint(6, (), generator=generator)) == 0
            slopes.append(slope if param.requires_grad and not rests else None)
        if bad is not None:
            for slope in slopes:
                if slope is not None:
                    slope.view(-1)[-1] = bad
                    break
        return slopes

    def _backward(self, live: Live, loss: Tensor) -> None:
        scaler = live.optimizer.loss_scaler
        if scaler is None:
            loss.backward()
            return
        # Gradients of an earlier pass carry an earlier loss scale.
        if self._scaled_since_step is False:
            live.optimizer.zero_grad()
        self._scale = scaler.get_scale()
        cast(mixprec.DynamicLossScaler, scaler).multiply(loss).backward()
        self._scaled_since_step = True

    def step(self, factor: float | Tensor | None = None) -> None:
        self._ensure_training()
        grads = self._grads()
        if self.setup.scaled and not self._scaled_since_step:
            return  # refused, as a test of its own shows
        self.optimizer.step(grad_factor=factor)
        wide = torch.tensor(factor, dtype=torch.float64) if isinstance(factor, float) else factor
        self._follow(grads, cast("Tensor | None", wide))
        self.check()

    def _grads(self) -> list[Tensor | None]:
        return [None if p.grad is None else p.grad.detach().clone() for p in self.model]

    def _follow(self, grads: list[Tensor | None], factor: Tensor | None) -> None:
        """Let the oracle step on these gradients of the model, if there is anything to step on."""
        counted = factor is None or float(factor) != 0.0
        if self.setup.scaled:
            inverse = torch.tensor(1.0 / self._scale)
            factor = inverse if factor is None else factor * inverse
            self._scaled_since_step = False
        present = [grad for grad in grads if grad is not None]
        finite = all(bool(grad.isfinite().all()) for grad in present)
        if present and counted:
            assert self.optimizer.grads_finite == finite
        if present and not (finite and counted):
            return
        if present:
            norm = self.optimizer.metrics()["grad_norm"]
            grads = unscaled(grads, factor, self.setup.max_grad_norm, norm)
        before = [master.detach().clone() for master in self.oracle.masters]
        self.oracle.step(grads)
        if not self.setup.exact:
            self._adopt(before)

    @torch.no_grad()
    def _adopt(self, before: list[Tensor]) -> None:
        """Compare a fused step with the oracle's; let the oracle go on from what was found."""
        state = self.optimizer.state_dict()["state"]
        for place, (_, found) in enumerate(self.optimizer.masters()):
            master = self.oracle.masters[place]
            update = (master - before[place]).abs().max()
            allowed = UPDATE * update + SPACING * master.abs().max()
            assert (found - master).abs().max() <= allowed, f"master {place} is off"
            if not equal(found, master):
                master.copy_(found)
                self.oracle.round(place)
            for name, right in self.oracle.optimizer.state.get(master, {}).items():
                if isinstance(right, Tensor) and right.shape == master.shape and right.ndim:
                    value = state[place][name]
                    if self.setup.state_formats is None:
                        self._compare_state(right, value, f"state[{place}][{name!r}]")
                    right.copy_(value)

    def _compare_state(self, right: Tensor, found: Tensor, what: str) -> None:
        # A running mean may cancel: its error is that of its terms, gradients below 2.
        allowed = UPDATE * max(float(right.abs().max()), 4.0)
        assert (found - right).abs().max() <= allowed, f"{what} is off"

    def window(self, seed: int, tokens: list[int], *, bad: float | None, finish: bool) -> None:
        """Micro-batches through an accumulator, and a step, or a change of mind."""
        self._ensure_training()
        self.optimizer.zero_grad()
        accumulator = mixprec.GradientAccumulator(self.optimizer, presumed_tokens=PRESUMED_TOKENS)
        scaler = self.optimizer.loss_scaler
        if scaler is not None:
            self._scale = scaler.get_scale()
        summed: list[Tensor | None] = [None] * len(self.model)
        for number, count in enumerate(tokens):
            last = number == len(tokens) - 1
            slopes = self._slopes(seed + number, bad if last else None)
            if all(slope is None for slope in slopes):
                accumulator.reset()
                self.check()
                return
            accumulator.backward(_loss(self.model, slopes), count, last=last)
            summed = [_sum(s, new) for s, new in zip(summed, slopes, strict=True)]
        self._scaled_since_step = self.setup.scaled
        grads = self._grads()
        for slope, grad in zip(summed, grads, strict=True):
            self._check_sum(slope, grad, several=len(tokens) > 1)
        if not finish:
            accumulator.reset()
            if scaler is not None:  # a loss was scaled, and its gradients are gone
                self._scaled_since_step = True
        else:
            accumulator.step()
            total = sum(tokens)
            factor = PRESUMED_TOKENS / total if total else 0.0
            self._follow(grads, torch.tensor(factor, dtype=torch.float64))
        assert all(param.grad is None for param in self.model)
        self.check()

    def _check_sum(self, slope: Tensor | None, grad: Tensor | None, *, several: bool) -> None:
        """A window's gradient is `sum * S / P`, in FP32 if it has several micro-batches."""
        if slope is None or grad is None:
            assert slope is grad
            return
        assert grad.dtype == torch.float32 or not several
        right = slope * (self._scale / PRESUMED_TOKENS)
        _agree(right, grad.float(), "gradient of a window")

    def zero_grad(self, set_to_none: bool) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        left = [param.grad for param in self.model if param.grad is not None]
        assert not (set_to_none and left) and not any(bool(grad.any()) for grad in left)
        self.check()

    # ---------------------------------------- groups and options

    def add_group(self) -> None:
        group = self._new_group(2)
        self.oracle.add_group(group)
        self.optimizer.add_param_group(group)
        self._groups.append(self.optimizer.param_groups[-1])
        self.model.extend(self.optimizer.param_groups[-1]["params"])
        self.snapshots.clear()
        self.check()

    def drop_group(self, index: int, *, is_freed: bool = True) -> None:
        """`del group`, as for a bare optimizer. Nothing keeps its parameters alive."""
        groups = self.optimizer.param_groups
        index %= len(groups)
        if len(groups) < 2:
            return
        before = sum(len(group["params"]) for group in groups[:index])
        gone = [weakref.ref(param) for param in groups[index]["params"]]
        for ref in gone:
            self.optimizer.state.pop(cast(Any, ref()), None)
        del self.model[before : before + len(gone)], groups[index], self._groups[index]
        self.oracle.drop_group(index)
        self.snapshots.clear()
        self._left = None
        if is_freed:
            gc.collect()
            assert all(ref() is None for ref in gone), "a removed parameter is kept alive"
        self.check()

    def replace_param(self, place: int, *, is_freed: bool = True) -> None:
        """Another parameter in the place of one, without state, as densification does."""
        place %= len(self.model)
        old = self.model[place]
        new = nn.Parameter(old.detach().clone().fill_(0.375))
        for group in self.optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        self.optimizer.state.pop(old, None)
        self.model[place] = new
        gone = [weakref.ref(old)]
        del old
        self.oracle.begin_anew(place, new)
        self._left = None
        if is_freed:
            gc.collect()
            assert all(ref() is None for ref in gone), "a removed parameter is kept alive"
        self.check()

    def freeze(self, place: int, frozen: bool) -> None:
        self.model[place % len(self.model)].requires_grad_(not frozen)
        self.check()

    def set_option(self, index: int, name: str, value: float) -> None:
        for optimizer in (self.optimizer, self.oracle.optimizer):
            groups = optimizer.param_groups
            if name in groups[0]:
                groups[index % len(groups)][name] = value
        self.check()

    def schedule(self, on_inner: bool) -> None:
        """Attach a schedule, or let it move on."""
        if self.live.scheduler is None:
            target = self.optimizer.inner if on_inner else self.optimizer
            self.live.scheduler = ExponentialLR(target, 0.75)
            self._schedule = ExponentialLR(self.oracle.optimizer, 0.75)
        else:
            self.live.scheduler.step()
            self._schedule.step()
        self.check()

    def mode(self, training: bool) -> None:
        if not hasattr(self.oracle.optimizer, "train"):
            return
        self.optimizer.train(training)
        self.oracle.mode(training)
        self.check()

    def _ensure_training(self) -> None:
        """A rule with modes steps in one of them only, and a new group begins in the other."""
        if not all(group.get("train_mode", True) for group in self.optimizer.param_groups):
            self.mode(True)

    # ---------------------------------------- writing by hand

    def _value(self, like: Tensor, seed: int, kind: Literal["new", "zero"]) -> Tensor:
        """`like` with some elements replaced, by numbers that no weight has had before."""
        self._edits += 1
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.rand(like.shape, generator=generator) < 0.4
        sign = torch.randint(2, like.shape, generator=generator) * 2.0 - 1.0
        number = 2.0 + self._edits / 64 if kind == "new" else 0.0
        return torch.where(chosen, (sign * number).to(like.dtype), like.detach())

    def edit(self, place: int, seed: int, kind: Literal["new", "zero"], how: Write) -> None:
        """Write some elements of a weight outside of a step."""
        place %= len(self.model)
        param = self.model[place]
        value = self._value(param, seed, kind)
        with torch.no_grad():
            _write([param], [value], how)
        self.oracle.write_weight(place, value)
        self.check()

    def edit_masters(self, seed: int, how: Write) -> None:
        """Write masters while they are in the model."""
        with self.optimizer.masters_in_model(), torch.no_grad():
            for param, master in zip(self.model, self.oracle.masters, strict=True):
                assert param.dtype == torch.float32 and equal(param, master)
            # A third that no 16 bits hold, so that a rounding on the way would show.
            values = [self._value(p, seed, "new") / 3 for p in self.model]
            _write(self.model, values, how)
        for place, value in enumerate(values):
            self.oracle.write_master(place, value, stepped=self.oracle.has_stepped(place))
        self.check()

    def adopt_params(self) -> None:
        """Re-reads masters only where weights are not their roundings: that is as it is seen."""
        self.optimizer.adopt_params()
        self.oracle.adopt()
        self.check()

    # ---------------------------------------- keeping and copying

    def holds_bare_masters(self) -> bool:
        """Whether some master is kept beside no state of the rule."""
        state = self.optimizer.state_dict()["state"]
        return any(set(entry) == {"master"} for entry in state.values())

    def save(self) -> None:
        weights = [param.detach().clone() for param in self.model]
        live = copy.deepcopy(self.optimizer.state_dict())
        self.snapshots.append(Snapshot(live, self.oracle.saved(), weights))

    @torch.no_grad()
    def load(self, number: int, *, weights_first: bool) -> None:
        """Go back to an earlier snapshot: the model's weights and the optimizer's state dict."""
        snapshot = self.snapshots[number % len(self.snapshots)]
        if weights_first:
            self._load_weights(snapshot)
        self.optimizer.load_state_dict(copy.deepcopy(snapshot.live))
        if self.optimizer.loss_scaler is not None:
            # Gradients of another scale are of no use any more.
            self._scaled_since_step &= self.optimizer.loss_scaler.get_scale() == self._scale
        if not weights_first:
            self._load_weights(snapshot)
        self.oracle.load(snapshot.oracle)
        self.check()

    def _load_weights(self, snapshot: Snapshot) -> None:
        for param, weight in zip(self.model, snapshot.weights, strict=True):
            param.copy_(weight)

    def reload(self) -> None:
        """Saving and loading again is nothing."""
        self.save()
        self.load(-1, weights_first=False)
        self.snapshots.pop()

    def fork(self, how: Literal["deepcopy", "pickle"], seed: int, *, keep_copy: bool) -> None:
        """Copy all that there is; both go on, equal and independent; one is left behind."""
        self._ensure_training()
        original, held = self.live, self.live.record()
        clone: Live = _pickled(original) if how == "pickle" else copy.deepcopy(original)
        _agree(held, clone.record(), "copy")
        assert not {id(p) for p in clone.model} & {id(p) for p in original.model}
        slopes = self._slopes(seed)
        if all(slope is None for slope in slopes):
            return
        grads: list[Tensor | None] = []
        for live in (original, clone):
            live.optimizer.zero_grad()
            self._scaled_since_step = False
            self._backward(live, _loss(live.model, slopes))
            self.live = live
            grads = self._grads()
            live.optimizer.step()
        _agree(original.record(), clone.record(), "copy after a step")
        left, self.live = (original, clone) if keep_copy else (clone, original)
        self._groups = list(self.optimizer.param_groups)
        self._follow(grads, None)
        self._left = left, left.record()
        self.check()

    # ---------------------------------------- what holds after every action

    def check(self) -> None:
        self._check_weights()
        self._check_state()
        self._check_groups()
        if self._left is not None:
            live, record = self._left
            _agree(record, live.record(), "what was left behind, after its copy went on")

    def _check_weights(self) -> None:
        found = [master for _, master in self.optimizer.masters()]
        for place, (held, right) in enumerate(
            zip(self.oracle.held, self.oracle.masters, strict=True)
        ):
            weight = self.model[place].detach()
            assert weight.dtype == held.dtype
            _agree(held.weight, weight, f"weight {place}")
            _agree(right.detach(), found[place], f"master {place}")

    def _check_state(self) -> None:
        ours, theirs = self.optimizer.state_dict(), self.oracle.optimizer.state_dict()
        state = {k: _without_master(v) for k, v in ours["state"].items() if _without_master(v)}
        right = {k: v for k, v in theirs["state"].items() if v}
        _agree(frozen(right), frozen(state), "state")
        known = {id(param) for param in self.model}
        assert all(id(key) in known for key in self.optimizer.state), "state of something unknown"

    def _check_groups(self) -> None:
        optimizer, inner = self.optimizer, self.optimizer.inner
        assert optimizer.state is inner.state
        for groups in (optimizer.param_groups, inner.param_groups):
            assert len(groups) == len(self._groups)
            assert all(left is right for left, right in zip(groups, self._groups, strict=True))
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len(self.model)
        assert all(left is right for left, right in zip(params, self.model, strict=True))
        for left, right in zip(
            optimizer.param_groups, self.oracle.optimizer.param_groups, strict=True
        ):
            _agree(_options(right), _options(left), "group")


def _loss(model: list[nn.Parameter], slopes: list[Tensor | None]) -> Tensor:
    pairs = zip(model, slopes, strict=True)
    return torch.stack([(p.float() * slope).sum() for p, slope in pairs if slope is not None]).sum()


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left + right


def _agree(right: Any, found: Any, what: str) -> None:
    """Bit by bit."""
    differing = difference(right, found)
    assert not differing, f"{what}{differing}"


def _without_master(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name != "master"}


def _options(group: dict[str, Any]) -> Any:
    # Torch adds "differentiable" to the defaults of any optimizer that it unpickles or copies.
    left_out = ("params", "differentiable")
    return frozen({name: value for name, value in group.items() if name not in left_out})


def _pickled(live: Live) -> Live:
    found: Live = pickle.loads(pickle.dumps(live))
    return found


def _write(params: list[nn.Parameter], values: list[Tensor], how: Write) -> None:
    if how == "vector":
        vector = torch.cat([value.float().flatten() for value in values])
        torch.nn.utils.vector_to_parameters(vector, params)
        return
    for param, value in zip(params, values, strict=True):
        target = param.data if how == "data" else param
        target.copy_(value)
