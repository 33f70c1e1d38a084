"""A unit-scaled linear layer in FP8: its multipliers go into the scales of its weight."""

from __future__ import annotations

from torch import Tensor

from mixprec.float8.linear import Float8Layer, Multipliers, float8_linear
from mixprec.umup.layers import Linear
from mixprec.umup.products import linear_multipliers

__all__ = ["Float8UnitLinear"]


class Float8UnitLinear(Float8Layer, Linear):
    """`umup.layers.Linear` in FP8. Made by `Precision("fp8").convert(model)`."""

    reverts_to = Linear

    def forward(self, input: Tensor) -> Tensor:
        forward, backward = linear_multipliers(
            self.out_features, self.in_features, self.constraint, self.multiplier
        )
        output = self.output_multiplier
        multipliers = Multipliers(output * forward, backward, output)
        held = self.weight, self.bias, self._float8
        return float8_linear(input, *held, multipliers, training=self.training)
