"""Write docs/rules.md: every rule that was tried inside MixedPrecision, and what came of it.

    python docs/benchmarks/rule_table.py

Needs the thirdparty extra. Takes a few minutes on a CPU; nothing in the table depends on its speed.
"""

from __future__ import annotations

import datetime
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from comparison import STORAGES, Outcome, compare, process_group  # noqa: E402
from rules import Recipe, torch_recipes  # noqa: E402
from thirdparty_rules import other_recipes, pytorch_optimizer_recipes  # noqa: E402
from torch import nn  # noqa: E402

from mixprec.optimizer import MixedPrecision  # noqa: E402
from mixprec.optimizer.fused.program.program import NUMEL  # noqa: E402
from mixprec.optimizer.fused.self_check import FusedAdmission, admit_fused  # noqa: E402

PAGE = ROOT / "docs" / "rules.md"
PACKAGES = (
    "pytorch-optimizer",
    "schedulefree",
    "lion-pytorch",
    "torch-optimi",
    "prodigyopt",
    "bitsandbytes",
)
CLOSURE = "it calls its closure itself"


@dataclass(frozen=True)
class Row:
    """One rule with all its options.

    Attributes:
        rule: its name, without options.
        tier: "1" to "3", "refused" or "cannot run": how its first set of options runs over BF16
            parameters, with the arguments that its steps need.
        how: what there is to say of tier 1, or why it is not.
        result: "exact", "refused", "cannot run" or "WRONG": the worst over its options and formats.
        options: how many sets of options were compared.
        runs: "bucket by bucket" or "whole" (some of its options may differ), or empty.
        split: whether split masters are possible, for all of its options.
        note: the reason for what is not the usual case.
    """

    rule: str
    tier: str
    how: str
    result: str
    options: int
    runs: str
    split: bool
    note: str


def outcomes(recipe: Recipe) -> Sequence[Outcome]:
    """How a recipe compares for each of `STORAGES`."""
    return [compare(recipe, dtype, masters) for dtype, masters in STORAGES]


def admissions(recipe: Recipe) -> list[FusedAdmission]:
    """Whether each group of a recipe may run as one program a step, over BF16 parameters."""
    shapes = [[shape for shape in group if shape] for group in recipe.shapes]
    groups = [
        {"params": [nn.Parameter(torch.zeros(shape).bfloat16()) for shape in group]}
        for group in shapes
    ]
    with process_group(recipe.collective), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inner = MixedPrecision(recipe.build(groups)).inner
        return [admit_fused(inner, index) for index in range(len(inner.param_groups))]


def in_tier_1(recipe: Recipe) -> bool:
    """Whether all of a recipe's groups run as one program, in steps that need gradients alone."""
    able = recipe.drive == "grads" and not recipe.unable and not recipe.refused
    return able and all(found.fusible for found in admissions(recipe))


def _tier(recipe: Recipe, outcomes: Sequence[Outcome]) -> tuple[str, str]:
    full = outcomes[1]
    if full.kind in ("unable", "refused"):
        return ("cannot run", recipe.unable) if full.kind == "unable" else ("refused", "")
    found = admissions(recipe)
    other = "3" if full.tier == "whole" else "2"
    if refusal := next((one.reason for one in found if not one.fusible), ""):
        return other, re.sub(" is off by .*", "", refusal)
    if recipe.drive != "grads":
        return other, "its steps are given a closure; those without one are tier 1"
    return "1", _notes(found)


def _notes(found: Sequence[FusedAdmission]) -> str:
    notes = {
        "sums over each tensor": any(p.per_tensor - {NUMEL} for a in found for p in a.programs),
        "scalars for each size": any(one.by_size for one in found),
        "a first step of its own": any(one.first_eager for one in found),
    }
    return "; ".join(note for note, holds in notes.items() if holds)


def rows(
    recipes: Iterable[Recipe], outcomes: Callable[[Recipe], Sequence[Outcome]] = outcomes
) -> list[Row]:
    """One row for each rule among `recipes`, in their order."""
    found: dict[str, list[tuple[Recipe, Sequence[Outcome]]]] = {}
    for recipe in recipes:
        rule = re.split(r"[:(]", recipe.name)[0]
        found.setdefault(rule, []).append((recipe, outcomes(recipe)))
    return [_row(rule, same) for rule, same in found.items()]


