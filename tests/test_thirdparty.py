"""Every rule of the packages that people really use, bare and inside MixedPrecision."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import STORAGES, Masters, Outcome, compare
from rules import Recipe, torch_recipes
from thirdparty_rules import other_recipes, pytorch_optimizer_recipes

from mixprec.optimizer import MixedPrecision

pytestmark = pytest.mark.thirdparty

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "pytorch_optimizer",
    "schedulefree",
    "lion_pytorch",
    "optimi",
    "prodigyopt",
    "bitsandbytes",
)
NO_EXTRA = "needs the thirdparty extra: pip install -e '.[test,thirdparty]'"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs, on import
    for package in PACKAGES:
        pytest.importorskip(package, reason=NO_EXTRA)

REGISTRY = pytorch_optimizer_recipes()
OTHERS = other_recipes()
RUNNABLE = [recipe for recipe in REGISTRY + OTHERS if not recipe.unable]
IN_BACKWARD = ("lomo", "adalomo")
NOT_AN_OPTIMIZER = ("magma",)


def named(recipe: Recipe) -> str:
    return recipe.name


@functools.cache
def outcomes(recipe: Recipe) -> tuple[Outcome, ...]:
    return tuple(compare(recipe, dtype, masters) for dtype, masters in STORAGES)


@pytest.mark.parametrize("recipe", REGISTRY + OTHERS, ids=named)
def test_only_known_rules_cannot_run_bare(recipe: Recipe) -> None:
    for outcome in outcomes(recipe):
        assert (outcome.kind == "unable") == bool(recipe.unable), outcome.reason


@pytest.mark.parametrize("recipe", RUNNABLE, ids=named)
def test_fp32_parameters_are_stepped_as_by_the_bare_rule(recipe: Recipe) -> None:
    fp32, *_ = outcomes(recipe)
    assert fp32.kind == ("refused" if recipe.name.startswith(NOT_AN_OPTIMIZER) else "exact"), (
        fp32.reason
    )


@pytest.mark.parametrize("recipe", RUNNABLE, ids=named)
def test_masters_are_exact_but_for_rules_known_to_be_refused(recipe: Recipe) -> None:
    _, bf16, _, fp16 = outcomes(recipe)
    for outcome in (bf16, fp16):
        assert outcome.kind == ("refused" if recipe.refused else "exact"), outcome.reason


@pytest.mark.parametrize("recipe", RUNNABLE, ids=named)
def test_split_masters_are_exact_where_tensors_are_not_coupled(recipe: Recipe) -> None:
    _, full, split, _ = outcomes(recipe)
    if full.kind == "exact" and full.tier == "whole":
        assert split.kind == "refused"
        assert "Use masters='full'" in split.reason
    else:
        assert split.kind == full.kind, split.reason


@pytest.mark.parametrize(("dtype", "masters"), STORAGES, ids=str)
@pytest.mark.parametrize("recipe", RUNNABLE, ids=named)
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(
    recipe: Recipe, dtype: torch.dtype, masters: Masters
) -> None:
    outcome = compare(recipe, dtype, masters, restart=3)
    if recipe.name.startswith("sara") and dtype != torch.float32:
        # Its state holds masked weights only; once it exists, no small trial can be made of it.
        assert outcome.kind == "refused", outcome.reason
        return
    without = outcomes(recipe)[STORAGES.index((dtype, masters))]
    assert outcome.kind == without.kind, outcome.reason


def test_at_least_110_rules_of_pytorch_optimizer_are_exact_at_every_option() -> None:
    result: dict[str, bool] = {}
    for recipe in REGISTRY:
        fp32, bf16, _, fp16 = outcomes(recipe)
        rule = recipe.name.partition(":")[0]
        exact = fp32.kind == bf16.kind == fp16.kind == "exact"
        result[rule] = result.get(rule, True) and exact
    assert len(result) == 128
    assert sum(result.values()) >= 110


@pytest.mark.parametrize("recipe", [r for r in REGISTRY if r.name in IN_BACKWARD], ids=named)
def test_a_rule_that_updates_in_backward_is_refused_with_its_reason(recipe: Recipe) -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # adalomo misses packages that it does not need here
        rule = recipe.build([{"params": [weight]}])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match="could not be tried on small FP32 tensors"):
        MixedPrecision(rule).step()


def test_the_table_in_the_docs_is_up_to_date() -> None:
    table = _rule_table()
    found = table.page(
        {
            "torch.optim": table.rows(torch_recipes()),
            "pytorch-optimizer": table.rows(REGISTRY, outcomes),
            "schedulefree, lion-pytorch, optimi, prodigyopt, bitsandbytes": table.rows(
                OTHERS, outcomes
            ),
        }
    )
    assert _undated(table.PAGE.read_text()) == _undated(found), (
        "run `python docs/benchmarks/rule_table.py`"
    )


def _rule_table() -> Any:
    path = ROOT / "docs" / "benchmarks" / "rule_table.py"
    spec = importlib.util.spec_from_file_location("rule_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rule_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _undated(text: str) -> str:
    return re.sub(r"Python [0-9.]+|Made [0-9-]+", "", text)
