"""Unit-scaled modules: those of `torch.nn`, with other multipliers, initial values and a role.

Each is a subclass of its counterpart, so whatever looks for an `nn.Linear` (tensor-parallel plans,
quantisers, adapters) finds one. A module says which role each of its own parameters plays, in
`umup_roles`; nothing is written on tensors, because sharding, `to_empty` and assigning a state dict
all replace those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixprec.umup import functional
from mixprec.umup.roles import Role
from mixprec.umup.scaling import Constraint

__all__ = [
    "GELU",
    "Conv1d",
    "Conv2d",
    "DepthModuleList",
    "DepthSequential",
    "Dropout",
    "Embedding",
    "LayerNorm",
    "Linear",
    "LinearReadout",
    "RMSNorm",
    "SiLU",
    "Softmax",
]

_Device = torch.device | str | None


class Linear(nn.Linear):
    """`nn.Linear` by `functional.linear`; weight N(0, 1), bias 0.

    Args:
        role: "hidden", or "input" for the layer that reads data of fixed width.
        constraint, multiplier, output_multiplier: see `functional.linear`.

    >>> import torch
    >>> from mixprec import umup
    >>> layer = umup.layers.Linear(256, 1024)
    >>> abs(layer(torch.randn(64, 256)).std().item() - 1) < 0.1
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        role: Literal["hidden", "input"] = "hidden",
        constraint: Constraint | None = "to_output_scale",
        multiplier: float = 1.0,
        output_multiplier: float = 1.0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if role not in ("hidden", "input"):
            raise ValueError(
                f"role={role!r}; a Linear is 'hidden' or 'input', and a LinearReadout is the output"
            )
        _check_fans(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.umup_roles = {"weight": role, "bias": "bias"}
        self.constraint: Constraint | None = constraint
        self.multiplier = multiplier
        self.output_multiplier = output_multiplier

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(
            input,
            self.weight,
            self.bias,
            constraint=self.constraint,
            multiplier=self.multiplier,
            output_multiplier=self.output_multiplier,
        )


class LinearReadout(nn.Linear):
    """The output layer, by `functional.linear_readout`; weight N(0, 1), bias 0.

    To tie it, assign: `readout.weight = embedding.weight`.

    >>> import torch
    >>> from mixprec import umup
    >>> layer = umup.layers.LinearReadout(256, 1000)
    >>> abs(layer(torch.randn(64, 256)).std().item() * 256**0.5 - 1) < 0.1
    True
    """

    umup_roles: ClassVar[Mapping[str, Role]] = {"weight": "output", "bias": "bias"}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        constraint: Constraint | None = None,
        multiplier: float = 1.0,
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_fans(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.constraint: Constraint | None = constraint
        self.multiplier = multiplier

    def reset_parameters(self) -> None:
        _reset(self)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear_readout(
            input,
            self.weight,
            self.bias,
            constraint=self.constraint,
            multiplier=self.multiplier,
        )


class Embedding(nn.Embedding):
    """`nn.Embedding` with weight N(0, 1), which is at unit scale already.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.Embedding(50, 16)(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 16])
    """

    umup_roles: ClassVar[Mapping[str, Role]] = {"weight": "embedding"}


class _Conv:
    """What the two convolutions share."""

    umup_roles: ClassVar[Mapping[str, Role]] = {"weight": "hidden", "bias": "bias"}
    constraint: Constraint | None

    def reset_parameters(self) -> None:
        _reset(self)

    def _convolve(self, convolve: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        module: Any = self
        padding = module.padding
        if module.padding_mode != "zeros":
            around = module._reversed_padding_repeated_twice
            input = nn.functional.pad(input, around, mode=module.padding_mode)
            padding = 0
        return convolve(
            input,
            weight,
            bias,
            module.stride,
            padding,
            module.dilation,
            module.groups,
            constraint=self.constraint,
        )


class Conv1d(_Conv, nn.Conv1d):
    """`nn.Conv1d` by `functional.conv1d`; weight N(0, 1), bias 0. Takes a `constraint` by name.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.Conv1d(2, 3, 3, padding=1, padding_mode="circular")(torch.ones(1, 2, 8)).shape
    torch.Size([1, 3, 8])
    """

    def __init__(
        self, *args: Any, constraint: Constraint | None = "to_output_scale", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.constraint = constraint

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(functional.conv1d, input, weight, bias)


class Conv2d(_Conv, nn.Conv2d):
    """`nn.Conv2d` by `functional.conv2d`; weight N(0, 1), bias 0. Takes a `constraint` by name.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.Conv2d(2, 3, 3, stride=2)(torch.ones(1, 2, 9, 9)).shape
    torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self, *args: Any, constraint: Constraint | None = "to_output_scale", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.constraint = constraint

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(functional.conv2d, input, weight, bias)


def _check_fans(in_features: int, out_features: int) -> None:
    if in_features < 1 or out_features < 1:
        raise ValueError(
            f"in_features={in_features}, out_features={out_features}: a fan of zero would need the "
            f"multiplier 0^-1/2. Leave this layer out."
        )


@torch.no_grad()
def _reset(module: Any) -> None:
    module.weight.normal_()
    if module.bias is not None:
        module.bias.zero_()


# ------------------------------------------------------------------ norms and activations


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm`, which is at unit scale as it is.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.LayerNorm(2, eps=0.0)(torch.tensor([5.0, -5.0])).tolist()
    [1.0, -1.0]
    """

    umup_roles: ClassVar[Mapping[str, Role]] = {"weight": "norm", "bias": "bias"}


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm`, which is at unit scale as it is; `eps` is 1e-5 unless said otherwise.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.RMSNorm(2, eps=0.0)(torch.tensor([5.0, -5.0])).tolist()
    [1.0, -1.0]
    """

    umup_roles: ClassVar[Mapping[str, Role]] = {"weight": "norm"}

    def __init__(
        self, normalized_shape: int | Sequence[int], eps: float | None = 1e-5, **options: Any
    ) -> None:
        shape = normalized_shape if isinstance(normalized_shape, int) else list(normalized_shape)
        super().__init__(shape, eps, **options)


class GELU(nn.GELU):
    """`functional.gelu`.

    >>> from mixprec import umup
    >>> umup.layers.GELU(multiplier=2.0).multiplier
    2.0
    """

    def __init__(
        self,
        approximate: Literal["none", "tanh"] = "none",
        *,
        multiplier: float = 1.0,
        constraint: Constraint | None = "to_output_scale",
    ) -> None:
        super().__init__(approximate)
        self.multiplier = multiplier
        self.constraint: Constraint | None = constraint

    def forward(self, input: Tensor) -> Tensor:
        approximate: Any = self.approximate
        return functional.gelu(
            input,
            multiplier=self.multiplier,
            approximate=approximate,
            constraint=self.constraint,
        )


class SiLU(nn.Module):
    """`functional.silu`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.SiLU()(torch.zeros(1))
    tensor([0.])
    """

    def __init__(
        self, *, multiplier: float = 1.0, constraint: Constraint | None = "to_output_scale"
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.constraint: Constraint | None = constraint

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(input, multiplier=self.multiplier, constraint=self.constraint)


class Softmax(nn.Module):
    """`functional.softmax`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.Softmax()(torch.zeros(2, 4)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        dim: int = -1,
        *,
        multiplier: float = 1.0,
        constraint: Constraint | None = "to_output_scale",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.multiplier = multiplier
        self.constraint: Constraint | None = constraint

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(
            input, self.dim, multiplier=self.multiplier, constraint=self.constraint
        )


class Dropout(nn.Dropout):
    """`functional.dropout`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.layers.Dropout(0.75).eval()(torch.ones(1))
    tensor([0.5000])
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, self.training, self.inplace)


# ------------------------------------------------------------------ depth


class DepthModuleList(nn.ModuleList):
    """The layers of a residual stack: each has the length of this list as its depth.

    A layer is a transformer layer, or one residual branch. What is not inside residual branches
    (the readout, the final norm) stays outside.

    >>> from mixprec import umup
    >>> stack = umup.layers.DepthModuleList([umup.layers.Linear(4, 4) for _ in range(9)])
    >>> umup.spec(stack)["0.weight"].depth
    9
    """

    @property
    def umup_depth(self) -> int:
        return len(self)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()


class DepthSequential(nn.Sequential):
    """The layers of a residual stack, called one after the other; see `DepthModuleList`.

    >>> from mixprec import umup
    >>> umup.layers.DepthSequential(umup.layers.Linear(4, 4)).umup_depth
    1
    """

    @property
    def umup_depth(self) -> int:
        return len(self)
