"""Unit-scaled functions, under the names of `torch.nn.functional`.

Where inputs, weights and incoming gradients have RMS 1, outputs and gradients of inputs have RMS
near 1. Gradients of weights and biases are sums over tokens, of RMS N^1/2; the factor N^-1/2 is
applied once, by the optimizer. Constants depend on the shapes of weights only, so a compiled graph
holds them as numbers; `matmul` and `softmax` alone go by the shapes of activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from mixprec.umup.attention import attention_multiplier, scaled_dot_product_attention
from mixprec.umup.products import conv1d, conv2d, linear, linear_readout, matmul
from mixprec.umup.scaling import Constraint, constrain, interpolate, scale_bwd, scale_fwd

__all__ = [
    "BranchMultipliers",
    "add",
    "attention_multiplier",
    "branch_multipliers",
    "conv1d",
    "conv2d",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_readout",
    "matmul",
    "residual",
    "residual_add",
    "residual_split",
    "residual_taus",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "silu_glu",
    "softmax",
]

# ------------------------------------------------------------------ activations


def gelu(
    x: Tensor,
    *,
    multiplier: float = 1.0,
    approximate: Literal["none", "tanh"] = "none",
    constraint: Constraint | None = "to_output_scale",
) -> Tensor:
    """`F.gelu(multiplier * x) / multiplier`, times a constant that gives it standard deviation 1.

    The constant lies between those of a ReLU (large `multiplier`) and of `x / 2` (small). The
    output has a mean, so its RMS is 1.15 for `multiplier=1`, and that of its
    gradient 1.18 (1 with `constraint=None`).

    Raises:
        ValueError: for a multiplier that is not positive.

    >>> import torch
    >>> from mixprec import umup
    >>> abs(umup.functional.gelu(torch.randn(10000)).std().item() - 1) < 0.1
    True
    """
    place = 1 / (1 + 0.25 / _positive(multiplier) ** 2)
    forward = interpolate(place, 2, _RELU)
    factors = constrain(constraint, forward, interpolate(place, 2, 2**0.5))
    return _elementwise(
        lambda x: F.gelu(multiplier * x, approximate=approximate), x, factors, 1 / multiplier
    )


def silu(
    x: Tensor, *, multiplier: float = 1.0, constraint: Constraint | None = "to_output_scale"
) -> Tensor:
    """`x * sigmoid(multiplier * x)`, times a constant that gives it standard deviation 1.

    The output has a mean, so its RMS is 1.05 for `multiplier=1`, and that of its
    gradient 1.09 (1 with `constraint=None`).

    >>> import torch
    >>> from mixprec import umup
    >>> abs(umup.functional.silu(torch.randn(10000)).std().item() - 1) < 0.1
    True
    """
    forward = interpolate(1 / (1 + 0.25 / _positive(multiplier) ** 2), 2, _RELU)
    factors = constrain(constraint, forward, silu_glu_multiplier(multiplier))
    return _elementwise(lambda x: F.silu(multiplier * x), x, factors, 1 / multiplier)


def silu_glu(x: Tensor, gate: Tensor, *, multiplier: float = 1.0) -> Tensor:
    """`x * gate * sigmoid(multiplier * gate)`, times a constant: the middle of a SwiGLU.

    `x` and `gate` have one shape. One constant serves the output and both gradients.

    >>> import torch
    >>> from mixprec import umup
    >>> round(umup.functional.silu_glu(torch.ones(1), torch.ones(1)).item(), 3)
    1.229
    """
    factor = silu_glu_multiplier(multiplier) / multiplier
    return x * F.silu(multiplier * gate) * factor


def silu_glu_multiplier(multiplier: float = 1.0) -> float:
    """What `x * gate * sigmoid(multiplier * gate)` is multiplied by."""
    return interpolate(1 / (1 + 1 / _positive(multiplier) ** 2), 2, 2**0.5)


def softmax(
    x: Tensor,
    dim: int = -1,
    *,
    multiplier: float = 1.0,
    constraint: Constraint | None = "to_output_scale",
) -> Tensor:
    """`F.softmax(multiplier * x)` along `dim`, times about the number of classes: RMS near 1.

    Its sum is that number and no longer 1. The size of `dim` sets the multiplier.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.softmax(torch.zeros(4)).sum() > 1
    tensor(True)
    """
    size = x.shape[dim]
    if size == 0:
        raise ValueError("softmax over 0 classes; a multiplier for them does not exist")
    place = 1 / (1 + 4 / _positive(multiplier) ** 2)
    # exp(interpolation of logarithms), written as powers, so that a symbolic size may stay one.
    forward = size ** (1 - place / 2)
    factors = constrain(constraint, forward, (size / multiplier) ** (1 - place / 2))
    return _elementwise(lambda x: F.softmax(multiplier * x, dim), x, factors, 1.0)


def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """`(1 - p)^1/2 * F.dropout(x, p)`: RMS 1 while training.

    In evaluation the factor stays, because it is what the output is expected to be in training.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.dropout(torch.ones(1), 0.75, training=False)
    tensor([0.5000])
    """
    return F.dropout(x, p, training, inplace) * (1 - p) ** 0.5


_RELU = (2 / (1 - 1 / math.pi)) ** 0.5
"""Gives the ReLU of a unit normal, whose variance is (1 - 1/pi) / 2, standard deviation 1."""


def _elementwise(
    function: Callable[[Tensor], Tensor], x: Tensor, factors: tuple[float, ...], constant: float
) -> Tensor:
    """`constant * function`, output and gradient multiplied by `factors`."""
    forward, backward = factors
    # The honest product multiplies both directions; only what is left needs a node of its own.
    return function(x if forward == backward else scale_bwd(x, backward / forward)) * (
        forward * constant
    )


def _positive(multiplier: float) -> float:
    if not multiplier > 0:
        raise ValueError(f"multiplier={multiplier}; it sharpens the function and must be positive")
    return multiplier


# ------------------------------------------------------------------ lookups and norms


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """`F.embedding`: rows of a weight of RMS 1 are at unit scale as they are.

    A row is looked up by N / V of N tokens, so its gradient is a sum over few; the factor
    (V / N)^1/2 that makes up for it is the optimizer's, see `param_groups`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.embedding(torch.tensor([1]), torch.eye(2))
    tensor([[0., 1.]])
    """
    return F.embedding(
        indices, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    )


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """`F.layer_norm`, whose output is at unit scale for a weight of 1.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.layer_norm(torch.tensor([5.0, -5.0]), (2,), eps=0.0)
    tensor([ 1., -1.])
    """
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = 1e-5,
) -> Tensor:
    """`F.rms_norm`, whose output is at unit scale for a weight of 1.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.rms_norm(torch.tensor([5.0, -5.0]), (2,), eps=0.0)
    tensor([ 1., -1.])
    """
    return F.rms_norm(x, list(normalized_shape), weight, eps)


# ------------------------------------------------------------------ sums


def add(
    x: Tensor, other: Tensor | float, *, constraint: Constraint | None = "to_output_scale"
) -> Tensor:
    """`2^-1/2 * (x + other)` for independent tensors; `x + other` where either is a number.

    With `constraint=None` the gradient of an input that was broadcast, and so is a sum over n
    elements, is multiplied by n^-1/2 instead.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.add(torch.ones(2), torch.ones(2))
    tensor([1.4142, 1.4142])
    """
    if not isinstance(other, Tensor):
        return x + other
    total = x + other
    if x.numel() == 1 or other.numel() == 1:
        factor = 1.0
    else:
        factor = 2**-0.5
    if constraint == "to_output_scale":
        return total * factor
    counts = (total.numel() / max(tensor.numel(), 1) for tensor in (x, other))
    output, left, right = constrain(constraint, factor, *(count**-0.5 for count in counts))
    return scale_fwd(scale_bwd(x, left) + scale_bwd(other, right), output)


def residual(branch: Callable[[Tensor], Tensor], x: Tensor, multiplier: float) -> Tensor:
    """`x + multiplier * branch(x)`, whose branch sees gradients of unit scale.

    The multiplier of the forward pass stands at the end of the branch, that of the backward pass at
    its beginning, so everything between is at unit scale in both directions; their product is the
    true gradient. The skip path has no multiplier. For branches that begin with a norm, outputs
    and directions of all gradients are those of the tau rule (`residual_split`), at one product
    less. The stream's RMS grows from 1 to (1 + 2 alpha^2)^1/2 where branches end at RMS 1 and are
    independent of each other and of the stream; those that agree make it larger, without bound.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.residual(lambda x: 2 * x, torch.ones(1), 0.25)
    tensor([1.5000])
    """
    return x + scale_fwd(branch(scale_bwd(x, multiplier)), multiplier)


def residual_split(x: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """`x` for the branch and `x` for the skip path; see `residual_add`, which ends the branch.

    Their gradients are multiplied by tau / (1 + tau^2)^1/2 and 1 / (1 + tau^2)^1/2.

    >>> import torch
    >>> from mixprec import umup
    >>> x = torch.ones(1, requires_grad=True)
    >>> branch, skip = umup.functional.residual_split(x, tau=0.75)
    >>> (branch + skip).backward()
    >>> round(x.grad.item(), 6)  # 0.6 + 0.8
    1.4
    """
    norm = (1 + tau**2) ** 0.5
    return scale_bwd(x, tau / norm), scale_bwd(x, 1 / norm)


def residual_add(branch: Tensor, skip: Tensor, tau: float) -> Tensor:
    """`(tau * branch + skip) / (1 + tau^2)^1/2`: unit scale for independent summands of unit scale.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.residual_add(torch.ones(1), torch.ones(1), tau=0.75)
    tensor([1.4000])
    """
    norm = (1 + tau**2) ** 0.5
    return scale_fwd(branch, tau / norm) + scale_fwd(skip, 1 / norm)


class BranchMultipliers(NamedTuple):
    """The two constants of a transformer layer's branches."""

    attention: float
    mlp: float


