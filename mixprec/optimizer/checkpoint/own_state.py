"""Rules with a `state_dict` of their own: what they save beside state and groups.

Counters and schedules, mostly, or whole optimizers that they hold. It travels with the checkpoint
as it is, and their own `load_state_dict` takes it back, given an empty state and the groups of now.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from torch.optim import Optimizer

from mixprec.optimizer.checkpoint.reading import LOSS_SCALER
from mixprec.optimizer.checkpoint.rehearsal import copy_of
from mixprec.optimizer.rule.admission import quote, undisturbed
from mixprec.optimizer.rule.stand_ins import without_hooks

_OURS = ("state", "param_groups", LOSS_SCALER)


def own_entries(inner: Optimizer) -> dict[str, Any]:
    """What a rule with its own `state_dict` saves beside state and groups.

    Raises:
        RuntimeError: if it uses a name of ours.
    """
    if type(inner).state_dict is Optimizer.state_dict:
        return {}
    with without_hooks(inner):
        saved = inner.state_dict()
    if LOSS_SCALER in saved:
        raise RuntimeError(
            f"{type(inner).__name__}.state_dict() has an entry {LOSS_SCALER!r}, which is where "
            f"MixedPrecision saves its own loss scaler; one would overwrite the other. Rename it "
            f"in the rule's state_dict() and load_state_dict()."
        )
    return {key: value for key, value in saved.items() if key not in _OURS}


def own_part(inner: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of what in a checkpoint is for the rule's own `load_state_dict`; tried on a copy.

    Raises:
        ValueError: if the rule refuses it.
    """
    own = {key: value for key, value in saved.items() if key not in _OURS}
    if not own or type(inner).load_state_dict is Optimizer.load_state_dict:
        return {}
    own = copy.deepcopy(own)  # torch loads the very tensors that it is given
    with undisturbed(inner):
        try:
            _load(copy_of(inner, inner.param_groups, {}), copy.deepcopy(own_entries(inner)))
        except Exception:
            return own  # a copy cannot even load what the rule holds now, so it tells nothing
        try:
            _load(copy_of(inner, inner.param_groups, {}), copy.deepcopy(own))
        except Exception as error:
            raise ValueError(
                f"{type(inner).__name__}.load_state_dict() refuses {', '.join(map(repr, own))} of "
                f"the checkpoint ({quote(error)}); nothing was loaded. The checkpoint is damaged, "
                f"or of another rule."
            ) from error
    return own


def load_own(inner: Optimizer, own: Mapping[str, Any]) -> None:
    """Give a rule back what it saved; its groups and state are left as they are."""
    if not own:
        return
    state, groups = inner.state, inner.param_groups
    try:
        with without_hooks(inner):
            _load(inner, own)
    finally:
        inner.state, inner.param_groups = state, groups


def _load(inner: Optimizer, own: Mapping[str, Any]) -> None:
    inner.load_state_dict({**own, "state": {}, "param_groups": _packed(inner.param_groups)})


def _packed(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with numbers for parameters, as they are saved."""
    number = count()
    return [{**group, "params": [next(number) for _ in group["params"]]} for group in groups]
