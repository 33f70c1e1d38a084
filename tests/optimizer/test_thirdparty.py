"""Every rule of the packages that people really use, bare and inside MixedPrecision."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import SPACING, UPDATE
from comparison import STORAGES, Masters, Outcome, compare
from rules import Recipe, torch_recipes
from thirdparty_rules import other_recipes, pytorch_optimizer_recipes

from mixprec.optimizer import MixedPrecision

pytestmark = pytest.mark.thirdparty

ROOT = Path(__file__).parents[2]
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


def _rule_table() -> Any:
    path = ROOT / "docs" / "benchmarks" / "rule_table.py"
    spec = importlib.util.spec_from_file_location("rule_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rule_table"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = _rule_table()
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


TIER_1 = (
    *("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW", "torch.optim.NAdam"),
    *("torch.optim.RAdam", "torch.optim.RMSprop", "torch.optim.Adagrad", "torch.optim.Adamax"),
    *("torch.optim.Adadelta", "torch.optim.ASGD", "torch.optim.Rprop"),
    *("lion", "adan", "adabelief", "adopt", "ademamix", "mars", "schedulefreeadamw"),
    *("lamb", "lars", "novograd", "stableadamw", "fromage", "adanorm", "a2grad", "fadam"),
    *("adapnm", "pnm", "sgdsai", "gravity", "adammini", "amos", "aggmo", "adashift", "stablespam"),
    *("schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree", "lion_pytorch.Lion"),
)
"""Rules that must be fused at their default options, among others."""

COUPLED = (
    *("adagc", "adai", "adams", "asgd", "avagrad", "emofact", "kron", "prodigy", "ranger21"),
    *("dadaptadagrad", "dadaptadam", "dadaptadan", "dadaptlion", "dadaptsgd"),
    *("prodigyopt.Prodigy", "torch.optim.LBFGS"),
)
"""Rules whose update of one tensor depends on others."""


def defaults() -> dict[str, Recipe]:
    """The first set of options of every rule."""
    recipes = [replace(r, name=f"torch.optim.{r.name}") for r in torch_recipes()]
    found: dict[str, Recipe] = {}
    for recipe in [*recipes, *REGISTRY, *OTHERS]:
        found.setdefault(re.split(r"[:(]", recipe.name)[0], recipe)
    return found


DEFAULTS = defaults()


@functools.cache
def in_tier_1(rule: str) -> bool:
    found: bool = TABLE.in_tier_1(DEFAULTS[rule])
    return found


@pytest.mark.parametrize("rule", TIER_1)
def test_these_rules_are_one_program_a_step(rule: str) -> None:
    assert in_tier_1(rule), [one.reason for one in TABLE.admissions(DEFAULTS[rule])]


@pytest.mark.parametrize("rule", COUPLED)
def test_rules_that_couple_tensors_are_no_program(rule: str) -> None:
    assert not any(one.fusible for one in TABLE.admissions(DEFAULTS[rule]))


def test_nero_is_refused_for_its_means_over_rows() -> None:
    reasons = {one.reason for one in TABLE.admissions(DEFAULTS["nero"])}
    assert reasons == {"torch.mean reduces over some dimensions only"}


def test_at_least_70_rules_of_pytorch_optimizer_are_one_program_a_step() -> None:
    rules = {recipe.name.partition(":")[0] for recipe in REGISTRY}
    assert len(rules) == 128
    assert sum(map(in_tier_1, rules)) >= 70


SIZES = {1: (65,), 2: (33, 17), 3: (6, 7, 5), 4: (8, 4, 3, 3)}
"""By number of dimensions; each next parameter of a group is larger by 1 everywhere."""


@pytest.mark.parametrize("rule", DEFAULTS)
def test_fifty_steps_of_every_program_stay_within_tolerance_of_the_rule(rule: str) -> None:
    if not in_tier_1(rule):
        pytest.skip("not in tier 1")
    eager, begin = _small_run(DEFAULTS[rule])
    programs = MixedPrecision(_small_run(DEFAULTS[rule])[0], fused=True)
    pairs = list(zip(_params(eager), _params(programs.inner), strict=True))
    generator = torch.Generator().manual_seed(1)
    for step in range(50):
        for place, (left, right) in enumerate(pairs):
            size = (1.0, 4.0, 0.25, 0.01)[place % 4] * (1.0, 3.0, 0.1)[step % 3]
            left.grad = torch.randn(left.shape, generator=generator) * size
            right.grad = left.grad.clone()
        for optimizer in (eager, programs):
            torch.manual_seed(step)
            optimizer.step()
        for group in (*eager.param_groups, *programs.inner.param_groups):
            group.update({k: 0.98 * v for k, v in group.items() if k == "lr" and v is not None})
    for (left, right), first in zip(pairs, begin, strict=True):
        way, size = (left - first).detach().abs().max(), left.detach().abs().max()
        # Each step may round the master otherwise by half its spacing.
        allowed = UPDATE * way + 50 * SPACING / 2 * size
        assert (left - right).detach().abs().max() <= allowed


def _small_run(recipe: Recipe) -> tuple[Any, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, Any]] = []
    for group in recipe.shapes:
        shapes = [SIZES[len(shape)] for shape in group if shape]
        sizes = [tuple(n + i for n in shape) for i, shape in enumerate(shapes)]
        values = [torch.randn(size, generator=generator) * 0.1 for size in sizes]
        groups.append({"params": [torch.nn.Parameter(value) for value in values]})
    torch.manual_seed(0)
    optimizer: Any = recipe.build(groups)
    if callable(train := getattr(optimizer, "train", None)):
        train()
    return optimizer, [param.detach().clone() for param in _params(optimizer)]


def _params(optimizer: Any) -> list[Any]:
    return [param for group in optimizer.param_groups for param in group["params"]]


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
    found = TABLE.page(
        {
            "torch.optim": TABLE.rows(torch_recipes()),
            "pytorch-optimizer": TABLE.rows(REGISTRY, outcomes),
            "schedulefree, lion-pytorch, optimi, prodigyopt, bitsandbytes": TABLE.rows(
                OTHERS, outcomes
            ),
        }
    )
    assert _undated(TABLE.PAGE.read_text()) == _undated(found), (
        "run `python docs/benchmarks/rule_table.py`"
    )


def _undated(text: str) -> str:
    return re.sub(r"Python [0-9.]+|Made [0-9-]+", "", text)
