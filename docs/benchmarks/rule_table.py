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

from comparison import STORAGES, Outcome, compare  # noqa: E402
from rules import Recipe, torch_recipes  # noqa: E402
from thirdparty_rules import other_recipes, pytorch_optimizer_recipes  # noqa: E402

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
    found: dict[str, list[tuple[Recipe, Sequence[Outcome]]]] = {}
    for recipe in recipes:
        rule = re.split(r"[:(]", recipe.name)[0]
        found.setdefault(rule, []).append((recipe, outcomes(recipe)))
    return [_row(rule, same) for rule, same in found.items()]


def _row(rule: str, found: Sequence[tuple[Recipe, Sequence[Outcome]]]) -> Row:
    able = [outcomes for _, outcomes in found if outcomes[0].kind != "unable"]
    if not able:
        return Row(rule, "cannot run", len(found), "", False, found[0][0].unable)
    kinds = {outcome.kind for fp32, bf16, _, fp16 in able for outcome in (fp32, bf16, fp16)}
    for outcome in (outcome for outcomes in able for outcome in outcomes):
        if outcome.kind == "wrong":
            return Row(rule, "WRONG", len(able), outcome.tier, False, outcome.reason)
    if "refused" in kinds:
        why = next((recipe.refused for recipe, _ in found if recipe.refused), "")
        return Row(rule, "refused", len(able), "", False, why)
    whole = [outcomes[1] for outcomes in able if outcomes[1].tier == "whole"]
    runs = "whole" if len(whole) == len(able) else "bucket by bucket"
    if whole and runs != "whole":
        runs += f", {len(whole)} of {len(able)} option sets whole"
    split = all(outcomes[2].kind == "exact" for outcomes in able)
    closure = any(outcome.reason == CLOSURE for outcome in whole)
    why = (CLOSURE if closure else "tensors are coupled") if whole else ""
    return Row(rule, "exact", len(able), runs, split, why)


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
raises an error that says why, before anything changes; FP32 parameters, which need no masters, are
exact all the same, but for magma. *cannot run*: the bare rule cannot take a step on a CPU.

A rule that runs *bucket by bucket* needs a small FP32 scratch. One that runs *whole* couples
tensors and must see all FP32 masters at once, so it has no split masters. None of this is a list in
the code: the wrapper tries a rule on small tensors before its first step, and `optimizer.explain()`
says what it found.

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
