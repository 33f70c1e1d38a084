"""Reading an optimizer checkpoint: everything is checked before anything is changed.

`torch.optim.Optimizer.load_state_dict` casts every floating state to the dtype of its parameter,
which turns the FP32 master and moments of a BF16 parameter into BF16 without a word. It also pairs
state and parameters by position alone. Here states come back at the dtype they were stored with,
parameters are paired by name where both sides have names, and shapes are compared.

State that a bare optimizer saved for a 16-bit model has no master and 16-bit moments; the moments
are widened, and the master starts from the weight.

What the rule itself will want of a checkpoint is tried in `rehearsal`; what a load changes, and how
it is undone, stands in `loading`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.optimizer.masters import LOW, MASTER, nested

LOSS_SCALER = "loss_scaler"
"""The key of the loss scaler's state in an optimizer's state dict."""

NAMES = "param_names"

# States that torch's own rules shape like their parameter. Other rules project or factor some.
_PARAM_SHAPED = frozenset(
    "exp_avg exp_avg_sq max_exp_avg_sq exp_inf momentum_buffer square_avg grad_avg acc_delta sum "
    "prev "
    "step_size ax".split()
)


# What torch's schedulers leave in a group.
_SCHEDULERS = ("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", NAMES)


def check_dict(given: Any) -> None:
    """Refuse what is no dict at all, before hooks may turn it into another.

    Raises:
        TypeError: saying what it is.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"load_state_dict() was given {_kind(given)}, not the dict that an optimizer's "
            f"state_dict() returns; nothing was loaded."
        )


def check_kind(found: Mapping[Any, Any]) -> None:
    """Refuse what is no optimizer's state dict.

    Raises:
        ValueError: saying what is missing, and what it looks like instead.
    """
    missing = [key for key in ("state", "param_groups") if key not in found]
    if missing:
        has = f"has {', '.join(map(repr, list(found)[:4]))}" if found else "is empty"
        raise ValueError(
            f"the checkpoint {has} and lacks {' and '.join(map(repr, missing))}, so it is no "
            f"optimizer's state dict; nothing was loaded. {_instead(found)}"
        )
    if not isinstance(found["state"], Mapping) or not isinstance(found["param_groups"], list):
        raise ValueError(
            f"'state' of the checkpoint is {_kind(found['state'])} and 'param_groups' "
            f"{_kind(found['param_groups'])}, where an optimizer saves a dict and a list; nothing "
            f"was loaded. The checkpoint is damaged."
        )
    for index, group in enumerate(found["param_groups"]):
        _check_group(index, group)


def _check_group(index: int, group: Any) -> None:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
        raise ValueError(
            f"param_groups[{index}] of the checkpoint is {_kind(group)} without a list 'params'; "
            f"nothing was loaded. The checkpoint is damaged."
        )
    names, ids = group.get(NAMES), group["params"]
    if names is not None and len(names) != len(ids):
        raise ValueError(
            f"param_groups[{index}] of the checkpoint has {len(names)} {NAMES} for {len(ids)} "
            f"parameters, so they cannot be told apart; nothing was loaded. The checkpoint is "
            f"damaged."
        )


def _instead(found: Mapping[Any, Any]) -> str:
    """What a dict that is no optimizer's may be."""
    for key, value in found.items():
        if isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys():
            return f"Load its entry {key!r}."
    if found and all(isinstance(value, Tensor) for value in found.values()):
        return "It looks like a model's: load it with model.load_state_dict()."
    if "scale" in found:
        return "It looks like a loss scaler's: load it with loss_scaler.load_state_dict()."
    if "last_epoch" in found:
        return "It looks like a scheduler's: load it with scheduler.load_state_dict()."
    return "Give what optimizer.state_dict() returned."


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


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
        for key, param in zip(_in_order(index, saved, group), params, strict=True):
            if pairs.setdefault(key, param) is not param:
                raise ValueError(
                    f"the checkpoint holds parameter {key!r} twice, for {name_of(pairs[key])} and "
                    f"{name_of(param)} here; nothing was loaded. The checkpoint is damaged."
                )
    return pairs


