"""Parameter groups that carry the table to any optimizer.

One group for each combination of learning rate, weight decay and eps: a handful, where a group for
each parameter would make an optimizer of 300 tensors six times slower.

Weight decay is independent: a step shrinks a weight by the factor `1 - weight_decay * lr_t / lr`,
whatever its learning rate multiplier, and follows the schedule. Decoupled rules multiply it by the
group's learning rate, so the group's entry is divided by that first.

The token factor has two parts. N^-1/2, for all parameters, is applied where gradients are unscaled,
by `GradientAccumulator`, to which the groups say so (`token_power`). V^1/2, for lookups, is a
constant: multiplying a gradient by it is the same as multiplying SGD's learning rate, and in rules
that do not care about the size of gradients the same as dividing eps. So it is put there, which
costs nothing and holds under any optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.umup.roles import ROLES, Role, Spec
from mixprec.umup.roles import spec as spec_of
from mixprec.umup.rules import Rule, Rules, family_of

__all__ = ["param_groups", "rules_for"]

_COUPLED = ("Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "SparseAdam", "LAMB", "Lamb")
"""Rules that add weight decay to the gradient, or to an update that they then normalise."""


def param_groups(
    model: nn.Module,
    lr: float,
    optimizer: type[Optimizer] | Optimizer | str,
    weight_decay: float = 0.0,
    *,
    spec: Spec | None = None,
    roles: Collection[Role] = ROLES,
    eps: float | None = None,
    embedding_rule: Literal["umup", "mup"] = "umup",
    depth_rule: Literal["sqrt", "completep"] = "sqrt",
    adjust_lr_fn: str | None = None,
) -> list[dict[str, Any]]:
    """Groups for `optimizer`, each with the learning rate that its parameters' roles call for.

        optimizer = torch.optim.AdamW(umup.param_groups(model, 2**-1, torch.optim.AdamW, 2**-13))

    Schedulers multiply what they find in the groups, so they work as ever.

    Args:
        model: anything that `spec` takes.
        lr: base learning rate, the same for all widths; 0 is allowed.
        optimizer: its class, an instance, or the name of a family, see `rules.FAMILIES`.
        weight_decay: share of a weight that a step at the full learning rate takes away; the
            optimizer's own default does not count. Norms and biases have none. SGD's goes through
            its momentum, which makes it 1 / (1 - momentum) times as large.
        spec: of the model; taken from it if left out.
        roles: those to make groups of. Muon and Shampoo take `{"hidden"}` and leave the rest,
            `umup.ROLES - {"hidden"}`, to AdamW.
        eps: the optimizer's own by default.
        embedding_rule, depth_rule: see `rules.Rules`.
        adjust_lr_fn: what Muon multiplies its update by; "original" by default. Torch's gets it
            with the groups, whatever its constructor is given. "spectral_norm" and "none" are for
            others.

    Returns:
        Groups with "params", "param_names", "lr", and where the optimizer has them "weight_decay",
        "eps" and "adjust_lr_fn"; and "param_roles", as many as parameters, "roles", each once,
        "lr_multiplier" and "token_power", which optimizers keep and save. Frozen parameters are in
        none.

    Raises:
        ValueError: as `spec` and `Rules` do; for weight decay in a rule that mixes it into its
            gradients; for an `adjust_lr_fn` that the optimizer does not take; if no parameter has
            one of `roles`.

    >>> import torch
    >>> from mixprec import umup
    >>> model = torch.nn.Sequential(umup.layers.Linear(16, 64), umup.layers.LinearReadout(64, 8))
    >>> groups = umup.param_groups(model, lr=0.5, optimizer=torch.optim.AdamW, weight_decay=0.001)
    >>> [(group["param_names"], group["lr"], group["weight_decay"]) for group in groups]
    [(['0.weight'], 0.125, 0.008), (['0.bias', '1.bias'], 0.5, 0.0), (['1.weight'], 0.5, 0.002)]
    """
    unknown = sorted(set(roles) - ROLES)
    if unknown:
        raise ValueError(f"roles={unknown}; roles are {', '.join(sorted(ROLES))}")
    spec = spec_of(model) if spec is None else spec
    rules = rules_for(spec, optimizer, embedding_rule, depth_rule, adjust_lr_fn)
    _check_decay(optimizer, weight_decay)
    eps = _default_eps(optimizer) if eps is None else eps
    takes_decay = _takes(optimizer, "weight_decay")
    takes_adjust = rules.family == "muon" and _takes(optimizer, "adjust_lr_fn")
    if takes_adjust:
        _check_adjust(optimizer, rules.adjust_lr_fn)
    buckets: dict[tuple[float, bool, float], dict[str, Any]] = {}
    for name, param, entry in spec.parameters(model):
        if entry.role not in roles:
            continue
        row = rules.of(entry)
        multiplier, eps_factor = _folded(row, rules.family)
        key = (multiplier, row.decays, eps_factor)
        if key not in buckets:
            group: dict[str, Any] = {"params": [], "param_names": [], "lr": lr * multiplier}
            if takes_decay:
                group["weight_decay"] = _group_decay(lr * multiplier, weight_decay, row)
            if eps is not None:
                group["eps"] = eps * eps_factor
            if takes_adjust:
                group["adjust_lr_fn"] = rules.adjust_lr_fn
            group.update(param_roles=[], roles=[], lr_multiplier=multiplier, token_power=-0.5)
            buckets[key] = group
        group = buckets[key]
        group["params"].append(param)
        group["param_names"].append(name)
        group["param_roles"].append(entry.role)
        group["roles"] = sorted({*group["roles"], entry.role})
    if not buckets:
        raise ValueError(
            f"no trained parameter has a role in {sorted(roles)}; the model has "
            f"{sorted({entry.role for entry in spec.values()})}"
        )
    return list(buckets.values())


def rules_for(
    spec: Spec,
    optimizer: type[Optimizer] | Optimizer | str,
    embedding_rule: Literal["umup", "mup"] = "umup",
    depth_rule: Literal["sqrt", "completep"] = "sqrt",
    adjust_lr_fn: str | None = None,
) -> Rules:
    """The table for a model and an optimizer."""
    plain = [e for e in spec.values() if e.plain and e.role in ("output", "tied")]
    fans = [e.fan_in if e.role == "output" else e.fan_out for e in plain]
    return Rules(
        family_of(optimizer),
        embedding_rule,
        depth_rule,
        adjust_lr_fn or "original",
        readout_fan_in=max(fans, default=1),
    )


def _folded(row: Rule, family: str) -> tuple[float, float]:
    """Learning rate and eps multipliers with the constant part of the token factor in them."""
    if family == "sgd":
        return row.lr * row.lookup, 1.0
    return row.lr, 1 / row.lookup


def _group_decay(lr: float | Tensor, weight_decay: float, row: Rule) -> float:
    """What times the group's learning rate is `weight_decay`; without a learning rate nothing."""
    return weight_decay / float(lr) if row.decays and float(lr) else 0.0


