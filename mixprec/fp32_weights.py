"""A model's state dict in FP32, with masters in place of the 16-bit weights that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mixprec.masters import LOW


def fp32_state_dict(
    model: nn.Module, masters: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """`model.state_dict()` with masters for parameters that have one, and the rest in FP32.

    Raises:
        ValueError: if the model holds none of the parameters.
    """
    master_of = {id(param): master for param, master in masters}
    saved: dict[str, Any] = model.state_dict(keep_vars=True)
    if not any(id(value) in master_of for value in saved.values()):
        raise ValueError(
            f"{type(model).__name__} holds none of this optimizer's parameters; give the model "
            f"whose parameters the optimizer was made for."
        )
    return {name: _fp32(master_of.get(id(value), value)) for name, value in saved.items()}


def load_fp32_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    set_master: Callable[[Tensor, Tensor], bool],
) -> None:
    """Write `state_dict` into the model; `set_master(param, value)` takes what has a master.

    Raises:
        ValueError: for missing, unexpected or misshapen entries; nothing is changed then.
    """
    targets: dict[str, Any] = model.state_dict(keep_vars=True)
    _check_entries(targets, state_dict)
    for name, target in targets.items():
        if isinstance(target, Tensor):
            value = state_dict[name].to(target.device)
            if not set_master(target, value):
                target.detach().copy_(value)


def _fp32(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().float() if value.dtype in LOW else value.detach()


def _check_entries(targets: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    missing = [name for name in targets if name not in given]
    extra = [name for name in given if name not in targets]
    if missing or extra:
        raise ValueError(
            f"the state dict lacks {missing[:3]} and has {extra[:3]}, which the model has not; "
            f"nothing was loaded. Load the state dict of this model."
        )
    for name, target in targets.items():
        if isinstance(target, Tensor) and target.shape != given[name].shape:
            raise ValueError(
                f"{name!r} is {list(given[name].shape)} in the state dict and "
                f"{list(target.shape)} in the model; nothing was loaded. Load the state dict of "
                f"this model."
            )
