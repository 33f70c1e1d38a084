"""Judging the gradients of a step, on the host or on the device, and their one factor."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import Tensor

from mixprec.devices import is_capturing
from mixprec.gradients import local
from mixprec.optimizer.fused.judge import DeviceJudge
from mixprec.optimizer.fused.members import Members
from mixprec.optimizer.judging.grad_factor import on
from mixprec.optimizer.judging.verdict import Verdict, judge, no_gradients, unjudged
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.setup import Setup
from mixprec.plain_optimizer import takes_found_inf

__all__ = ["Judge"]


class Judge:
    """What gradients are worth by the settings of `setup`; `outcome` hears what it was about."""

    def __init__(self, setup: Setup, outcome: Outcome) -> None:
        self._setup, self._outcome = setup, outcome
        self._device_judge = DeviceJudge()

    def __call__(
        self,
        grads: list[Tensor],
        grad_factor: Tensor | float | None,
        *,
        on_device: bool,
        kind: object = None,
    ) -> Verdict:
        """The verdict on all gradients of a step.

        Args:
            grads: each once.
            grad_factor: multiplies them besides the inverse loss scale.
            on_device: leave the flags on the device.
            kind: stands for how the gradients look, see `Members`.
        """
        if not grads:
            return no_gradients()
        setup, outcome = self._setup, self._outcome
        factor, counted = self._unscale_factor(grad_factor, local(grads[0]).device)
        external, max_norm = setup.driver.found_inf, setup.max_grad_norm
        if setup.on_nonfinite == "ignore" and max_norm is None and external is None:
            return self._entered(unjudged(factor, counted, on_device=on_device), grads)
        if on_device and self._device_judge.takes(grads, kind):
            verdict = self._device_judge(
                grads,
                factor,
                counted=counted if isinstance(counted, Tensor) else None,
                external_found_inf=external,
                max_grad_norm=max_norm,
                counts=outcome.counts,
            )
        else:
            verdict = judge(
                grads,
                factor,
                counted=counted,
                external_found_inf=external,
                max_grad_norm=max_norm,
                on_device=on_device,
            )
        if verdict.parts is None:
            outcome.culprits.forget()
        else:
            outcome.culprits.note(grads, kind, setup.params(), *verdict.parts)
        return self._entered(verdict, grads)

    def _entered(self, verdict: Verdict, grads: list[Tensor]) -> Verdict:
        """The verdict; in a capture its counting goes into the graph too."""
        if is_capturing(local(grads[0]).device):
            if verdict.found_inf is not None and not verdict.recorded:
                self._outcome.count(verdict)
            self._outcome.captured = verdict
        return verdict

    def _unscale_factor(
        self, grad_factor: Tensor | float | None, device: Any
    ) -> tuple[Tensor | None, Tensor | bool]:
        """`grad_factor / loss_scale`, and whether anything was counted."""
        factor: Tensor | None = None
        counted: Tensor | bool = True
        if grad_factor is not None:
            factor = on(device, grad_factor)
            counted = (factor if isinstance(grad_factor, Tensor) else grad_factor) != 0
        inverse = self._inverse_scale()
        self._outcome.factors = grad_factor, inverse
        if inverse is not None:
            factor = inverse if factor is None else factor * inverse.to(factor.device)
        return factor, counted

    def _inverse_scale(self) -> Tensor | None:
        driver, scaler = self._setup.driver, self._setup.loss_scaler
        if scaler is None:
            external = driver.grad_scale
            return None if external is None else external.double().reciprocal().reshape(())
        if driver.is_there:
            raise RuntimeError(
                "a torch.amp.GradScaler steps this MixedPrecision, which has a loss_scaler of its "
                "own: gradients would be unscaled twice. Drop one of the two."
            )
        if not self._outcome.has_new_losses:
            if self._setup.only_makes_state():
                return None
            raise RuntimeError(
                f"a loss scaler is set, but no loss was scaled since the last step, or since "
                f"another scale was loaded: gradients would be divided by {scaler.get_scale()}, "
                f"which they do not carry. Call optimizer.loss_scaler.multiply(loss).backward()."
            )
        return scaler.inverse

    def may_stay_on_device(self, members: Members, rest: list[list[Tensor]]) -> bool:
        """Whether whoever steps is given `found_inf`, so that the host reads nothing.

        A rule of torch not in a parameter's first step: its fused SGD leaves a new momentum buffer
        uninitialised when it skips. Kernels always; on a CPU reading costs nothing.
        """
        setup = self._setup
        if setup.on_nonfinite == "raise":
            return False
        stepped = [p for p in chain(*rest) if p.grad is not None]
        if members.grads and not members.grads[0].is_cuda:
            return False
        if not stepped:
            return bool(members.grads)
        ready = all(len(setup.state.get(p, ())) > setup.store.has(p) for p in stepped)
        return takes_found_inf(setup.inner) and ready

    def __reduce__(self) -> tuple[type[Judge], tuple[Setup, Outcome]]:
        return Judge, (self._setup, self._outcome)  # tables on a device are made anew