def _takes(optimizer: type[Optimizer] | Optimizer | str, name: str) -> bool:
    """Whether the optimizer has that option; one of a family that is only named is taken to."""
    if isinstance(optimizer, str):
        return name in ("weight_decay", "adjust_lr_fn")
    if isinstance(optimizer, Optimizer):
        return name in optimizer.defaults
    return name in inspect.signature(optimizer).parameters


def _default_eps(optimizer: type[Optimizer] | Optimizer | str) -> float | None:
    """The optimizer's own eps; None where it has none, or one that is no number."""
    if isinstance(optimizer, str) or not _takes(optimizer, "eps"):
        return None
    if isinstance(optimizer, Optimizer):
        eps = optimizer.defaults["eps"]
    else:
        eps = inspect.signature(optimizer).parameters["eps"].default
    return eps if isinstance(eps, float) else None


def _check_adjust(optimizer: type[Optimizer] | Optimizer | str, adjust_lr_fn: str) -> None:
    """Refuse a factor that the rule would leave out without a word: it reads groups unchecked."""
    if isinstance(optimizer, str):
        return
    kind: Any = optimizer if isinstance(optimizer, type) else type(optimizer)
    try:
        kind([nn.Parameter(torch.zeros(1, 1))], adjust_lr_fn=adjust_lr_fn)
    except ValueError as error:
        raise ValueError(
            f"adjust_lr_fn={adjust_lr_fn!r}, and {kind.__name__} says: {error}. The learning rates "
            f"would assume a factor that is not there. Give one that it takes, or 'original'."
        ) from None


def _check_decay(optimizer: type[Optimizer] | Optimizer | str, weight_decay: float) -> None:
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay}; it is a share and must not be negative")
    if isinstance(optimizer, str):
        return
    inner: Any = getattr(optimizer, "inner", optimizer)
    kind = inner if isinstance(inner, type) else type(inner)
    decoupled = isinstance(inner, Optimizer) and inner.defaults.get("decoupled_weight_decay")
    if weight_decay and kind.__name__ in _COUPLED and not decoupled:
        raise ValueError(
            f"{kind.__name__} adds weight decay to its gradient and normalises the sum, so the "
            f"share that a step takes away depends on the gradient, and learning rates stop "
            f"transferring. Use torch.optim.AdamW or another decoupled rule, or weight_decay=0."
        )
