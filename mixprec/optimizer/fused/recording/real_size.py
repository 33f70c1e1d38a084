"""Recording a step for a parameter of its real size, without its memory.

Numbers that a rule takes from a parameter's shape look like any other number. To tell them, the
step is recorded once more on tensors that have the size of the real parameter and no data (torch's
meta device). Tensors of one element stay on the host: they hold the rule's own numbers, which have
to be read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mixprec.optimizer.fused.recording.recorder import MAKERS, Recorder


class SizeRecorder(Recorder):
    """Records a step on a meta device."""

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], *, seen: bool) -> Any:
        makes = str(func._schema.name).partition("::")[2] in MAKERS
        if seen and not makes:
            return func(*map(_on_meta, args), **{k: _on_meta(v) for k, v in kwargs.items()})
        if makes or "device" in kwargs:
            made = func(*args, **{**kwargs, "device": "meta"})
            if self.makes_elements(args, made):
                return made
            if makes or str(kwargs["device"]) == "meta":
                kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class NumbersOnHost(TorchFunctionMode):
    """Makes tensors from Python numbers on the host, whatever device is asked for.

    `torch.tensor(0.1, device="meta")` loses the number before a dispatch mode sees it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.scalar_tensor):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def _on_meta(value: Any) -> Any:
    """A number's tensor beside tensors without data, as some operations want it there."""
    if isinstance(value, (list, tuple)):
        return [_on_meta(item) for item in value]
    return value.to("meta") if isinstance(value, Tensor) and not value.is_meta else value
