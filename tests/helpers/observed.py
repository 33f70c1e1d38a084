"""Everything that a user can see of an optimizer and its model, as one flat mapping of values.

Tensors are compared by their bits, numbers by type and value, and what must stay the very same
object (groups, their lists, parameters, hooks) by identity.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from frozen import bits
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mixprec import MixedPrecision

Observed = dict[str, object]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)
_NOT_STATE = {"state", "param_groups", "defaults", "_opt_called", *_HOOKS}
"""Attributes looked at elsewhere; and the mark that a step was called, which warns schedulers."""


def observe(
    optimizer: MixedPrecision, params: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> Observed:
    """What can be seen now. `params` are the model's own, `grads` the gradients they were given."""
    seen: Observed = {}
    for place, (param, grad) in enumerate(zip(params, grads, strict=True)):
        seen.update(_flat(f"weights[{place}]", param))
        seen.update(_flat(f"vars(weights[{place}])", dict(vars(param))))
        seen.update(_flat(f"grads[{place}]", param.grad))
        seen[f"grads[{place}] is the one given"] = param.grad is grad
        seen[f"weights[{place}].requires_grad"] = param.requires_grad
    place_of = {id(param): f"weights[{place}]" for place, param in enumerate(params)}
    seen.update(_groups(optimizer, place_of))
    seen.update(_masters(optimizer, place_of))
    inner = optimizer.inner
    for name, state in (("state", optimizer.state), ("inner.state", inner.state)):
        keyed = {place_of.get(id(key), _name(key)): value for key, value in state.items()}
        seen.update(_flat(name, keyed))
    seen["inner.state is state"] = inner.state is optimizer.state
    seen["inner.param_groups is param_groups"] = inner.param_groups is optimizer.param_groups
    for name in _HOOKS:
        hooks = getattr(inner, name)
        seen[f"{name} is shared"] = hooks is getattr(optimizer, name)
        seen[f"id({name})"] = id(hooks), len(hooks)
    own = {key: value for key, value in vars(inner).items() if key not in _NOT_STATE}
    seen.update(_flat("vars(inner)", own))
    seen.update(_told(optimizer))
    scaler: Any = optimizer.loss_scaler
    if scaler is not None:
        seen.update(_flat("loss_scaler", {**scaler.state_dict(), "seen": scaler.losses_scaled}))
    seen.update(_process())
    return seen


def difference(right: Observed, found: Observed) -> str:
    """Where two observations first differ, and how; the empty string if nowhere."""
    for name in {**right, **found}:
        if name not in found:
            return f"{name} is gone"
        if name not in right:
            return f"{name} is new: {_shown(found[name])}"
        if right[name] != found[name]:
            return f"{name} is {_shown(found[name])}, not {_shown(right[name])}"
    return ""


def _groups(optimizer: MixedPrecision, place_of: dict[int, str]) -> Iterator[tuple[str, object]]:
    yield "id(state)", id(optimizer.state)
    yield "id(param_groups)", id(optimizer.param_groups)
    for which, groups in (
        ("param_groups", optimizer.param_groups),
        ("inner.param_groups", optimizer.inner.param_groups),
    ):
        yield f"len({which})", len(groups)
        for index, group in enumerate(groups):
            where = f"{which}[{index}]"
            yield f"id({where})", id(group)
            yield f"id({where}['params'])", id(group["params"])
            held = [place_of.get(id(param), f"another {param.dtype}") for param in group["params"]]
            yield f"{where}['params']", held
            yield from _flat(where, {k: v for k, v in group.items() if k != "params"})


def _masters(optimizer: MixedPrecision, place_of: dict[int, str]) -> Iterator[tuple[str, object]]:
    try:
        found = dict(optimizer.masters())
    except Exception as error:
        yield "masters()", f"raised {type(error).__name__}: {error}"
        return
    yield from _flat("masters", {place_of.get(id(p), "of another"): m for p, m in found.items()})


def _told(optimizer: MixedPrecision) -> Iterator[tuple[str, object]]:
    try:
        yield from _flat("metrics", optimizer.metrics())
        yield "grads_finite", optimizer.grads_finite
    except Exception as error:
        yield "metrics()", f"raised {type(error).__name__}: {error}"


def _process() -> Iterator[tuple[str, object]]:
    yield "torch's random state", bits(torch.get_rng_state()).numpy().tobytes()
    yield "random's state", random.getstate()
    yield from _flat("numpy's random state", dict(np.random.get_state(legacy=False)))
    yield "grad mode", torch.is_grad_enabled()
    yield "autocast", (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))
    yield "dispatch modes", len(_get_current_dispatch_mode_stack())
    yield "default dtype", torch.get_default_dtype()


def _flat(name: str, value: Any) -> Iterator[tuple[str, object]]:
    """The leaves of a nested value by their paths; an empty collection is a leaf too."""
    if isinstance(value, Tensor):
        yield name, (value.dtype, tuple(value.shape), bits(value).numpy().tobytes())
    elif isinstance(value, np.ndarray):
        yield name, (str(value.dtype), value.tobytes())
    elif isinstance(value, Mapping):
        yield f"len({name})", len(value)
        for key, item in value.items():
            yield from _flat(f"{name}[{key!r}]" if isinstance(key, int) else f"{name}.{key}", item)
    elif isinstance(value, (list, tuple, deque)):
        yield f"len({name})", len(value)
        for place, item in enumerate(value):
            yield from _flat(f"{name}[{place}]", item)
    elif isinstance(value, (bool, int, float, str, bytes, type(None))):
        yield name, (type(value).__name__, repr(value))  # a NaN equals itself
    else:
        yield name, type(value).__name__


def _name(key: object) -> str:
    return f"of another {key.dtype}" if isinstance(key, Tensor) else f"[{key!r}]"


def _shown(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], torch.dtype):
        held = torch.frombuffer(bytearray(value[2]), dtype=value[0]) if value[2] else []
        numbers = ", ".join(f"{float(number):.6g}" for number in held[:2])
        return f"{str(value[0]).removeprefix('torch.')}{list(value[1])} [{numbers}, ...]"
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return str(value[1])[:60]
    return repr(value)[:80]
