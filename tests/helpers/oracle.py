"""The bare rule on FP32 parameters, told what happened to a wrapped optimizer over 16-bit ones.

The oracle knows nothing of mixprec. It hears of actions in terms that any user has: gradients, a
factor, a norm to clip to, weights written by hand. It unscales and clips in a few lines of its own,
steps the bare rule, and rounds with arithmetic of its own.

What an edit from outside does: a full master is re-read where its weight is not its rounding any
more; a split one follows with the weight as its upper half, and its remainder stays. A master that
was loaded or set, and not yet stepped, is full for that purpose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from frozen import bits
from torch import Tensor, nn
from torch.optim import Optimizer

Build = Callable[[list[dict[str, Any]]], Optimizer]


@dataclass(frozen=True)
class Setup:
    """One way to wrap one rule.

    Attributes:
        rule: builds the optimizer.
        dtypes: of the parameters, in turn.
        exact: whether masters and states equal the bare rule's bit by bit.
        matrices: whether the rule takes matrices only.
    """

    rule: Build
    dtypes: tuple[torch.dtype, ...]
    masters: Literal["auto", "full"] = "auto"
    fused: bool = False
    exact: bool = True
    matrices: bool = False
    state_formats: Literal["8bit"] | None = None
    bucket_numel: int | Literal["auto"] | None = "auto"
    scaled: bool = False
    max_grad_norm: float | None = None
    named: bool = False

    def is_split(self, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 and self.masters == "auto"

    def shape(self, place: int) -> tuple[int, ...]:
        shapes = ((4, 6), (3, 5), (7, 2)) if self.matrices else ((4, 6), (5,), (3, 2, 2), ())
        return shapes[place % len(shapes)]


# ---------------------------------------- arithmetic


def away(master: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 rounding with ties away from zero, and what is left of the bits."""
    whole = master.contiguous().view(torch.int32)
    upper = (whole + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), whole - (upper << 16)


