"""A recipe is data, and refuses what no tensor core multiplies."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest

from mixprec import Precision, float8
from mixprec.float8 import Cast, Recipe
from mixprec.formats import BF16, E4M3, E5M2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Recipe(input=Cast(E5M2)),
            "grad_output and input are both e5m2, and tensor cores have no product of two e5m2 "
            "operands, which grad_weight would be. Make one of them e4m3, or leave 'grad_weight' "
            "out of products",
        ),
        (lambda: Recipe(weight=Cast(E5M2)), "grad_output and weight are both e5m2"),
        (
            lambda: Recipe(input=Cast(E5M2), weight=Cast(E5M2), grad_output=Cast(E4M3)),
            "input and weight are both e5m2",
        ),
        (lambda: Recipe(products=("dX",)), "products names 'dX'; the products are 'output', "),
        (
            lambda: Recipe(fast_accumulation=("loss",)),
            "fast_accumulation names 'loss'; the products are",
        ),
        (
            lambda: Recipe(products=("output",), fast_accumulation=("grad_weight",)),
            "fast_accumulation names 'grad_weight', which does not run in FP8",
        ),
        (lambda: Cast(BF16), "format=bf16 has no 8-bit product; use formats.E4M3 or E5M2"),
        (
            lambda: Cast(scaling="delayed"),  # pyright: ignore[reportArgumentType]
            "unknown scaling 'delayed'; use one of 'static', 'adaptive', 'tensorwise', 'rowwise'",
        ),
        (lambda: Cast(exponent=65), "exponent=65 is beyond 64"),
        (
            lambda: Cast(scaling="rowwise", exponent=1),
            "exponent=1 means nothing with scaling='rowwise'",
        ),
        (
            lambda: float8.by_name("mxfp8"),
            "unknown recipe 'mxfp8'; use one of 'static', 'adaptive', 'tensorwise', 'rowwise', or "
            "a mixprec.float8.Recipe",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_a_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_e5m2_inputs_go_with_a_16_bit_weight_gradient() -> None:
    recipe = Recipe(input=Cast(E5M2), products=("output", "grad_input"))
    assert recipe.input.format == E5M2


def test_recipes_are_values() -> None:
    static = float8.by_name("static")
    assert Recipe() == static != float8.by_name("adaptive")
    assert pickle.loads(pickle.dumps(static)) == static
    assert hash(Precision("fp8", recipe=Recipe())) == hash(Precision("fp8", recipe="static"))


def test_a_precision_tells_its_recipe_and_reads_it_back() -> None:
    precision = Precision("fp8", recipe="rowwise")
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse("fp8") == Precision("fp8") == Precision("bf16", recipe="adaptive")
    assert Precision("bf16").recipe is None
    assert "read their operands in 8 bits (recipe rowwise): their scales" in precision.explain()
    static = Precision("fp8", recipe="static").explain()
    assert "8 bits (recipe static): sum the loss over tokens, with presumed_tokens=1" in static


def test_a_recipe_without_a_name_is_told_by_its_operands() -> None:
    recipe = Recipe(input=Cast(exponent=3), grad_output=Cast(E5M2, "tensorwise"))
    assert (
        str(recipe) == "input e4m3 static 2^3, weight e4m3 static 2^0, grad_output e5m2 tensorwise"
    )
