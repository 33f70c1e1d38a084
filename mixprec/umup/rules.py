"""The one table: initial value, multipliers, token factor, learning rate and decay of a parameter.

In unit-scaled coordinates every weight is N(0, 1) and every gradient, divided by the root of what
it sums over, has RMS 1. A step of size eta changes the output of its own layer by eta * A * |dW x|,
so the width cancels with these learning rates (A = fan_in^-1/2, readout 1 / fan_in; D = depth^-1/2
in a residual branch, or 1 under CompleteP):

    |                | Adam-like, SGD      | Muon: update is orthogonal         |
    | embedding      | width^-1/2, or 1    |                                    |
    | input          | fan_in^-1/2         |                                    |
    | hidden         | fan_in^-1/2 * D     | fan_out^1/2 * D / (its own factor) |
    | output, tied   | 1                   |                                    |
    | norm, bias     | D                   |                                    |

SGD's embedding has 1: its rows meet only themselves. Adam-like rules need not be told apart: all of
them move each element by about eta. That SGD has the same exponents is due to the readout: as a cut
edge it hands down gradients of unit scale, where the true ones fall with 1 / fan_in. A plain model
has the true ones; see `plain`.

Sources: Blake et al. 2024, arXiv:2407.17465, table 2; Yang et al. 2022, arXiv:2203.03466, table 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer

from mixprec.umup.roles import ROLES, Entry, Role

__all__ = ["FAMILIES", "Family", "Rule", "Rules", "family_of", "rule"]

Family = Literal["adam", "sgd", "muon", "shampoo", "soap"]

FAMILIES: Mapping[Family, tuple[str, ...]] = {
    "adam": (
        *("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "RMSprop", "Adagrad"),
        *("SparseAdam", "Lion", "SignSGD", "Signum", "LAMB", "Lamb", "ADOPT", "AdEMAMix", "Adan"),
        *("StableAdamW", "AdamW8bit", "Adam8bit", "Lion8bit", "FusedAdam", "AdamWScheduleFree"),
        *("RAdamScheduleFree", "AdamMini", "SophiaG"),
    ),
    "sgd": ("SGD", "SGDScheduleFree"),
    "muon": ("Muon", "SingleDeviceMuon", "Dion2"),
    "shampoo": ("Shampoo", "DistributedShampoo"),
    "soap": ("SOAP",),
}
"""Optimizers by the size of their updates: classes of these names, and subclasses of them."""

_MATRICES_ONLY: tuple[Family, ...] = ("muon", "shampoo")

ADJUST = ("original", "match_rms_adamw", "spectral_unclamped", "spectral_norm", "none")
"""What a Muon multiplies its orthogonal update by; the first three are those of torch."""


def family_of(optimizer: type[Optimizer] | Optimizer | str) -> Family:
    """The family of an optimizer class, an instance, or the name of either or of a family.

    Raises:
        ValueError: for an optimizer without a rule, with the families and how to choose one.

    >>> import torch
    >>> from mixprec.umup.rules import family_of
    >>> family_of(torch.optim.NAdam), family_of("Lion"), family_of("sgd")
    ('adam', 'adam', 'sgd')
    """
    if isinstance(optimizer, str):
        names = [optimizer]
    else:
        inner: Any = getattr(optimizer, "inner", optimizer)  # of a MixedPrecision
        kind = inner if isinstance(inner, type) else type(inner)
        names = [base.__name__ for base in kind.__mro__]
    for family, members in FAMILIES.items():
        if family in names or any(name in members for name in names):
            return family
    families = "; ".join(f"{family!r} ({', '.join(m[:3])}, ...)" for family, m in FAMILIES.items())
    raise ValueError(
        f"{names[0]} has no learning rate rule. If its updates have the size of a family's, give "
        f"that family's name instead, optimizer='adam'. Families: {families}."
    )


@dataclass(frozen=True)
class Rule:
    """What becomes of one parameter."""

    init: str
    """Distribution of initial values, as text."""
    init_std: float
    """Its standard deviation; 0 for constants."""
    forward: float | None
    """What the output is multiplied by, A; None for parameters that are not multiplied by data."""
    backward: float | None
    """What the input's gradient is multiplied by on a cut edge."""
    token: str
    """What the sum of gradients over N tokens is multiplied by, as text."""
    lookup: float
    """The part of the token factor that differs by parameter: V^1/2 for embeddings, else 1."""
    lr: float
    """Multiplies the learning rate."""
    decays: bool
    """Whether it has weight decay."""
    formula: str
    """`lr`, as text."""