def joined(weight: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 number of these two halves; beside a zero they may form none, which stays zero."""
    whole = (weight.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder
    found = whole.view(torch.float32)
    return torch.where(found.isnan(), weight.float(), found)


def reread(weight: Tensor, master: Tensor) -> Tensor:
    """`master` where `weight` is a rounding of it, to even or away; elsewhere the weight."""
    code = weight.contiguous().view(torch.int16)
    kept = master.to(weight.dtype).contiguous().view(torch.int16) == code
    if weight.dtype == torch.bfloat16:
        kept |= away(master)[0].view(torch.int16) == code
    return torch.where(kept, master, weight.float())


def equal(left: Tensor, right: Tensor) -> bool:
    same = left.dtype == right.dtype and left.shape == right.shape
    return same and torch.equal(bits(left), bits(right))


# ---------------------------------------- the bare rule


@dataclass
class Held:
    """What the oracle keeps beside one of its FP32 parameters."""

    dtype: torch.dtype
    split: bool
    weight: Tensor
    remainder: Tensor
    loaded: bool = False
    """Whether a master was loaded or set since the last step: it is held in FP32 until the next."""


class Oracle:
    """The bare rule on FP32 parameters, and the weights that a model should have."""

    def __init__(self, setup: Setup, groups: list[dict[str, Any]]) -> None:
        self.setup = setup
        self.held: list[Held] = []
        self.optimizer = setup.rule([self._copied(group) for group in groups])

    def _copied(self, group: dict[str, Any]) -> dict[str, Any]:
        masters = [self._begin(p) for _, p in named_params(group)]
        names = [name for name, _ in named_params(group)]
        params = list(zip(names, masters, strict=True)) if self.setup.named else masters
        return {**group, "params": params}

    def _begin(self, param: Tensor) -> nn.Parameter:
        weight = param.detach().clone()
        nothing = torch.zeros(weight.shape, dtype=torch.int32)
        self.held.append(Held(param.dtype, self.setup.is_split(param.dtype), weight, nothing))
        return nn.Parameter(weight.float().clone())

    @property
    def masters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def add_group(self, group: dict[str, Any]) -> None:
        self.optimizer.add_param_group(self._copied(group))

    def drop_group(self, index: int) -> None:
        before = sum(len(group["params"]) for group in self.optimizer.param_groups[:index])
        group = self.optimizer.param_groups.pop(index)
        for param in group["params"]:
            self.optimizer.state.pop(param, None)
            del self.held[before]

    @torch.no_grad()
    def begin_anew(self, place: int, param: Tensor) -> None:
        """Another parameter in this place, which has no state."""
        self.optimizer.state.pop(self.masters[place], None)
        self.masters[place].copy_(param)
        self.held[place].weight = param.detach().clone()
        self.held[place].remainder.zero_()
        self.held[place].loaded = False

    @torch.no_grad()
    def round(self, place: int) -> None:
        """The weight is the rounding of the master."""
        held, master = self.held[place], self.masters[place].detach()
        if held.split:
            held.weight, held.remainder = away(master.clone())
        else:
            held.weight = master.to(held.dtype, copy=True)

    @torch.no_grad()
    def write_weight(self, place: int, weight: Tensor) -> None:
        """Somebody wrote a weight outside of a step."""
        held, master = self.held[place], self.masters[place]
        held.weight = weight.clone()
        if held.split and not held.loaded:
            master.copy_(joined(weight, held.remainder))
        else:
            master.copy_(reread(weight, master) if held.dtype != torch.float32 else weight)

    @torch.no_grad()
    def write_master(self, place: int, value: Tensor, *, stepped: bool) -> None:
        """Somebody wrote a master."""
        self.masters[place].copy_(value)
        self.round(place)
        self.held[place].loaded |= not stepped

    def adopt(self) -> None:
        """Masters are said to be those of the weights that are there, as they follow them."""
        for place, held in enumerate(self.held):
            if held.split and not held.loaded:
                self.round(place)

    def has_stepped(self, place: int) -> bool:
        return bool(self.optimizer.state.get(self.masters[place]))

    def step(self, grads: list[Tensor | None]) -> None:
        for place, (master, grad) in enumerate(zip(self.masters, grads, strict=True)):
            master.grad = grad
            if grad is not None:
                self.held[place].loaded = False
        self.optimizer.step()
        for place, grad in enumerate(grads):
            if grad is not None:
                self.round(place)

    def mode(self, training: bool) -> None:
        getattr(self.optimizer, "train" if training else "eval")()
        for place in range(len(self.held)):
            if self.has_stepped(place):
                self.held[place].loaded = False
                self.round(place)

    def saved(self) -> Any:
        held = [(copy.deepcopy(h), m.detach().clone()) for h, m in self._pairs()]
        return copy.deepcopy(self.optimizer.state_dict()), held

    @torch.no_grad()
    def load(self, saved: Any) -> None:
        state, held = copy.deepcopy(saved)
        self.optimizer.load_state_dict(state)
        for place, (then, master) in enumerate(held):
            self.masters[place].copy_(master)
            self.held[place] = then
            then.loaded = True

    def _pairs(self) -> Iterator[tuple[Held, Tensor]]:
        return zip(self.held, self.masters, strict=True)


def named_params(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    params: list[Any] = group["params"]
    return [p if isinstance(p, tuple) else ("", p) for p in params]


def unscaled(
    grads: list[Tensor | None],
    factor: Tensor | None,
    max_grad_norm: float | None,
    norm: float,
) -> list[Tensor | None]:
    """FP32 gradients, times the factor and clipped, as the rule is to see them.

    `norm` is the wrapper's own, for its last bits; that it is the norm is checked here.
    """
    wide = torch.cat([g.double().flatten() for g in grads if g is not None])
    true = float(wide.norm()) * (1.0 if factor is None else abs(float(factor)))
    # Some 80 squares are summed in FP32 and rooted: a few times 2^-24 = 6e-8.
    assert math.isclose(norm, true, rel_tol=1e-6), f"norm is {norm}, not {true}"
    if max_grad_norm is not None:
        known = torch.tensor(norm, dtype=torch.float32 if factor is None else factor.dtype)
        clip = (max_grad_norm / (known + 1e-6)).clamp(max=1.0)
        factor = clip if factor is None else clip * factor
    if factor is None:
        return [None if g is None else g.float() for g in grads]
    return [None if g is None else _times(g, factor) for g in grads]


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    if grad.ndim == 0 and grad.dtype == torch.float32:
        return (grad * factor).float()  # torch rounds no scalar before it multiplies another one
    return grad.float() * factor.float()
