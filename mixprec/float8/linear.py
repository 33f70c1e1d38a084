"""A linear layer whose matrix products run in FP8, forward and backward.

    output      = (x8 @ W8.T) / (sx sW) + bias
    grad_input  = (dY8 @ W8) / (sdY sW)
    grad_weight = (dY8.T @ x8) / (sdY sx)

x is cast once, to x8 and its transpose, and kept for the backward pass as the transpose, in one
byte a value. dY is cast once too, for both of its products. Factors are powers of two or belong to
whole rows, and they multiply in the product itself. Tokens are padded to a multiple of 16 with
zeros, which add nothing to a sum.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixprec.autograd import call
from mixprec.devices import is_capturing
from mixprec.float8.casts.cast import Operand8
from mixprec.float8.operand import Operand
from mixprec.float8.products import scaled_product
from mixprec.float8.recipe import OPERANDS, Recipe
from mixprec.float8.sharded.all_gather import ByteGather, GatheredWeight
from mixprec.float8.sharded.tensor_parallel import Shards
from mixprec.float8.weight import CachedWeight
from mixprec.gradients import is_dtensor

__all__ = ["Float8Layer", "Float8Linear", "Float8State", "float8_linear"]


class Float8Layer(nn.Linear):
    """What layers of both kinds share: the state of their casts, which no state dict shows."""

    reverts_to: ClassVar[type[nn.Linear]]
    _float8: Float8State

    def _apply(self, fn: Any, recurse: bool = True) -> Float8Layer:
        super()._apply(fn, recurse)
        weight = self._float8.weight
        (weight.put if is_dtensor(self.weight) else weight.allocate)(self.weight)
        if not self.weight.is_meta:  # a compiled pass moves nothing
            for operand in self._float8.operands().values():
                operand.move_to(self.weight.device)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            _refuse_quantized(self, param)
        super().register_parameter(name, param)
        if name == "weight" and param is not None:
            self._float8.weight.put(param)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(_NOT_FOR_JIT)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._float8.weight.replaced()

    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2 puts parameters into a module past `register_parameter` unless this is overridden.
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, float8={self._float8.recipe}"


class Float8Linear(Float8Layer):
    """`nn.Linear` in FP8. Made by `Precision("fp8").convert(model)`, not by a constructor."""

    reverts_to = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return float8_linear(input, self.weight, self.bias, self._float8, training=self.training)


class Float8State:
    """What a layer holds to cast its three operands."""

    def __init__(self, recipe: Recipe, weight: Tensor) -> None:
        self.recipe = recipe
        device = torch.device("cpu") if weight.is_meta else weight.device
        self.input, of_weight, self.grad_output = (
            Operand(getattr(recipe, name), device, inline=recipe.inline) for name in OPERANDS
        )
        self.weight = CachedWeight(of_weight, weight)

    def gather_bytes(self) -> bool:
        """Have FSDP2 gather the weight in FP8, if both its products can take it so."""
        plan = self.recipe.weight
        if not plan.has_exponent or not {"output", "grad_input"} <= set(self.recipe.products):
            return False
        self.weight.by_bytes = ByteGather(self.weight.operand)
        return True

    def operands(self) -> dict[str, Operand]:
        """The three operands by name."""
        return {
            "input": self.input,
            "weight": self.weight.operand,
            "grad_output": self.grad_output,
        }


class Multipliers(NamedTuple):
    """Constants in the products, all 1 in a plain layer."""

    output: float = 1.0
    grad_input: float = 1.0
    bias: float = 1.0


_NO_MULTIPLIERS = Multipliers()


def float8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Float8State,
    multipliers: Multipliers = _NO_MULTIPLIERS,
    *,
    training: bool,
) -> Tensor:
    """`F.linear(input, weight, bias)` by the recipe of `state`.

    Args:
        input: `[..., in_features]`, BF16, FP16 or FP32; any number of tokens, or none. A DTensor if
            `weight` is one.
        weight: `[out_features, in_features]`, both multiples of 16, of the dtype of `input` unless
            autocast is on. A DTensor is multiplied shard by shard, see `Shards`.
        bias: `[out_features]`, of the dtype of `weight`.
        training: the mode of the layer. The cast of `weight` serves later calls where this is true
            and a backward pass may follow.

    Returns:
        `[..., out_features]` in the dtype of `input`, or in that of autocast.

    Raises:
        TypeError: for an input of another dtype, or a DTensor where `weight` is none.
        ValueError: for a DTensor whose shards are no multiples of 16.
    """
    if not (is_dtensor(weight) or is_dtensor(input)):
        return _linear(input, weight, bias, state, multipliers, training, input, weight)
    shards = Shards(input, weight, bias)
    operands = shards.input, shards.weight, shards.bias
    sources = shards.input_source, shards.weight_source
    return shards.result(_linear(*operands, state, multipliers, training, *sources))


def _linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Float8State,
    multipliers: Multipliers,
    training: bool,
    input_source: Tensor,
    weight_source: Tensor,
) -> Tensor:
    """`float8_linear` of plain tensors, by casts of the sources: the same values, no views."""
    if torch.jit.is_tracing():
        raise RuntimeError(_NOT_FOR_JIT)
    dtype = _dtype_of_output(input, weight)
    matrix = input.reshape(-1, input.shape[-1])
    held = [tensor for tensor in (input, weight, bias) if tensor is not None]
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in held)
    for_weight = recorded and weight.requires_grad
    products = state.recipe.products
    with torch.no_grad():
        x8 = _cast_input(
            state,
            input_source,
            matrix,
            rows="output" in products,
            cols=for_weight and "grad_weight" in products,
        )
        factors = multipliers.output, multipliers.grad_input
        w8 = state.weight(weight_source, *factors, keep=training and recorded)
    dy = state.grad_output
    if not torch.compiler.is_compiling():
        dy.move_to(input.device)
    traced = dy.scale, dy.counters, state.weight.operand.scale
    arguments = *_once(x8), *_once(w8), *traced, state, multipliers, dtype
    output: Tensor = call(_Float8Linear, matrix, weight, bias, *arguments)
    return output.view(*input.shape[:-1], weight.shape[0])


def _once(operand: Operand8) -> Operand8:
    """Without the same tensor twice, which the compiler does not take."""
    one = operand.col_scale is operand.row_scale
    return operand._replace(col_scale=None) if one else operand


class _Float8Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_rows: Tensor | None,
        x_cols: Tensor | None,
        x_row_scale: Tensor,
        x_col_scale: Tensor | None,
        w_rows: Tensor,
        w_cols: Tensor | None,
        w_row_scale: Tensor,
        w_col_scale: Tensor | None,
        dy_scale: Tensor,
        dy_counters: Tensor,
        w_scale: Tensor,
        state: Float8State,
        multipliers: Multipliers,
        dtype: torch.dtype,
    ) -> Tensor:
        products = state.recipe.products
        if w_cols is not None and w_col_scale is None:
            w_col_scale = w_row_scale
        ctx.save_for_backward(
            x_cols if "grad_weight" in products else x,
            x_row_scale if x_col_scale is None else x_col_scale,
            weight if w_cols is None or "grad_input" not in products else w_cols,
            w_col_scale,
            # Only the compiler needs them here. Autograd would not let the exponent move before
            # the backward pass, and dY may well be cast by the newest.
            *((dy_scale, dy_counters, w_scale) if torch.compiler.is_compiling() else ()),
        )
        ctx.state, ctx.multipliers, ctx.casts_late = state, multipliers, w_cols is None
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        # As autograd does, so that nothing lives longer for it.
        ctx.leaves = None if torch.compiler.is_compiling() else (_leaf(weight), _leaf(bias))
        if bias is not None:
            bias = bias.to(dtype)
            bias = bias if multipliers.bias == 1 else bias * multipliers.bias
        if x_rows is None:
            return _in_16_bits(x.to(dtype), weight.to(dtype).t(), multipliers.output, bias)
        fast = "output" in state.recipe.fast_accumulation
        return scaled_product(x_rows, w_rows, x_row_scale, w_row_scale, bias, dtype, fast)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            _refuse_second_derivative()
        x, x_scale, w, w_scale, *traced = ctx.saved_tensors
        state: Float8State = ctx.state
        products, fast = state.recipe.products, state.recipe.fast_accumulation
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if not compiling:
            weight_dtype = _dtype_of_gradient(ctx.leaves[0], weight_dtype)
            bias_dtype = _dtype_of_gradient(ctx.leaves[1], bias_dtype)
        dy, dx, dweight, dbias = grads[0], None, None, None
        wanted = {
            "rows": for_x and "grad_input" in products,
            "cols": for_weight and "grad_weight" in products,
        }
        cast = state.grad_output.traced if compiling else state.grad_output
        dy8 = cast(dy, *traced[:2], **wanted)
        if dy8.rows is not None:
            if ctx.casts_late:
                w, w_scale = state.weight.late_cols(w, dy, ctx.multipliers.grad_input, *traced[2:])
            dx = scaled_product(
                dy8.rows, w, dy8.row_scale, w_scale, None, x_dtype, "grad_input" in fast
            )
        elif for_x:
            dx = _in_16_bits(dy, w.to(dy.dtype), ctx.multipliers.grad_input, None).to(x_dtype)
        if dy8.cols is not None:
            dweight = scaled_product(
                dy8.cols, x, dy8.col_scale, x_scale, None, weight_dtype, "grad_weight" in fast
            )
        elif for_weight:
            dweight = (dy.t() @ x.to(dy.dtype)).to(weight_dtype)
        if for_bias:
            dbias = dy.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dweight, dbias, *[None] * 14


def _in_16_bits(left: Tensor, right: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    """A product that the recipe leaves as it is."""
    product = left @ right
    product = product if alpha == 1 else product * alpha
    return product if bias is None else product + bias


def _dtype_of_output(input: Tensor, weight: Tensor) -> torch.dtype:
    device = input.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    if input.dtype != weight.dtype:
        raise TypeError(
            f"input is {input.dtype} but weight is {weight.dtype}. A Float8Linear casts both to 8 "
            f"bits itself, and returns the dtype of its input: give it input.to({weight.dtype}), "
            "or turn on torch.autocast"
        )
    return input.dtype


_NOT_FOR_JIT = (
    "torch.jit cannot hold a layer that runs in FP8: a trace would keep the scales and counters of "
    "this call. Call Precision.revert(model) first, which gives the same parameters in 16 bits, or "
    "use torch.compile."
)


def _refuse_quantized(layer: nn.Module, weight: Tensor | None) -> None:
    """What puts a weight into a layer that is no plain tensor has a way of its own to multiply."""
    if weight is None or is_dtensor(weight) or isinstance(weight, GatheredWeight):
        return
    if is_traceable_wrapper_subclass(weight):
        kind = type(weight.data).__name__
        raise TypeError(
            f"the weight that was given to {layer} is a {kind}, which multiplies in its own way, "
            "and this layer casts its weight to FP8 itself. To quantize the model otherwise, as "
            "torchao.quantize_ does, call Precision.revert(model) first."
        )


def _leaf(param: Tensor | None) -> Tensor | None:
    return param if param is not None and param.is_leaf else None


def _dtype_of_gradient(param: Tensor | None, otherwise: Any) -> Any:
    """FP32 for a 16-bit leaf whose gradients are summed in it: a product or sum has more digits.

    Asked in the backward pass: micro-batches may begin to be summed after their forward pass.
    """
    return getattr(param, "grad_dtype", None) or otherwise


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "a Float8Linear has no second derivative, and create_graph=True asks for one. Revert "
            "its model with Precision.revert for a loss that needs it."
        )


# ------------------------------------------------------------------ one cast for siblings


class _LastCast(NamedTuple):
    tensor: weakref.ref[Tensor]
    version: int
    captured: bool
    operand: Operand
    made: Operand8


_last: list[_LastCast] = []


def _cast_input(
    state: Float8State, input: Tensor, matrix: Tensor, *, rows: bool, cols: bool
) -> Operand8:
    """`matrix`, a view of `input`, in FP8: as a sibling has just cast it, if one has."""
    if torch.compiler.is_compiling() or input.is_inference():
        return state.input(matrix, rows=rows, cols=cols)
    captured = is_capturing(input.device)
    last = next(iter(_last), None)  # once: another thread may put its own there
    if last and _is_of(last, input, captured) and _siblings(state, last.operand):
        made = last.made
        if not (rows and made.rows is None) and not (cols and made.cols is None):
            return made
    made = state.input(matrix, rows=rows, cols=cols)
    made_of = weakref.ref(input), input._version, captured
    _last[:] = [_LastCast(*made_of, state.input, made)]
    return made


def _is_of(last: _LastCast, input: Tensor, captured: bool) -> bool:
    """Whether `last` was made of `input` as it is; in a CUDA graph, by that same graph.

    What a graph replays must not rest on a cast that it does not hold. An input that came from
    outside may have been cast there, one that the graph computes has been born in it.
    """
    if last.tensor() is not input or last.version != input._version:
        return False
    return last.captured == captured and not (captured and input.grad_fn is None)


def _siblings(state: Float8State, operand: Operand) -> bool:
    """Whether `operand` casts as that of `state`; in a first step, adaptive ones become one."""
    own = state.input
    if own is operand:
        return True
    if own.cast != operand.cast:
        return False
    if own.cast.scaling != "adaptive":
        return True
    if own.settled or operand.settled or own.given != operand.given:
        return False
    state.input = operand
    return True
