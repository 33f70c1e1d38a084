"""A model's state dict in FP32, with masters in place of the 16-bit weights that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mixprec.optimizer.masters import LOW
from mixprec.optimizer.reports.infinite_weights import check_range


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
        ValueError: for missing, unexpected or misshapen entries and for numbers beyond the range of
            their 16-bit tensors; nothing is changed then.
    """
    targets: dict[str, Any] = model.state_dict(keep_vars=True)
    given = _with_tied_names(targets, state_dict)
    _check_entries(targets, given)
    check_range(targets.items(), given.__getitem__)
    for name, target in targets.items():
        if isinstance(target, Tensor):
            value = given[name].to(target.device)
            if not set_master(target, value):
                target.detach().copy_(value)


def _with_tied_names(targets: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`given`, and the names that are missing because another name of one tensor is there.

    Formats that hold each tensor once (safetensors) leave out all names but one.
    """
    names: dict[int, list[str]] = {}
    for name, target in targets.items():
        names.setdefault(id(target), []).append(name)
    complete = dict(given)
    for tied in names.values():
        there = [name for name in tied if name in given]
        for name in tied if there else ():
            complete.setdefault(name, given[there[0]])
            if not _is_same(complete[name], given[there[0]]):
                raise ValueError(
                    f"{there[0]!r} and {name!r} are one tensor in the model and two different ones "
                    f"in the state dict; nothing was loaded. Leave one of them out."
                )
    return complete


def _is_same(left: Any, right: Any) -> bool:
    if left is right or not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return True
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    equal = (left == right) | ((left != left) & (right != right))
    return bool(equal.all())


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
        if not isinstance(target, Tensor):
            continue
        value = given[name]
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "a tensor without data (meta)" if isinstance(value, Tensor) else repr(value)[:40]
            raise ValueError(
                f"{name!r} is {kind} in the state dict; nothing was loaded. Load the state dict of "
                f"this model, with map_location='cpu'."
            )
        if target.shape != value.shape:
            raise ValueError(
                f"{name!r} is {list(value.shape)} in the state dict and {list(target.shape)} in "
                f"the model; nothing was loaded. Load the state dict of this model."
            )
