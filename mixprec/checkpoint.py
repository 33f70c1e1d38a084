"""Reading an optimizer checkpoint: everything is checked before anything is changed.

`torch.optim.Optimizer.load_state_dict` casts every floating state to the dtype of its parameter,
which turns the FP32 master and moments of a BF16 parameter into BF16 without a word. It also pairs
state and parameters by position alone. Here states come back at the dtype they were stored with,
parameters are paired by name where both sides have names, and shapes are compared.

State that a bare optimizer saved for a 16-bit model has no master and 16-bit moments; the moments
are widened, and the master starts from the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.inner import without_hooks
from mixprec.masters import LOW, MASTER, nested

# States that torch's own rules shape like their parameter. Other rules project or factor some.
_PARAM_SHAPED = frozenset(
    "exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta sum "
    "prev "
    "step_size ax".split()
)


# What torch's schedulers leave in a group.
_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "param_names")


def pair(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    name_of: Callable[[Tensor], str],
) -> dict[Any, Tensor]:
    """Which parameter each saved id belongs to: by name where both sides have names, else in order.

    Raises:
        ValueError: if groups or parameters are missing or too many, or names do not match.
    """
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} parameter groups, this optimizer "
            f"{len(groups)}; nothing was loaded. Build the optimizer with the groups it was saved "
            f"with."
        )
    pairs: dict[Any, Tensor] = {}
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        params, ids = group["params"], saved["params"]
        if len(ids) != len(params):
            raise ValueError(
                f"param_groups[{index}] holds {len(ids)} parameters in the checkpoint and "
                f"{len(params)} here ({', '.join(map(name_of, params[:3]))}, ...); nothing was "
                f"loaded. Was the model changed, or a parameter frozen or tied, since it was saved?"
            )
        pairs.update(zip(_in_order(index, saved, group), params, strict=True))
    return pairs


def _in_order(index: int, saved: Mapping[str, Any], group: Mapping[str, Any]) -> Sequence[Any]:
    """The saved ids in the order of the group's parameters."""
    theirs, ours = saved.get("param_names"), group.get("param_names")
    if theirs is None or ours is None:
        return saved["params"]
    id_of = dict(zip(theirs, saved["params"], strict=True))
    missing = [name for name in ours if name not in id_of]
    extra = [name for name in theirs if name not in set(ours)]
    if missing or extra:
        raise ValueError(
            f"param_groups[{index}] of the checkpoint lacks {missing[:3]} and has {extra[:3]}, "
            f"which are not in this optimizer's group; nothing was loaded. Rename or drop them "
            f"first."
        )
    return [id_of[name] for name in ours]


def check_rule(
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
    inner: Optimizer,
) -> None:
    """Refuse the checkpoint of another rule, whose groups lack options of ours and have others.

    One without the other is no sign: options are added by new releases, and schedulers and users
    keep values of their own in groups.
    """
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        missing = [key for key in inner.defaults if key not in saved]
        extra = [
            key for key in saved if key not in group and key not in _SCHEDULERS and key != "step"
        ]
        if missing and extra:
            raise ValueError(
                f"param_groups[{index}] of the checkpoint has {', '.join(extra[:3])} and lacks "
                f"{', '.join(missing[:3])}, which {type(inner).__name__} needs: another rule saved "
                f"it. Nothing was loaded."
            )


def check(
    saved_state: Mapping[Any, Any],
    pairs: Mapping[Any, Tensor],
    name_of: Callable[[Tensor], str],
    *,
    torch_rule: bool,
) -> None:
    """Compare saved state with the parameters it is for.

    Raises:
        ValueError: naming the first entry that is missing, belongs to nothing, or has another
        shape.
    """
    for key in saved_state:
        if isinstance(key, int) and key not in pairs:
            raise ValueError(
                f"the checkpoint holds state {key!r}, which belongs to none of its parameter "
                f"groups; nothing was loaded. The checkpoint is damaged."
            )
    entries = {key: saved_state[key] for key in pairs if saved_state.get(key)}
    low = {key for key in entries if pairs[key].dtype in LOW}
    with_master = {key for key in low if MASTER in entries[key]}
    for key in sorted(low - with_master, key=str) if with_master else ():
        raise ValueError(
            f"the checkpoint's state of {name_of(pairs[key])!r} has no {MASTER!r} (it has "
            f"{', '.join(map(str, entries[key]))}) while others have one; nothing was loaded. "
            f"The checkpoint is damaged."
        )
    for key, entry in entries.items():
        for state_name, value in entry.items():
            shaped = state_name == MASTER or (torch_rule and state_name in _PARAM_SHAPED)
            if shaped and isinstance(value, Tensor) and value.shape != pairs[key].shape:
                raise ValueError(
                    f"{state_name!r} of {name_of(pairs[key])!r} is {list(value.shape)} in the "
                    f"checkpoint, the parameter is {list(pairs[key].shape)}; nothing was loaded. "
                    f"Load the checkpoint of this model."
                )
    _check_siblings(entries, pairs, name_of, torch_rule=torch_rule)


