"""Unit-scaled products: linear, matmul and convolutions, their multipliers inside the product.

    y  = A (x @ W.T) + b         A  = fan_in^-1/2     (readout: 1 / fan_in)
    dx = B (dy @ W)              B  = fan_out^-1/2, or A where the edge is no cut edge
    dW = dy.T @ x                the sum over tokens, at no factor of A

A matrix product multiplies its result by a constant for free, so one autograd node with the
original x and W replaces the three passes and the scaled copies of x and W that composing `scale_*`
would cost. The bias is added after A: inside, its effect on the output would fall with the width,
by fan_in^-1/2 (readout: 1 / fan_in), and no learning rate rule would mend both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function

from mixprec.autograd import call
from mixprec.umup.scaling import Constraint, constrain, scale_bwd, scale_fwd

__all__ = ["conv1d", "conv2d", "linear", "linear_multipliers", "linear_readout", "matmul"]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    constraint: Constraint | None = "to_output_scale",
    multiplier: float = 1.0,
    output_multiplier: float = 1.0,
) -> Tensor:
    """`fan_in^-1/2 * x @ weight.T + bias`, with unit-scaled gradients.

    Args:
        x: `[..., fan_in]`, RMS 1.
        weight: `[fan_out, fan_in]`, RMS 1, of the dtype of `x`. Under autocast both are cast.
        bias: `[fan_out]`, added after the multiplier.
        constraint: how the multipliers of output and input gradient are reconciled. None is for
            cut edges, such as a layer that nothing bypasses.
        multiplier: multiplies the product in both directions, to make up for an `x` whose RMS is
            1 / multiplier.
        output_multiplier: multiplies product and bias in the forward pass only: the end of a
            residual branch, whose beginning multiplies the gradient (see `residual`).

    Returns:
        `[..., fan_out]` in the dtype of `x`. Gradients of weight and bias are sums over tokens;
        the factor N^-1/2 is the optimizer's, see `param_groups`.

    Raises:
        ValueError: for shapes that do not fit and a fan of zero.

    >>> import torch
    >>> from mixprec import umup
    >>> x, weight = torch.ones(1, 4), torch.ones(2, 4)
    >>> umup.functional.linear(x, weight, torch.ones(2))  # 4^-1/2 * 4 + 1
    tensor([[3., 3.]])
    """
    forward, backward = linear_multipliers(*_fans(x, weight), constraint, multiplier)
    return _linear(x, weight, bias, forward, backward, float(output_multiplier))


def linear_multipliers(
    fan_out: int, fan_in: int, constraint: Constraint | None, multiplier: float
) -> tuple[float, float]:
    """What `linear` multiplies `x @ weight.T` and its input gradient by."""
    forward, backward = constrain(constraint, fan_in**-0.5, fan_out**-0.5)
    return multiplier * forward, multiplier * backward


def linear_readout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    constraint: Constraint | None = None,
    multiplier: float = 1.0,
) -> Tensor:
    """`x @ weight.T / fan_in + bias`: logits that begin near 0, of RMS `fan_in^-1/2`.

    Its input gradient has unit scale all the same, because a readout is a cut edge. See `linear`
    for the arguments; `multiplier` sharpens logits in the forward pass only, as in the u-muP paper.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.linear_readout(torch.ones(1, 4), torch.ones(2, 4))
    tensor([[1., 1.]])
    """
    fan_out, fan_in = _fans(x, weight)
    forward, backward = constrain(constraint, 1 / fan_in, fan_out**-0.5)
    return _linear(x, weight, bias, multiplier * forward, backward, 1.0)


def matmul(
    left: Tensor, right: Tensor, *, constraint: Constraint | None = "to_output_scale"
) -> Tensor:
    """`inner^-1/2 * left @ right` for two activations.

    They are `[..., rows, inner]` and `[..., inner, cols]`; leading axes broadcast. With
    `constraint=None` the gradient of `left` is multiplied by `cols^-1/2` and that of `right` by
    `rows^-1/2`.

    Raises:
        ValueError: for operands of fewer than two axes and for a size of zero.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.matmul(torch.ones(1, 4), torch.ones(4, 1))
    tensor([[2.]])
    """
    if left.ndim < 2 or right.ndim < 2:
        raise ValueError(
            f"matmul got shapes {list(left.shape)} and {list(right.shape)}; both need two axes "
            f"or more, because a vector has no size that could set the scale of a gradient"
        )
    rows, inner, cols = left.shape[-2], left.shape[-1], right.shape[-1]
    for name, size in (("rows", rows), ("inner size", inner), ("columns", cols)):
        if size == 0:
            raise ValueError(f"matmul has 0 {name}, and a multiplier of 0^-1/2 is infinite")
    left, right = _operands(left, right)
    product: Tensor = call(
        _Matmul, left, right, *constrain(constraint, inner**-0.5, cols**-0.5, rows**-0.5)
    )
    return product


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    constraint: Constraint | None = "to_output_scale",
) -> Tensor:
    """`fan_in^-1/2 * F.conv1d(x, weight) + bias`, fan_in = channels per group times kernel size.

    The gradient of the input is multiplied by `(stride * groups / (out_channels * kernel))^1/2`
    before the constraint. Zero padding makes outputs at the edges smaller; they are left so.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.conv1d(torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    tensor([[[2.]]])
    """
    return _conv(F.conv1d, x, weight, bias, stride, padding, dilation, groups, constraint)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    constraint: Constraint | None = "to_output_scale",
) -> Tensor:
    """`fan_in^-1/2 * F.conv2d(x, weight) + bias`; see `conv1d`.

    >>> import torch
    >>> from mixprec import umup
    >>> umup.functional.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    tensor([[[[2.]]]])
    """
    return _conv(F.conv2d, x, weight, bias, stride, padding, dilation, groups, constraint)


# ------------------------------------------------------------------ linear


def _fans(x: Tensor, weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {list(x.shape)} but weight is {list(weight.shape)}; weight must be "
            f"[fan_out, fan_in] with fan_in the last size of x"
        )
    fan_out, fan_in = weight.shape
    if fan_in == 0 or fan_out == 0:
        raise ValueError(
            f"weight is [{fan_out}, {fan_in}]: a fan of zero would need the multiplier 0^-1/2. "
            f"Leave this layer out."
        )
    return fan_out, fan_in


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    forward: float,
    backward: float,
    output_multiplier: float,
) -> Tensor:
    x, weight, *rest = _operands(x, weight, *([] if bias is None else [bias]))
    bias = rest[0] if rest else None
    y: Tensor = call(_Linear, x, weight, bias, forward, backward, output_multiplier)
    return y


def _operands(*tensors: Tensor) -> Sequence[Tensor]:
    """What the product is taken of: cast as autocast would, where it is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]