def _in_order(index: int, saved: Mapping[str, Any], group: Mapping[str, Any]) -> Sequence[Any]:
    """The saved ids in the order of the group's parameters."""
    theirs, ours = saved.get(NAMES), group.get(NAMES)
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
    saved_groups: Sequence[Mapping[str, Any]],
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
    _check_keys(saved_state, pairs)
    for key in pairs:
        if key in saved_state and not isinstance(saved_state[key], Mapping):
            raise ValueError(
                f"the checkpoint's state of {name_of(pairs[key])!r} is {_kind(saved_state[key])}, "
                f"where an optimizer saves a dict; nothing was loaded. The checkpoint is damaged."
            )
    entries: dict[Any, Mapping[str, Any]]
    entries = {key: saved_state[key] for key in pairs if saved_state.get(key)}
    for key, entry in entries.items():
        _check_entry(entry, pairs[key], name_of(pairs[key]), torch_rule=torch_rule)
    low = {key for key in entries if pairs[key].dtype in LOW}
    with_master = {key for key in low if MASTER in entries[key]}
    for key in sorted(low - with_master, key=str) if with_master else ():
        raise ValueError(
            f"the checkpoint's state of {name_of(pairs[key])!r} has no {MASTER!r} (it has "
            f"{', '.join(map(str, entries[key]))}) while others have one; nothing was loaded. "
            f"The checkpoint is damaged."
        )
    for group in saved_groups if torch_rule else ():
        of_group = {key: entries[key] for key in group["params"] if key in entries}
        _check_siblings(of_group, pairs, name_of)


def _check_keys(saved_state: Mapping[Any, Any], pairs: Mapping[Any, Tensor]) -> None:
    """What belongs to no parameter is the rule's own under a name of its choice, or damage."""
    for key, entry in saved_state.items():
        if key in pairs:
            continue
        if isinstance(key, str) and key.isdigit() and int(key) in pairs:
            raise ValueError(
                f"the checkpoint's state has the text {key!r} for a key where its parameter groups "
                f"have the number {key}, as JSON leaves it; nothing was loaded. Turn the keys of "
                f"'state' into int again."
            )
        if isinstance(key, int) or (isinstance(entry, Mapping) and MASTER in entry):
            raise ValueError(
                f"the checkpoint holds state {key!r}, which belongs to none of its parameter "
                f"groups; nothing was loaded. The checkpoint is damaged."
            )


def _check_entry(entry: Mapping[str, Any], param: Tensor, name: str, *, torch_rule: bool) -> None:
    if param.is_meta:
        raise ValueError(
            f"{name} is on the meta device, so its state would be dropped; nothing was loaded. "
            f"Give the model memory (model.to_empty(device=...)) and weights, and build the "
            f"optimizer over them, before loading."
        )
    master = entry.get(MASTER)
    kind = str(master.dtype) if isinstance(master, Tensor) else _kind(master)
    remainder = kind == "torch.int16" and param.dtype == torch.bfloat16  # the inner rule's own dict
    if MASTER in entry and kind != "torch.float32" and not remainder:
        raise ValueError(
            f"{MASTER!r} of {name!r} is {kind} in the checkpoint, and a master is torch.float32; "
            f"nothing was loaded. Was the checkpoint cast? Load the original, or delete the "
            f"masters: they start from the weights then."
        )
    for state_name, value in entry.items():
        if any(tensor.is_meta for tensor in tensors_in(value)):
            raise ValueError(
                f"{state_name!r} of {name!r} is on the meta device in the checkpoint and holds no "
                f"numbers; nothing was loaded. Load the file with map_location='cpu'."
            )
        shaped = state_name == MASTER or (torch_rule and state_name in _PARAM_SHAPED)
        if shaped and isinstance(value, Tensor) and value.shape != param.shape:
            raise ValueError(
                f"{state_name!r} of {name!r} is {list(value.shape)} in the checkpoint, the "
                f"parameter is {list(param.shape)}; nothing was loaded. Load the checkpoint of "
                f"this model."
            )


def _check_siblings(
    entries: Mapping[Any, Mapping[str, Any]],
    pairs: Mapping[Any, Tensor],
    name_of: Callable[[Tensor], str],
) -> None:
    """Torch's rules give parameters of a group and a rank the same states: one with fewer was cut.

    Only a master is no state of theirs.
    """
    of_rank: dict[int, set[str]] = {}
    for key, entry in entries.items():
        of_rank.setdefault(pairs[key].ndim, {MASTER}).update(entry)
    for key, entry in entries.items():
        lacks = sorted(of_rank[pairs[key].ndim] - {*entry, MASTER})
        if lacks and entry.keys() - {MASTER}:
            raise ValueError(
                f"the checkpoint's state of {name_of(pairs[key])!r} lacks {lacks[0]!r}, which "
                f"other parameters have; nothing was loaded. The checkpoint is damaged."
            )


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
        if key == MASTER:  # FP32, also where it is to go to an FP64 parameter
            return value.detach().to(device=param.device, copy=True)
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


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in cast(Sequence[Any], value):
            yield from tensors_in(item)
