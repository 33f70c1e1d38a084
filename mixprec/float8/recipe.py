"""Which operand of which matrix product is held in which 8-bit format, and at which scale.

A linear layer takes three products, each of two of three operands:

    output      = input @ weight.T
    grad_input  = grad_output @ weight
    grad_weight = grad_output.T @ input

A `Recipe` says for each operand how it becomes FP8 (a `Cast`), which of the products run in FP8 at
all, and which may sum in the tensor cores' short register. It is data: compared, hashed, pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mixprec.formats import E4M3, E5M2, Format

__all__ = ["OPERANDS", "PRODUCTS", "Cast", "Recipe", "by_name"]

Scaling = Literal["static", "adaptive", "tensorwise", "rowwise"]

OPERANDS = ("input", "weight", "grad_output")
PRODUCTS = {
    "output": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("grad_output", "input"),
}
"""Each product of a linear layer with its two operands."""

_SCALINGS = ("static", "adaptive", "tensorwise", "rowwise")
MAX_EXPONENT = 64
"""2^64 takes FP32's smallest normal number, 2^-126, to E5M2's smallest, 2^-62 being far above."""


@dataclass(frozen=True)
class Cast:
    """How one operand becomes FP8.

    Args:
        format: E4M3 or E5M2.
        scaling: "static" multiplies by `2^exponent`; "adaptive" begins there, and moves the
            exponent between optimizer steps; "tensorwise" fits the largest value of each tensor to
            the largest of the format; "rowwise" does so for each row, and for each column where
            the transpose is used.
        exponent: of the multiplier, between -64 and 64, for "static" and "adaptive".
        power_of_two: rounds the multipliers of "tensorwise" and "rowwise" down to powers of two.

    Raises:
        ValueError: for another format or scaling, and for an exponent out of range or without use.

    >>> from mixprec import formats
    >>> from mixprec.float8 import Cast
    >>> print(Cast(formats.E5M2, "static", exponent=4))
    e5m2 static 2^4
    """

    format: Format = E4M3
    scaling: Scaling = "static"
    exponent: int = 0
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.format not in (E4M3, E5M2):
            raise ValueError(f"format={self.format} has no 8-bit product; use formats.E4M3 or E5M2")
        if self.scaling not in _SCALINGS:
            raise ValueError(
                f"unknown scaling {self.scaling!r}; use one of {', '.join(map(repr, _SCALINGS))}"
            )
        if abs(self.exponent) > MAX_EXPONENT:
            raise ValueError(
                f"exponent={self.exponent} is beyond {MAX_EXPONENT}, far outside what 16-bit "
                "numbers need to fit 8 bits"
            )
        if self.exponent and not self.has_exponent:
            raise ValueError(
                f"exponent={self.exponent} means nothing with scaling={self.scaling!r}, which "
                "computes its multiplier from each tensor; leave it out"
            )

    @property
    def has_exponent(self) -> bool:
        """Whether the multiplier is known before the tensor is."""
        return self.scaling in ("static", "adaptive")

    def __str__(self) -> str:
        shown = f" 2^{self.exponent}" if self.has_exponent else ""
        return f"{self.format} {self.scaling}{shown}"


@dataclass(frozen=True)
class Recipe:
    """How the three products of a linear layer run in FP8.

    Args:
        input, weight, grad_output: how each operand is cast. E4M3, with three mantissa bits, for
            what is read forward; E5M2, with 32 binades, for gradients.
        products: those that run in FP8; others take their operands as they come, in 16 bits.
        fast_accumulation: products that sum in the tensor cores' register of about 14 bits. On an
            H200 it saves nothing with one scale a matrix and a tenth of a product with one a row,
            and 4096 addends of one sign come out 7 % too small, 65536 half (otherwise 0.06 %).
        inline: under `torch.compile`, casts with a static exponent are plain operations that the
            compiler may fuse into what produced the tensor. They are not counted then.

    Raises:
        ValueError: for two E5M2 operands of one product, which tensor cores do not multiply; for
            unknown products; and for a fast product that does not run in FP8.

    >>> import mixprec
    >>> from mixprec.float8 import Recipe
    >>> mixprec.Precision("fp8", recipe=Recipe(products=("output", "grad_input"))).recipe.name
    'custom'
    """

    input: Cast = Cast()
    weight: Cast = Cast()
    grad_output: Cast = Cast(E5M2)
    products: tuple[str, ...] = tuple(PRODUCTS)
    fast_accumulation: tuple[str, ...] = ()
    inline: bool = False
    name: str = field(default="custom", compare=False)

    def __post_init__(self) -> None:
        for option in ("products", "fast_accumulation"):
            for product in getattr(self, option):
                if product not in PRODUCTS:
                    known = ", ".join(map(repr, PRODUCTS))
                    raise ValueError(f"{option} names {product!r}; the products are {known}")
        for product in self.products:
            left, right = PRODUCTS[product]
            if getattr(self, left).format == getattr(self, right).format == E5M2:
                raise ValueError(
                    f"{left} and {right} are both e5m2, and tensor cores have no product of two "
                    f"e5m2 operands, which {product} would be. Make one of them e4m3, or leave "
                    f"{product!r} out of products, so that it runs in 16 bits."
                )
        for product in self.fast_accumulation:
            if product not in self.products:
                raise ValueError(
                    f"fast_accumulation names {product!r}, which does not run in FP8: products="
                    f"{self.products}"
                )

    @property
    def adapts(self) -> bool:
        """Whether any exponent moves during training."""
        return any(getattr(self, name).scaling == "adaptive" for name in OPERANDS)

    def __str__(self) -> str:
        if self.name != "custom":
            return self.name
        return ", ".join(f"{name} {getattr(self, name)}" for name in OPERANDS)


_FITTED = Cast(E4M3, "rowwise", power_of_two=True)

_NAMED = {
    "static": Recipe(name="static"),
    "adaptive": Recipe(
        Cast(E4M3, "adaptive"), Cast(E4M3, "adaptive"), Cast(E5M2, "adaptive"), name="adaptive"
    ),
    "tensorwise": Recipe(
        Cast(E4M3, "tensorwise"),
        Cast(E4M3, "tensorwise"),
        Cast(E5M2, "tensorwise"),
        name="tensorwise",
    ),
    # With a multiplier for each row, E4M3 has the range for gradients too, and one more bit.
    "rowwise": Recipe(_FITTED, _FITTED, _FITTED, name="rowwise"),
}


def by_name(recipe: str | Recipe) -> Recipe:
    """The recipe called `recipe`, or `recipe` itself.

    >>> from mixprec import float8
    >>> float8.by_name("static").grad_output.format.name
    'e5m2'
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in _NAMED:
        raise ValueError(
            f"unknown recipe {recipe!r}; use one of {', '.join(map(repr, _NAMED))}, or a "
            "mixprec.float8.Recipe"
        )
    return _NAMED[recipe]