def _row(rule: str, found: Sequence[tuple[Recipe, Sequence[Outcome]]]) -> Row:
    able = [outcomes for _, outcomes in found if outcomes[0].kind != "unable"]
    tier = _tier(*found[0])
    if not able:
        return Row(rule, *tier, "cannot run", len(found), "", False, "")
    kinds = {outcome.kind for fp32, bf16, _, fp16 in able for outcome in (fp32, bf16, fp16)}
    for outcome in (outcome for outcomes in able for outcome in outcomes):
        if outcome.kind == "wrong":
            return Row(rule, *tier, "WRONG", len(able), outcome.tier, False, outcome.reason)
    if "refused" in kinds:
        why = next((recipe.refused for recipe, _ in found if recipe.refused), "")
        return Row(rule, *tier, "refused", len(able), "", False, why)
    whole = [outcomes[1] for outcomes in able if outcomes[1].tier == "whole"]
    runs = "whole" if len(whole) == len(able) else "bucket by bucket"
    if whole and runs != "whole":
        runs += f", {len(whole)} of {len(able)} option sets whole"
    split = all(outcomes[2].kind == "exact" for outcomes in able)
    closure = any(outcome.reason == CLOSURE for outcome in whole)
    why = (CLOSURE if closure else "tensors are coupled") if whole else ""
    return Row(rule, *tier, "exact", len(able), runs, split, why)


def page(sections: dict[str, list[Row]]) -> str:
    """The text of docs/rules.md."""
    versions = [f"torch {torch.__version__.partition('+')[0]}"]
    versions += [f"{package} {metadata.version(package)}" for package in PACKAGES]
    parts = [
        HEAD.format(
            versions=", ".join(versions),
            python=platform.python_version(),
            date=datetime.date.today().isoformat(),
        )
    ]
    parts.append(_counts(sections))
    for title, found in sections.items():
        counts = Counter(row.result for row in found)
        summary = ", ".join(f"{count} {result}" for result, count in counts.most_common())
        lines = [f"## {title}\n", f"{len(found)} rules: {summary}.\n"]
        lines += [_cells(*HEADINGS), "|" + "---|" * len(HEADINGS)]
        lines += [
            _cells(
                *(row.rule, row.tier, row.how, row.result, str(row.options), row.runs),
                *("yes" if row.split else "no", row.note),
            )
            for row in found
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _counts(sections: dict[str, list[Row]]) -> str:
    lines = [_cells("rules of", "all", *TIERS.values()), "|" + "---|" * (2 + len(TIERS))]
    for title, found in sections.items():
        counts = Counter(row.tier for row in found)
        lines.append(_cells(title, str(len(found)), *(str(counts[tier]) for tier in TIERS)))
    return "\n".join(lines) + "\n"


def _cells(*texts: str) -> str:
    return "| " + " | ".join(text.replace("|", "/") for text in texts) + " |"


TIERS = {
    **{"1": "tier 1", "2": "tier 2", "3": "tier 3"},
    **{"refused": "refused", "cannot run": "cannot run"},
}

HEADINGS = (
    *("rule", "tier", "in tier 1 with, or why not", "result", "option sets", "runs"),
    *("split masters", "why"),
)


HEAD = """# Rules that were tried

Does a given optimizer work inside `mixprec.MixedPrecision`? Every rule below was run twice from the
same 16-bit values with the same 16-bit gradients: bare on FP32 parameters, and wrapped over FP32,
BF16 (full and split masters) and FP16 parameters. *exact* means that after every step

    master == parameter of the bare rule        weight == master, rounded

bit by bit, and so did the rule's own state and its group values. *refused* means that the wrapper
raises an error that says why, before anything changes; FP32 parameters, which need no masters, are
exact all the same, but for magma. *cannot run*: the bare rule cannot take a step on a CPU.

A rule that runs *bucket by bucket* needs a small FP32 scratch. One that runs *whole* couples
tensors and must see all FP32 masters at once, so it has no split masters. A rule that calls its
closure itself and diverges inside of a step (LBFGS) goes on through infinity when it is bare;
wrapped it raises FloatingPointError, unless `on_nonfinite="ignore"` was asked for.

The *tier* is how the rule, with its first set of options here (its defaults, where it has any),
steps BF16 parameters:

- **1**: recorded as a program that equals the rule within 2e-6 of each update; it can run as one
  kernel for all tensors of a group. With *sums over each tensor* a kernel passes over the tensor
  once more for each sum that others depend on. With *scalars for each size* there is one set of
  scalars for each shape among the parameters. *A first step of its own* is run by the rule.
- **2**: by the rule's own step, bucket by bucket, through an FP32 scratch of bounded size.
- **3**: by the rule's own step, whole, over FP32 masters of all parameters.

A rule is in tier 1 if all of its parameter groups are; parameters of no dimensions never are. None
of this is a list in the code: the wrapper tries a rule on small tensors before its first step, and
`optimizer.explain()` says what it found.

{versions}; Python {python}, CPU.
Made {date} by `docs/benchmarks/rule_table.py`, in some three minutes.
"""


def sections() -> dict[str, list[Row]]:
    """All rows, by package. Takes minutes."""
    return {
        "torch.optim": rows(torch_recipes()),
        "pytorch-optimizer": rows(pytorch_optimizer_recipes()),
        "schedulefree, lion-pytorch, optimi, prodigyopt, bitsandbytes": rows(other_recipes()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    PAGE.write_text(page(sections()))