def _check_siblings(
    entries: Mapping[Any, Mapping[str, Any]],
    pairs: Mapping[Any, Tensor],
    name_of: Callable[[Tensor], str],
    *,
    torch_rule: bool,
) -> None:
    """Torch's element-wise rules give all parameters the same states: one with fewer was cut."""
    if not torch_rule:
        return
    common = {k for entry in entries.values() for k in entry} & _PARAM_SHAPED
    for key, entry in entries.items():
        lacks = sorted(common - set(entry)) if common & set(entry) else []
        if lacks:
            raise ValueError(
                f"the checkpoint's state of {name_of(pairs[key])!r} lacks {lacks[0]!r}, which "
                f"other parameters have; nothing was loaded. The checkpoint is damaged."
            )


def own_entries(inner: Optimizer) -> dict[str, Any]:
    """What a rule with its own `state_dict` saves beside state and groups: counters, mostly."""
    if type(inner).state_dict is Optimizer.state_dict:
        return {}
    with without_hooks(inner):
        saved = inner.state_dict()
    return {key: value for key, value in saved.items() if key not in ("state", "param_groups")}


def load_own_entries(inner: Optimizer, saved: Mapping[str, Any]) -> None:
    """Give such a rule back what it saved; its groups and state are left as they are."""
    own = {key: value for key, value in saved.items() if key not in ("state", "param_groups")}
    if not own or type(inner).load_state_dict is Optimizer.load_state_dict:
        return
    state, groups = inner.state, inner.param_groups
    try:
        with without_hooks(inner):
            inner.load_state_dict({**own, "state": {}, "param_groups": _packed(groups)})
    finally:
        inner.state, inner.param_groups = state, groups


def _packed(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with numbers for parameters, as they are saved."""
    number = count()
    return [{**group, "params": [next(number) for _ in group["params"]]} for group in groups]


def restored(
    entry: Mapping[str, Any], param: Tensor, group: Mapping[str, Any], *, torch_rule: bool
) -> dict[str, Any]:
    """Copies of one parameter's saved states on the parameter's device, at their stored dtype.

    Torch's rules keep their states in the dtype they compute in, so theirs are cast to that (FP32
    for a 16-bit parameter), as are 16-bit states that a bare optimizer saved beside no master.
    `step` stays where its rule wants it: beside the parameter if fused or capturable.
    """
    on_device = bool(group.get("fused") or group.get("capturable"))
    working = torch.float32 if param.dtype in LOW else param.dtype
    bare = param.dtype in LOW and MASTER not in entry

    def here(value: Tensor) -> Tensor:
        cast = value.is_floating_point() and (torch_rule or (bare and value.dtype == param.dtype))
        dtype = working if cast else value.dtype
        return value.detach().to(device=param.device, dtype=dtype, copy=True)

    def one(key: str, value: Any) -> Any:
        if key == "step" and isinstance(value, Tensor):
            if on_device:
                return value.detach().to(param.device, torch.float32, copy=True)
            return value.detach().clone()
        return nested(value, here)

    return {key: one(key, value) for key, value in entry.items()}


def widened(entry: Mapping[str, Any], param: Tensor) -> dict[str, Any]:
    """One parameter's live states with those in its own 16 bits widened to FP32."""
    return {
        key: nested(value, lambda t: t.float() if t.dtype == param.dtype else t)
        for key, value in entry.items()
    }


def refill_adagrad(inner: Optimizer, group: Mapping[str, Any], entry: dict[str, Any]) -> None:
    """Adagrad fills its sums at construction, in the parameter's 16 bits; fill them in FP32."""
    if isinstance(inner, torch.optim.Adagrad) and float(entry["step"]) == 0.0:
        entry["sum"].fill_(group["initial_accumulator_value"])
