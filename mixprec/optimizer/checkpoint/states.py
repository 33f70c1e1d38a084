"""An optimizer's states as checkpoints hold them: FP32, with a master for each 16-bit parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from mixprec.optimizer.checkpoint import loading
from mixprec.optimizer.checkpoint import reading as checkpoint
from mixprec.optimizer.checkpoint.loaded_masters import LoadedMasters
from mixprec.optimizer.checks import ParamChecks
from mixprec.optimizer.fused.step import FusedStep
from mixprec.optimizer.master_run import make_state
from mixprec.optimizer.masters import LOW, MASTER
from mixprec.optimizer.recovery import Recovery
from mixprec.optimizer.reports.outcome import Outcome
from mixprec.optimizer.setup import Setup

__all__ = ["States"]


class States:
    """Makes, shows and replaces the states of `setup`."""

    def __init__(
        self,
        setup: Setup,
        check: ParamChecks,
        fused: FusedStep,
        loaded: LoadedMasters,
        outcome: Outcome,
        recovery: Recovery,
    ) -> None:
        self._setup, self._check, self._fused, self._loaded = setup, check, fused, loaded
        self._outcome, self._recovery = outcome, recovery

    def adopt(self) -> None:
        """Widen what the inner optimizer has kept so far for 16-bit parameters."""
        setup = self._setup
        for group in setup.groups:
            for param in group["params"]:
                entry = setup.state.get(param)
                if entry and setup.store.has(param) and MASTER not in entry:
                    setup.state[param] = checkpoint.widened(entry, param)
                    checkpoint.refill_adagrad(setup.inner, group, setup.state[param])

    def make(self, *, one_by_one: bool) -> None:
        """The state of all parameters that have none, as it is before a first step."""
        setup = self._setup
        new = [
            (index, param)
            for index, group in enumerate(setup.groups)
            for param in group["params"]
            if param.requires_grad and not set(setup.state.get(param, ())) - {MASTER}
        ]
        for chosen in [[item] for item in new] if one_by_one else [new]:
            make_state(setup.inner, setup.state, setup.store, chosen)

    @torch.no_grad()
    def decode(self, _optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A hook of `state_dict`: states as the rule keeps them, masters in FP32, the scaler."""
        setup, store = self._setup, self._setup.store
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        self._check.masters(setup.params())
        state = dict(state_dict["state"])
        wide = {id(param): master for param, master in self._loaded.wide}
        for key, param in zip(ids, setup.params(), strict=True):
            if key in state:
                state[key] = self._fused.held.decoded(state[key], param)
            if self._starts_from_weight(param, state.get(key)) or store.known(setup.state, param):
                state[key] = {**state.get(key, {}), MASTER: store.master(setup.state, param)}
            elif id(param) in wide:
                state[key] = {**state.get(key, {}), MASTER: wide[id(param)]}
        scaler: Any = setup.loss_scaler
        extra = {checkpoint.LOSS_SCALER: scaler.state_dict()} if scaler is not None else {}
        return {**state_dict, "state": state, **extra}

    def _starts_from_weight(self, param: Tensor, entry: Any) -> bool:
        """Whether a parameter has a state and, in 16 bits without a master, is its own master.

        One that was FP32 has had none.
        """
        was_fp32 = self._check.dtypes.get(param, param.dtype) not in LOW
        return bool(entry) and self._setup.store.has(param) and not was_fp32

    def commit(self, loaded: loading.Loaded, wrapper: Optimizer) -> None:
        """Put what was loaded in its place, whole or not at all."""
        setup = self._setup
        inner, store, scaler = setup.inner, setup.store, setup.loss_scaler
        parts = [wrapper, inner, store, self._fused, self._loaded, self._outcome, self._recovery]
        parts += [self._check, *([] if scaler is None else [scaler])]
        before = loading.Before(parts, [*setup.groups, inner.defaults])
        undo_own: Callable[[], None] | None = None
        scale = None if scaler is None else scaler.get_scale()
        try:
            undo_own = loading.undo_own(inner) if loaded.own else None
            loading.commit(loaded, inner, scaler)
            wrapper.state = inner.state
            # Masters that wait stay beside a bare optimizer's states, which have none.
            kept = {} if loaded.has_masters else dict(store.early.items())
            store.early = WeakIdKeyDictionary({**kept, **loaded.early})
            store.forget_versions()
            self._recovery.accept()
            self._fused.adopt(setup.params())
            self._loaded.take(loaded)
            self._check.dtypes = WeakIdKeyDictionary()
            self._check.note_masters()
            if scaler is not None and scaler.get_scale() != scale:
                # Gradients at hand carry the scale of before; the next step has to have new ones.
                self._outcome.forget_losses()
        except BaseException:
            before.restore()
            if undo_own is not None:
                undo_own()
            raise
