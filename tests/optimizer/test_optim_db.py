"""Every input that torch's own tests try on torch.optim's rules, bare and inside MixedPrecision."""

from __future__ import annotations

import pytest
import torch
from _pytest.mark import ParameterSet
from comparison import STORAGES, Masters, compare
from frozen import difference, frozen
from rules import Recipe, torch_recipes
from torch.optim import Optimizer

from mixprec.optimizer import masters as master_storage

RUNNABLE = [recipe for recipe in torch_recipes() if not recipe.unable]
UNABLE = [recipe for recipe in torch_recipes() if recipe.unable]
COUPLED = ("LBFGS",)


def case(recipe: Recipe) -> ParameterSet:
    # The for-loop is what a CPU runs by default, so asking for it by name is the same path again.
    again = recipe.name.endswith("& for-loop")
    return pytest.param(recipe, id=recipe.name, marks=[pytest.mark.slow] if again else [])


def stored(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "masters"), STORAGES, ids=stored)
@pytest.mark.parametrize("recipe", [case(recipe) for recipe in RUNNABLE])
def test_masters_are_bit_identical_to_the_bare_rule(
    recipe: Recipe, dtype: torch.dtype, masters: Masters
) -> None:
    outcome = compare(recipe, dtype, masters)
    if masters == "split" and recipe.name.startswith(COUPLED):
        assert outcome.kind == "refused"
        assert "Use masters='full'" in outcome.reason
        return
    assert outcome.kind == "exact", outcome.reason
    if dtype != torch.float32:
        assert outcome.tier == ("whole" if recipe.name.startswith(COUPLED) else "bucketed")


@pytest.mark.parametrize(("dtype", "masters"), STORAGES, ids=stored)
@pytest.mark.parametrize("recipe", [case(r) for r in RUNNABLE if r.name.endswith(": default")])
def test_a_run_goes_on_from_its_checkpoint_as_if_it_had_never_stopped(
    recipe: Recipe, dtype: torch.dtype, masters: Masters
) -> None:
    if masters == "split" and recipe.name.startswith(COUPLED):
        masters = "auto"
    outcome = compare(recipe, dtype, masters, restart=3)
    assert outcome.kind == "exact", outcome.reason


@pytest.mark.parametrize("recipe", [case(recipe) for recipe in UNABLE])
def test_a_differentiable_rule_cannot_step_leaf_parameters_even_bare(recipe: Recipe) -> None:
    assert compare(recipe, torch.float32, "auto").kind == "unable"


def test_the_database_lists_every_rule_of_torch_optim() -> None:
    public = (getattr(torch.optim, name) for name in dir(torch.optim))
    rules = {
        rule.__name__
        for rule in public
        if isinstance(rule, type) and issubclass(rule, Optimizer) and rule is not Optimizer
    }
    assert {recipe.name.partition(":")[0] for recipe in RUNNABLE} == rules


def test_the_comparison_notices_one_bit_in_one_master(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = next(recipe for recipe in RUNNABLE if recipe.name.startswith("AdamW"))
    write = master_storage.write

    def off_by_one_bit(*args: torch.Tensor, **kwargs: bool) -> None:
        args[2].view(torch.int32).view(-1)[:1] += 1
        write(*args, **kwargs)

    monkeypatch.setattr(master_storage, "write", off_by_one_bit)
    outcome = compare(recipe, torch.bfloat16, "split")
    assert outcome.kind == "wrong"
    assert outcome.reason.startswith("step 1: ['master'][0]: values differ by")


def test_the_comparison_tells_apart_what_compares_equal() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), torch.nan)
    assert difference(frozen({"m": nan}), frozen({"m": nan})) == ""
    assert "values differ" in difference(frozen({"m": zero}), frozen({"m": -zero}))
    assert "torch.float64 [2], bare" in difference(frozen([zero]), frozen([zero.double()]))
    assert difference(frozen({"step": 1}), frozen({"step": 1.0})) == "['step']: 1.0, bare 1"
