"""The table of a model: a row for each kind of parameter, with the learning rate it really gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from mixprec.text import aligned
from mixprec.umup.groups import param_groups, rules_for
from mixprec.umup.roles import Entry, Role, Spec
from mixprec.umup.roles import spec as spec_of
from mixprec.umup.rules import _MATRICES_ONLY, Rules

__all__ = ["table"]

_COLUMNS = (
    *("role", "example", "tensors", "shape", "depth", "init", "forward", "backward", "token"),
    *("rule", "lr", "plain lr", "weight decay", "eps"),
)


def table(
    model: nn.Module,
    optimizer: type[Optimizer] | Optimizer | str,
    *,
    lr: float = 1.0,
    weight_decay: float = 0.0,
    format: Literal["text", "markdown", "json"] = "text",
    spec: Spec | None = None,
    embedding_rule: Literal["umup", "mup"] = "umup",
    depth_rule: Literal["sqrt", "completep"] = "sqrt",
    adjust_lr_fn: str | None = None,
) -> str:
    """What the rules make of every parameter of `model`.

    Columns: `forward` and `backward` multiply the output and, on a cut edge, the input's gradient;
    `token` multiplies the sum of gradients; `rule` times the base rate is the learning rate; `lr`
    is the group's, as `param_groups` makes it; `plain lr` is what it amounts to in an `nn.Linear`,
    whose weight would be A times ours (not for SGD, whose gradients would differ too); `weight
    decay` and `eps` are the group's entries.

    Args:
        model, optimizer, lr, weight_decay, spec and rules: as in `param_groups`.
        format: "text" has aligned columns, "markdown" pipes, "json" a list of objects.

    >>> import torch
    >>> from mixprec import umup
    >>> model = torch.nn.Sequential(umup.layers.Linear(64, 64), umup.layers.LinearReadout(64, 8))
    >>> for line in umup.table(model, torch.optim.AdamW, lr=0.5).splitlines():
    ...     print(*line.split("  ")[0:1], line.split()[1])
    role example
    hidden 0.weight
    bias 0.bias
    output 1.weight
    bias 1.bias
    """
    if format not in ("text", "markdown", "json"):
        raise ValueError(f"format={format!r}; use 'text', 'markdown' or 'json'")
    spec = spec_of(model) if spec is None else spec
    rules = rules_for(spec, optimizer, embedding_rule, depth_rule, adjust_lr_fn)
    roles: set[Role] = {e.role for e in spec.values()}
    if rules.family in _MATRICES_ONLY:
        roles = {"hidden"}
    groups = param_groups(
        model,
        lr,
        optimizer,
        weight_decay,
        spec=spec,
        roles=roles,
        embedding_rule=embedding_rule,
        depth_rule=depth_rule,
        adjust_lr_fn=adjust_lr_fn,
    )
    group_of = {name: group for group in groups for name in group["param_names"]}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, entry in spec.items():
        if name not in group_of:
            continue
        key = (entry.role, entry.shape, entry.depth, entry.plain)
        if key in rows:
            rows[key]["tensors"] += 1
        else:
            rows[key] = _row(name, entry, rules, group_of[name])
    if format == "json":
        return json.dumps(list(rows.values()), indent=2)
    cells = [_COLUMNS, *([_text(row[column]) for column in _COLUMNS] for row in rows.values())]
    return _markdown(cells) if format == "markdown" else aligned(cells)


def _row(name: str, entry: Entry, rules: Rules, group: dict[str, Any]) -> dict[str, Any]:
    rule, linear = rules.of(entry), rules.family == "sgd"
    # SGD's step is linear in the gradient, so the constant of the token factor is in its rate.
    lookup = f" * {entry.shape[0]}^1/2" if linear and rule.lookup != 1 else ""
    plain = float(group["lr"]) * (1.0 if rule.forward is None else rule.forward)
    return {
        "role": entry.role,
        "example": name,
        "tensors": 1,
        "shape": list(entry.shape),
        "depth": entry.depth,
        "init": rule.init,
        "forward": rule.forward,
        "backward": rule.backward,
        "token": rule.token,
        "rule": rule.formula + lookup,
        "lr": float(group["lr"]),
        "plain lr": None if linear else plain,
        "weight decay": group.get("weight_decay"),
        "eps": group.get("eps"),
    }


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)


def _markdown(cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(cells[0]), *lines[1:]])
