"""Linear layers whose matrix products run in FP8."""

from mixprec.float8.conversion import (
    EXCLUDED,
    MIN_DIM,
    LayerReport,
    convert,
    enable_fsdp_float8_all_gather,
    revert,
)
from mixprec.float8.linear import Float8Linear
from mixprec.float8.products import has_units
from mixprec.float8.recipe import Cast, Recipe, by_name
from mixprec.float8.stats import Stats, stats

__all__ = [
    "EXCLUDED",
    "MIN_DIM",
    "Cast",
    "Float8Linear",
    "LayerReport",
    "Recipe",
    "Stats",
    "by_name",
    "convert",
    "enable_fsdp_float8_all_gather",
    "has_units",
    "revert",
    "stats",
]