@dataclass(frozen=True)
class Rules:
    """The table for one optimizer and model: its arguments, checked once.

    Args:
        family: see `family_of`.
        embedding_rule: "umup" is width^-1/2 under Adam-like rules, found best in practice for large
            vocabularies; "mup" is 1, for small ones and as the original theory has it.
        depth_rule: "sqrt" gives tensors in residual branches depth^-1/2; "completep" 1.
        adjust_lr_fn: what a Muon multiplies its update by itself; see `ADJUST`.
        readout_fan_in: of a model whose readout is plain, under SGD: its true gradients are smaller
            by that, so the learning rates of all below it are larger.
    """

    family: Family
    embedding_rule: Literal["umup", "mup"] = "umup"
    depth_rule: Literal["sqrt", "completep"] = "sqrt"
    adjust_lr_fn: str = "original"
    readout_fan_in: int = 1

    def __post_init__(self) -> None:
        if self.embedding_rule not in ("umup", "mup"):
            raise ValueError(f"embedding_rule={self.embedding_rule!r}; use 'umup' or 'mup'")
        if self.depth_rule not in ("sqrt", "completep"):
            raise ValueError(f"depth_rule={self.depth_rule!r}; use 'sqrt' or 'completep'")
        if self.adjust_lr_fn not in ADJUST:
            raise ValueError(
                f"adjust_lr_fn={self.adjust_lr_fn!r}; use one of {', '.join(map(repr, ADJUST))}, "
                f"whichever the optimizer multiplies its orthogonal update by"
            )

    def of(self, entry: Entry) -> Rule:
        """The row of one parameter.

        Raises:
            ValueError: for a role that the family has no rule for.
        """
        forward, backward = _multipliers(entry)
        lr, formula = self._lr(entry)
        std = {"norm": 0.0, "bias": 0.0}.get(entry.role, 1.0)
        init = {"norm": "1", "bias": "0"}.get(entry.role, "N(0, 1)")
        if entry.plain and forward is not None and entry.role != "tied":
            # The multiplier is inside the weight, and a change of the weight has to carry it too.
            lr, formula, std = lr * forward, f"{formula} * A", std * forward
            init = f"N(0, {std:.3g}^2)"
            forward = backward = None
        below = entry.role not in ("output", "tied") and not entry.in_readout
        if self.family == "sgd" and below and self.readout_fan_in > 1:
            lr, formula = lr * self.readout_fan_in, f"{formula} * {self.readout_fan_in}"
        lookup = entry.shape[0] ** 0.5 if entry.role == "embedding" else 1.0
        return Rule(
            init=init,
            init_std=std,
            forward=forward,
            backward=backward,
            token="(V/N)^1/2" if entry.role == "embedding" else "N^-1/2",
            lookup=lookup,
            lr=lr,
            decays=entry.role not in ("norm", "bias"),
            formula=formula,
        )

    def _lr(self, entry: Entry) -> tuple[float, str]:
        role, depth = entry.role, entry.depth if self.depth_rule == "sqrt" else 1
        branch = depth**-0.5
        inside = "" if depth == 1 else f" * {depth}^-1/2"
        if self.family in _MATRICES_ONLY and role != "hidden":
            raise ValueError(
                f"{self.family!r} treats hidden matrices only, and {entry.names[0] or 'this'} is "
                f"{role!r}. Give it to an Adam-like optimizer: param_groups(..., "
                f"optimizer=torch.optim.AdamW, roles=umup.ROLES - {{'hidden'}}), and "
                f"roles={{'hidden'}} here."
            )
        if role in ("output", "tied"):
            return 1.0, "1"
        if role in ("norm", "bias"):
            return branch, f"1{inside}".removeprefix("1 * ")
        if role == "embedding":
            width = self.family != "sgd" and self.embedding_rule == "umup"
            return (entry.fan_out**-0.5, f"{entry.fan_out}^-1/2") if width else (1.0, "1")
        if role == "input":
            return entry.fan_in**-0.5, f"{entry.fan_in}^-1/2"
        size, text = self._hidden(entry)
        return size * branch, text + inside

    def _hidden(self, entry: Entry) -> tuple[float, str]:
        fan_in, fan_out = entry.fan_in, entry.fan_out
        if self.family == "soap":
            return 1.0, "1"  # of an update that `spectral_normalize` gives the norm fan_out^1/2
        if self.family == "shampoo":
            return fan_out**0.5, f"{fan_out}^1/2"
        if self.family != "muon":
            return fan_in**-0.5, f"{fan_in}^-1/2"
        # The spectral norm that leaves outputs width-free, over the one that the rule makes.
        own = {
            "original": max(1.0, fan_out / fan_in) ** 0.5,
            "match_rms_adamw": max(fan_in, fan_out) ** 0.5,  # its 0.2 is part of the base rate
            "spectral_unclamped": (fan_out / fan_in) ** 0.5,
            "spectral_norm": (fan_out / fan_in) ** 0.5,
            "none": 1.0,
        }[self.adjust_lr_fn]
        return fan_out**0.5 / own, f"({fan_out} / {own**2:g})^1/2"


def rule(
    role: Role,
    shape: tuple[int, ...],
    depth: int = 1,
    optimizer: type[Optimizer] | Optimizer | str = "adam",
    *,
    plain: bool = False,
    **options: Any,
) -> Rule:
    """The row of the table for one parameter.

    Args:
        role: one of `ROLES`.
        shape: `[fan_out, fan_in, *kernel]`, or `[vocab, width]` of an embedding.
        depth: layers of the residual stack that it is in; 1 outside.
        optimizer: see `family_of`.
        plain: for a weight whose layer has no multiplier (`nn.Linear`): initial value and learning
            rate then contain A.
        options: those of `Rules`.

    Raises:
        ValueError: for an unknown role, a fan of zero, and what `Rules` refuses.

    >>> from mixprec import umup
    >>> row = umup.rule("hidden", (1024, 256), depth=4)
    >>> row.forward, row.lr, row.formula
    (0.0625, 0.03125, '256^-1/2 * 4^-1/2')
    """
    if role not in ROLES:
        raise ValueError(f"role={role!r}; roles are {', '.join(sorted(ROLES))}")
    if 0 in shape or depth < 1:
        raise ValueError(
            f"shape={list(shape)}, depth={depth}; a fan of zero or a depth below 1 has no rule"
        )
    return Rules(family_of(optimizer), **options).of(
        Entry(role, tuple(shape), depth, plain, (f"a {role} parameter",))
    )


def _multipliers(entry: Entry) -> tuple[float | None, float | None]:
    if entry.role in ("input", "hidden"):
        return entry.fan_in**-0.5, entry.fan_out**-0.5
    if entry.role == "output":
        return 1 / entry.fan_in, entry.fan_out**-0.5
    if entry.role == "tied":
        return 1 / entry.fan_out, entry.fan_in**-0.5  # as a readout; 1 as an embedding
    return None, None
