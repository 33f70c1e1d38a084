"""What may have changed about parameters since the last step, refused before any update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixprec.optimizer.arguments import check_weights
from mixprec.optimizer.masters import LOW
from mixprec.optimizer.rule.admission import accepts_sparse
from mixprec.optimizer.setup import Setup

__all__ = ["ParamChecks"]


class ParamChecks:
    """The checks of a step; what they have seen is not copied with an optimizer."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.checked = False
        """Whether the weights were looked at, as they are once before the first step."""
        self._takes_sparse: bool | None = None
        self.dtypes: Any = WeakIdKeyDictionary()
        """What parameters were when their masters were first seen."""

    def first_look(self) -> None:
        """Refuse weights that no run should begin with."""
        if not self.checked:
            check_weights(self._setup.groups)
            self.checked = True

    def __call__(self, params: Iterable[Tensor]) -> None:
        """Refuse parameters of another shape or dtype, and gradients that the rule cannot take."""
        setup, params = self._setup, list(params)
        for p in params:
            if self.dtypes.setdefault(p, p.dtype) != p.dtype:
                self._refuse_cast(p)
        self.masters(params)
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided and setup.store.has(p):
                self._sparse(p)

    def _sparse(self, param: Tensor) -> None:
        inner = self._setup.inner
        if self._takes_sparse is None:
            self._takes_sparse = accepts_sparse(inner)
        if not self._takes_sparse:
            raise RuntimeError(
                f"the gradient of {self._setup.name(param)} is sparse and {type(inner).__name__} "
                f"does not take sparse gradients; nothing was updated. Use SparseAdam, SGD or "
                f"Adagrad, or an embedding with sparse=False."
            )

    def note_masters(self) -> None:
        """Remember what parameters are whose masters were set or loaded."""
        setup = self._setup
        for param in setup.params():
            if setup.store.known(setup.state, param):
                self.dtypes.setdefault(param, param.dtype)

    def _refuse_cast(self, param: Tensor) -> NoReturn:
        before = self.dtypes[param]
        raise RuntimeError(
            f"{self._setup.name(param)} was {before} when its optimizer state was made and is "
            f"{param.dtype} now, so its master is lost to it; nothing was done. Cast it back, "
            f"model.to({before}), which is exact where it has become FP32. For FP32 weights call "
            f"fp32_state_dict(model) before a cast; to train on in another dtype, cast the model "
            f"and build the optimizer anew."
        )

    def masters(self, params: Iterable[Tensor]) -> None:
        """Refuse a parameter that was cast, resized or replaced in place, without its master."""
        setup = self._setup
        for param in params:
            before = self.dtypes.get(param)
            if before in LOW and before != param.dtype and not setup.in_model:
                self._refuse_cast(param)
            if not setup.store.has(param):
                continue
            stored = setup.store.stored(setup.state, param)
            if stored is not None and stored.shape != param.shape:
                raise ValueError(
                    f"{setup.name(param)} is {list(param.shape)} and its master "
                    f"{list(stored.shape)}: it was resized after the master was made. Give its "
                    f"states the new shape, optimizer.state[param]['master'] like the others, or "
                    f"delete them all: del optimizer.state[param]."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "dtypes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, dtypes=WeakIdKeyDictionary())