def _alphas(multiplier: float, attention_ratio: float) -> BranchMultipliers:
    mlp = multiplier * (2 / (1 + attention_ratio**2)) ** 0.5
    return BranchMultipliers(attention_ratio * mlp, mlp)


def residual_taus(
    num_layers: int, multiplier: float = 1.0, attention_ratio: float = 1.0
) -> list[float]:
    """tau of the 2 `num_layers` branches of a transformer, attention and MLP in turn.

    Each adds the same share to the stream, and the average of attention's and MLP's shares has
    `multiplier` times the scale of the embedding.

    Source: arXiv:2407.17465, appendix G.2.2.

    >>> from mixprec import umup
    >>> [round(tau, 3) for tau in umup.functional.residual_taus(1)]
    [1.0, 0.707]
    """
    alphas = _alphas(multiplier, attention_ratio)
    return [
        alphas[index % 2]
        / (num_layers + (index + 1) // 2 * alphas[0] ** 2 + index // 2 * alphas[1] ** 2) ** 0.5
        for index in range(2 * num_layers)
    ]


def branch_multipliers(
    num_layers: int,
    multiplier: float = 1.0,
    attention_ratio: float = 1.0,
    depth_rule: Literal["sqrt", "completep"] = "sqrt",
) -> BranchMultipliers:
    """The multipliers for `residual` in a transformer of `num_layers` layers.

    "sqrt" is alpha / L^1/2, the tau rule in its one-multiplier form; "completep" is alpha / L,
    under which learning rates need no depth factor (arXiv:2505.01618).

    Raises:
        ValueError: for fewer than 1 layer and for an unknown rule.

    >>> from mixprec import umup
    >>> umup.functional.branch_multipliers(4)
    BranchMultipliers(attention=0.5, mlp=0.5)
    """
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers}; a stack has 1 layer or more")
    powers = {"sqrt": 0.5, "completep": 1.0}
    if depth_rule not in powers:
        raise ValueError(f"depth_rule={depth_rule!r}; use 'sqrt' or 'completep'")
    share = num_layers ** -powers[depth_rule]
    return BranchMultipliers(*(alpha * share for alpha in _alphas(multiplier, attention_ratio)))
