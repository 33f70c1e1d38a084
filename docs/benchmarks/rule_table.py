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
from itertools import groupby
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from comparison import STORAGES, Outcome, compare  # noqa: E402
from rules import (  # noqa: E402
    Recipe,
    other_recipes,
    pytorch_optimizer_recipes,
    torch_recipes,
)

PAGE = ROOT / "docs" / "rules.md"
PACKAGES = (
    "pytorch-optimizer",
    "schedulefree",
    "lion-pytorch",
    "torch-optimi",
    "prodigyopt",
    "bitsandbytes",
)


@dataclass(frozen=True)
class Row:
    """One rule with all its options.

    Attributes:
        rule: its name, without options.
        result: "exact", "refused", "cannot run" or "WRONG": the worst over its options and formats.
        options: how many sets of options were compared.
        runs: "bucket by bucket" or "whole" (some of its options may differ), or empty.
        split: whether split masters are possible, for all of its options.
        note: the reason for what is not the usual case.
    """

    rule: str
    result: str
    options: int
    runs: str
    split: bool
    note: str


def outcomes(recipe: Recipe) -> Sequence[Outcome]:
    """How a recipe compares for each of `STORAGES`."""
    return [compare(recipe, dtype, masters) for dtype, masters in STORAGES]


def rows(
    recipes: Iterable[Recipe], outcomes: Callable[[Recipe], Sequence[Outcome]] = outcomes
) -> list[Row]:
    """One row for each rule among `recipes`, in their order."""
    by_rule = groupby(recipes, key=lambda recipe: re.split(r"[:(]", recipe.name)[0])
    return [_row(rule, [outcomes(recipe) for recipe in same]) for rule, same in by_rule]


def _row(rule: str, found: Sequence[Sequence[Outcome]]) -> Row:
    able = [outcomes for outcomes in found if outcomes[0].kind != "unable"]
    if not able:
        return Row(rule, "cannot run", len(found), "", False, found[0][0].reason)
    for outcomes in able:
        for outcome in outcomes:
            if outcome.kind == "wrong":
                return Row(rule, "WRONG", len(able), outcome.tier, False, outcome.reason)
    refused = [
        outcome
        for fp32, bf16, _, fp16 in able
        for outcome in (fp32, bf16, fp16)
        if outcome.kind == "refused"
    ]
    if refused:
        return Row(rule, "refused", len(able), "", False, refused[0].reason)
    whole = [outcomes[1] for outcomes in able if outcomes[1].tier == "whole"]
    runs = "whole" if len(whole) == len(able) else "bucket by bucket"
    if whole and runs != "whole":
        runs += f", {len(whole)} of {len(able)} option sets whole"
    split = all(outcomes[2].kind == "exact" for outcomes in able)
    return Row(rule, "exact", len(able), runs, split, whole[0].reason if whole else "")


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
    for title, found in sections.items():
        counts = Counter(row.result for row in found)
        summary = ", ".join(f"{count} {result}" for result, count in counts.most_common())
        lines = [f"## {title}\n", f"{len(found)} rules: {summary}.\n"]
        lines += ["| rule | result | option sets | runs | split masters | why |", "|" + "---|" * 6]
        lines += [
            f"| {row.rule} | {row.result} | {row.options} | {row.runs} | "
            f"{'yes' if row.split else 'no'} | {row.note.replace('|', '/')} |"
            for row in found
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


HEAD = """# Rules that were tried

Does a given optimizer work inside `mixprec.MixedPrecision`? Every rule below was run twice from the
same 16-bit values with the same 16-bit gradients: bare on FP32 parameters, and wrapped over FP32,
BF16 (full and split masters) and FP16 parameters. *exact* means that after every step

    master == parameter of the bare rule        weight == master, rounded

bit by bit, and so did the rule's own state and its group values. *refused* means that the wrapper
raises an error that says why, before anything changes; *cannot run*, that the bare rule cannot take
a step on a CPU. A rule that runs *bucket by bucket* needs a small FP32 scratch; one that runs
*whole* couples tensors and must see all FP32 masters at once, so it has no split masters. None of
this is a list in the code: the wrapper tries a rule on small tensors before its first step, and
`optimizer.explain()` says what it found.

{versions}; Python {python}, CPU.
Made {date} by `docs/benchmarks/rule_table.py`.
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
