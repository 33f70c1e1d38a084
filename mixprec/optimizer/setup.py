"""What a MixedPrecision was given: a rule with its parameters, and the settings of a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from mixprec.gradients import once
from mixprec.optimizer.masters import MasterStore
from mixprec.parameters import names_of

__all__ = ["Driver", "LossScaler", "OnNonfinite", "Setup"]

OnNonfinite = Literal["skip", "raise", "ignore"]


class LossScaler(Protocol):
    """What a step needs of `DynamicLossScaler` and `StaticLossScaler`."""

    losses_scaled: int

    @property
    def inverse(self) -> Tensor: ...
    @property
    def max_skips_in_a_row(self) -> int: ...
    def get_scale(self) -> float: ...
    def update(self, grads_finite: Tensor | bool, *, counted: Tensor | bool = True) -> None: ...
    def check_progress(self, named_grads: Iterable[tuple[str, Tensor | None]] = ()) -> None: ...


class Driver(NamedTuple):
    """What a `torch.amp.GradScaler` that steps a wrapper has left on it."""

    is_there: bool = False
    """It skips as a matter of course."""
    has_scale: bool = False
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @staticmethod
    def of(optimizer: Optimizer) -> Driver:
        left = vars(optimizer)
        found, scale = left.get("found_inf"), left.get("grad_scale")
        return Driver("found_inf" in left, "grad_scale" in left, found, scale)


@dataclass(eq=False)
class Setup:
    """One object for all parts of a MixedPrecision, which change what their users change."""

    inner: Optimizer
    store: MasterStore
    loss_scaler: LossScaler | None
    max_grad_norm: float | None
    on_nonfinite: OnNonfinite
    in_model: bool = False
    """Whether the model holds masters for now, see `MixedPrecision.masters_in_model`."""
    driver: Driver = field(default_factory=Driver)
    """Of the call at hand."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:
        return self.inner.state

    def params(self) -> Iterator[Tensor]:
        return (param for group in self.groups for param in group["params"])

    def grads(self) -> list[Tensor]:
        return once(p.grad for p in self.params() if p.grad is not None)

    def named_grads(self) -> list[tuple[str, Tensor]]:
        named = names_of(self.groups)
        return [(name, param.grad) for param, name in named if param.grad is not None]

    def name(self, param: Tensor) -> str:
        return next(name for other, name in names_of(self.groups) if other is param)

    def has_low(self) -> bool:
        """Whether any parameter needs a master."""
        return any(map(self.store.has, self.params()))

    def only_makes_state(self) -> bool:
        """Whether lr is 0 everywhere, as where distributed checkpoints step to have a state."""
        return all(_is_zero(group.get("lr")) for group in self.groups)

    def refuse_in_model(self, call: str, why: str) -> None:
        if self.in_model:
            raise RuntimeError(
                f"{call} inside masters_in_model(): the model holds FP32 masters there, which "
                f"{why}. Leave the context first."
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "driver": Driver()}


def _is_zero(rate: Any) -> bool:
    """Whether a learning rate is 0. One on a device would have to be waited for, and is not."""
    if isinstance(rate, Tensor):
        return not rate.is_cuda and float(rate) == 0.0
    return isinstance(rate, (int, float)) and rate == 0