def _times(alpha: float, left: Tensor, right: Tensor) -> Tensor:
    """`alpha * left @ right` of matrices: one rounding and no pass of its own."""
    return torch.addmm(left.new_empty(()), left, right, beta=0.0, alpha=alpha)


class _Linear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        forward: float,
        backward: float,
        output_multiplier: float,
    ) -> Tensor:
        rows, columns = x.reshape(-1, x.shape[-1]), weight.t()
        if bias is None:
            y = _times(output_multiplier * forward, rows, columns)
        else:
            alpha = output_multiplier * forward
            y = torch.addmm(bias, rows, columns, beta=output_multiplier, alpha=alpha)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.backward_multiplier = inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _times(ctx.backward_multiplier, dy, weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = dy.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None, None, None


# ------------------------------------------------------------------ matmul


def _batched(alpha: float, left: Tensor, right: Tensor) -> Tensor:
    """`alpha * left @ right` with leading axes that broadcast."""
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = left.expand(*batch, -1, -1), right.expand(*batch, -1, -1)
    rows, cols = left.shape[-2], right.shape[-1]
    product = torch.baddbmm(
        left.new_empty(1, 1, 1),
        left.reshape(-1, rows, left.shape[-1]),
        right.reshape(-1, right.shape[-2], cols),
        beta=0.0,
        alpha=alpha,
    )
    return product.view(*batch, rows, cols)


class _Matmul(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        left: Tensor, right: Tensor, output: float, left_grad: float, right_grad: float
    ) -> Tensor:
        return _batched(output, left, right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.left_grad, ctx.right_grad = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        dy, dleft, dright = grads[0], None, None
        if ctx.needs_input_grad[0]:
            dleft = _batched(ctx.left_grad, dy, right.transpose(-2, -1)).sum_to_size(left.shape)
        if ctx.needs_input_grad[1]:
            dright = _batched(ctx.right_grad, left.transpose(-2, -1), dy).sum_to_size(right.shape)
        return dleft, dright, None, None, None


# ------------------------------------------------------------------ convolutions


def _conv(
    convolve: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
    constraint: Constraint | None,
) -> Tensor:
    out_channels, kernel = weight.shape[0], math.prod(weight.shape[2:])
    fan_in = weight.shape[1] * kernel
    if fan_in == 0 or out_channels == 0:
        raise ValueError(
            f"weight is {list(weight.shape)}: a fan of zero would need the multiplier 0^-1/2. "
            f"Leave this layer out."
        )
    steps = [stride] * (weight.ndim - 2) if isinstance(stride, int) else stride
    towards_input = (math.prod(steps) * groups / (out_channels * kernel)) ** 0.5
    forward, backward = constrain(constraint, fan_in**-0.5, towards_input)
    # A convolution takes no multiplier. The weight is the smallest tensor at hand: multiplied
    # forward only, it brings `forward` into output and input gradient and leaves its own alone.
    x = scale_bwd(x, backward / forward)
    y: Tensor = convolve(x, scale_fwd(weight, forward), bias, stride, padding, dilation, groups)
    return y
