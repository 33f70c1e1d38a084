"""What `mixprec doctor` finds out about FP8: products that run in units for it, and what casts do.

Whether there are units is asked of the device, and then a product of each kind is taken and
compared with the same bytes multiplied in FP32. Small whole numbers make every sum exact, so right
means equal.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixprec import formats
from mixprec.cli.table import table
from mixprec.float8.casts.cast import cast_scaled
from mixprec.float8.products import has_units, scaled_product
from mixprec.float8.recipe import PRODUCTS, by_name
from mixprec.formats import E4M3, E5M2, Format

__all__ = ["advice", "examine", "page"]

Outcome = Callable[[Callable[[], str]], str]

_COLUMNS = ("product", "recipe", "operands", "runs in")
_RECIPES = ("static", "rowwise")
"""One with a scale for each operand, which "adaptive" and "tensorwise" multiply alike, and one with
a scale for each row."""
_VALUES = (464.0, 480.0, 57344.0, 61440.0, math.inf, math.nan)
"""E4M3 ends at 448, and 464 still rounds to it; E5M2 ends at 57344, and 61440 rounds to no number
of it."""


def examine(device: torch.device, outcome: Outcome, speed: float | None) -> dict[str, Any]:
    """All findings about FP8 on `device`, as plain data.

    Args:
        outcome: runs a probe and makes its message of what it raises.
        speed: of E4M3 products as a multiple of BF16's, None if they cannot be had.
    """
    products = [
        {
            "product": product,
            "recipe": recipe,
            "operands": " x ".join(_operand_formats(product, recipe)),
            "runs in": outcome(functools.partial(_try_product, product, recipe, device)),
        }
        for product in PRODUCTS
        for recipe in _RECIPES
    ]
    casts = [
        {"cast": f"{name} to {format}", **_cast_values(cast, format, device, outcome)}
        for format in (E4M3, E5M2)
        for name, cast in (("torch", _cast_by_torch), ("mixprec", _cast_by_mixprec))
    ]
    units = has_units(device)
    said = advice(units, [product["runs in"] for product in products], speed)
    return {"units": units, "products": products, "casts": casts, "advice": said}


def advice(units: bool, outcomes: list[str], speed: float | None) -> str:
    """One sentence on what FP8 is good for here."""
    failures = [outcome for outcome in outcomes if outcome not in ("units", "emulated")]
    if failures:
        reason = failures[0].removeprefix("no: ")
        return f"Leave fp8 alone here, because a product of its layers failed: {reason}"
    if not units:
        return (
            "Use fp8 here to see what it does to a model, not for speed: this device has no units "
            "for it, and the same numbers come out of FP32 products."
        )
    fast = f"{speed:.1f} times as fast as bf16" if speed else "in units of their own"
    return f"fp8 products run {fast} here: mixprec.Precision('fp8') for linear layers."


def page(found: dict[str, Any]) -> list[str]:
    """Lines: a table of products, one of casts, and the reasons of what failed."""
    products = [["fp8 product", "recipe", "operands", "runs in"]]
    products += [[_cell(product[column]) for column in _COLUMNS] for product in found["products"]]
    values = [_name(value) for value in _VALUES]
    casts = [["fp8 cast of", *values]]
    casts += [[cast["cast"], *(_cell(cast[value]) for value in values)] for cast in found["casts"]]
    reasons = [
        f"  {product['product']} ({product['recipe']}): {product['runs in'].removeprefix('no: ')}"
        for product in found["products"]
        if product["runs in"].startswith("no: ")
    ]
    return [table(products), *reasons, "", table(casts)]


def _cell(outcome: str) -> str:
    return "no" if outcome.startswith("no: ") else outcome


def _operand_formats(product: str, recipe: str) -> tuple[str, str]:
    left, right = (getattr(by_name(recipe), name).format.name for name in PRODUCTS[product])
    return left, right


def _try_product(product: str, recipe: str, device: torch.device) -> str:
    """ "units" or "emulated" if a product is right to the bit; what is wrong with it else."""
    left_format, right_format = map(formats.by_name, _operand_formats(product, recipe))
    generator = torch.Generator().manual_seed(0)

    def whole_numbers(rows: int, format: Format) -> Tensor:
        numbers = torch.randint(-4, 5, (rows, 64), generator=generator)
        return numbers.to(device, torch.float32).to(format.dtype)

    left, right = whole_numbers(32, left_format), whole_numbers(48, right_format)
    rowwise = recipe == "rowwise"
    half = torch.full((32, 1) if rowwise else (1,), 0.5, device=device)
    four = torch.full((48, 1) if rowwise else (1,), 4.0, device=device)
    fast = product in by_name(recipe).fast_accumulation
    result = scaled_product(left, right, half, four, None, torch.bfloat16, fast)
    expected = (2 * (left.float() @ right.float().t())).bfloat16()
    if not torch.equal(result, expected):
        wrong = (result.float() - expected.float()).abs().max().item()
        return f"no: off by up to {wrong:g} from the same bytes in FP32"
    return "units" if has_units(device) else "emulated"


def _cast_values(
    cast: Callable[[Tensor, Format], Tensor],
    format: Format,
    device: torch.device,
    outcome: Outcome,
) -> dict[str, str]:
    def probe(value: float) -> str:
        return _name(cast(torch.full((1, 1), value, device=device), format).float().item())

    return {_name(value): outcome(functools.partial(probe, value)) for value in _VALUES}


def _cast_by_torch(x: Tensor, format: Format) -> Tensor:
    return x.to(format.dtype)


def _cast_by_mixprec(x: Tensor, format: Format) -> Tensor:
    rows = cast_scaled(x, format, torch.ones(2, device=x.device), cols=False).rows
    assert rows is not None
    return rows


def _name(value: float) -> str:
    return f"{value:g}"
