"""Cross entropy of an output layer, without its logits and with the gradient of the sum.

At V = 128256 the logits of 8192 tokens are 2 GB in BF16, 4 GB in FP32, and autograd saves them. But
a loss is a sum over tokens, so a chunk of logits can be made, turned into its own gradient,
multiplied into the gradients of hidden states and weight, and forgotten:

    dlogits = softmax - onehot,    dhidden = dlogits @ weight,    dweight += dlogits.T @ hidden

All of it happens in the forward pass; the backward pass multiplies by the one number that was not
known then. The price: gradients that nobody asks for are computed too, and dhidden and dweight are
held from forward to backward. `recompute=True` trades both for a second product with the weight.

The sum and the number of tokens are returned apart. A mean would put 1/T on every target, which 16
bits round by up to 0.4 %, the same way for each; `softmax - onehot` has -1 there.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function
from typing_extensions import Unpack

from mixprec.cross_entropy.checks import (
    check_options,
    check_shapes,
    check_targets_options,
    check_tensors,
    dtype_of_logits,
    operand_dtype,
    refuse_transforms,
)
from mixprec.cross_entropy.chunks import default_chunk_size, losses_and_gradients
from mixprec.cross_entropy.output_layer import weight_and_bias
from mixprec.cross_entropy.softmax import twin
from mixprec.cross_entropy.vocab_shard import local_shard, say_refused, sharing_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearCrossEntropy", "LossDetails", "linear_cross_entropy"]


class LossDetails(NamedTuple):
    """What else a pass over the logits knows of each target; for logs, so nothing has a gradient.

    Of the logits that the loss saw, after multiplier, bias and softcap. A vocabulary spread over
    ranks gives every rank the same. The accuracy is `correct.sum() / num_tokens`.
    """

    logsumexp: Tensor
    """Of the logits, in nats; FP32 (FP64 for FP64), the shape of `targets`, 0 at padding."""
    argmax: Tensor
    """Class of the largest logit, the first of several; int64, like `targets`, -1 at padding."""
    correct: Tensor
    """Whether that is the target; bool, like `targets`, False at padding."""
    z_loss: Tensor
    """The part of the summed loss that is `z_loss * logsumexp ** 2`; 0-d."""
    weight_sum: Tensor
    """Of the targets that are no padding the sum of `class_weight` times `token_weight`; 0-d.

    Divided by it a loss is the mean of `F.cross_entropy(..., weight=class_weight)`.
    """


class _Given(TypedDict, total=False):
    """What `linear_cross_entropy` takes by name, for both of its signatures."""

    bias: Tensor | None
    ignore_index: int
    label_smoothing: float
    class_weight: Tensor | None
    token_weight: Tensor | None
    logit_multiplier: float
    softcap: float | None
    z_loss: float
    reduction: Literal["sum", "none"]
    recompute: bool
    logits_dtype: torch.dtype | None
    chunk_size: int | None
    num_tokens: int | None
    shift: int
    process_group: ProcessGroup | None


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    return_details: Literal[False] = False,
    **options: Unpack[_Given],
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    return_details: Literal[True],
    **options: Unpack[_Given],
) -> tuple[Tensor, Tensor, LossDetails]: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    logit_multiplier: float = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: Literal["sum", "none"] = "sum",
    recompute: bool = False,
    logits_dtype: torch.dtype | None = None,
    chunk_size: int | None = None,
    num_tokens: int | None = None,
    shift: int = 0,
    process_group: ProcessGroup | None = None,
    return_details: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, LossDetails]:
    """Summed cross entropy of `hidden @ weight.T + bias`, one chunk of logits at a time.

    Equal, up to rounding, to

        F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")

    while holding `chunk_size x vocab` logits instead of `tokens x vocab`.

    Args:
        hidden: last hidden states, `[tokens, width]` or with any other leading axes such as
            `[batch, time, width]`; FP32, BF16, FP16 or FP64.
        weight: output embedding, `[vocab, width]`, of the dtype of `hidden`; hand over the
            parameter itself, because a view of it rounds its gradient. Under autocast both are
            cast, and the gradient of an FP32 weight is not rounded. Or the output layer itself, an
            `nn.Linear`: its weight, parametrised or not, and its bias are used, and a layer that
            does more (an adapter, FP8, hooks) is refused.
        targets: class of each token, integers in `[0, vocab)` or `ignore_index`, with the leading
            axes of `hidden`.
        bias: `[vocab]`, of the dtype of `weight`.
        ignore_index: marks padding, which adds neither loss nor gradient and costs no product.
        label_smoothing: as in `F.cross_entropy`.
        class_weight: `[vocab]`, as `weight` in `F.cross_entropy`, for the sum. `num_tokens` stays a
            count, where the mean of `F.cross_entropy` divides by the weights of the targets: their
            sum is `weight_sum` of the details.
        token_weight: multiplies each token's loss; the shape of `targets`. Keep it near 1 and put
            common factors on the loss, where they multiply in FP32.
        logit_multiplier: logits become `logit_multiplier * hidden @ weight.T + bias`, for the
            `1 / width` of a readout or a temperature. Part of the product; rounds nothing.
        softcap: logits become `softcap * tanh(logits / softcap)`.
        z_loss: adds `z_loss * log_sum_exp ** 2` to each token's loss.
        reduction: "sum", or "none" for the loss of each token, which implies `recompute`.
        recompute: computes gradients in the backward pass, from logits made a second time. For a
            loss that is not always differentiated, or more than once, or not last in its graph.
        logits_dtype: in which the product writes the logits: FP32, or the dtype of `hidden` in half
            the bytes, with the logit of each target in FP32 all the same. By default the latter on
            a CUDA device, where it is faster, and FP32 elsewhere.
        chunk_size: most tokens whose logits are alive at once; by default as many as fit 1 GiB,
            between 512 and 8192. Changes memory, speed and rounding only.
        num_tokens: number of targets that are no padding, after the shift, where the caller knows
            it: then the host does not wait for the device to count. Checked.
        shift: scores each hidden state against the target that many places on along the last axis,
            and the last ones against padding; `token_weight` moves with the targets. True is 1,
            the next token.
        process_group: ranks that share the vocabulary: each gives its rows of the weight, in order
            of rank and however many, with its part of `bias` and `class_weight`, and the same
            hidden states and targets (classes of the whole vocabulary). All get the same loss, and
            the whole gradient of the hidden states, summed in FP32. Without `chunk_size` the host
            waits to hear of the largest shard. A weight that is a DTensor sharded on dim 0 says
            it all by itself where `hidden` is a DTensor too.
        return_details: adds `LossDetails` to what is returned, from the same pass.

    Returns:
        Loss in nats, FP32 (FP64 for FP64 input), 0-d or of the shape of `targets` with 0 at
        padding; and the number of targets that are no padding, 0-d int64. Both on the device of
        `hidden`, both 0 if all is padding. With `return_details` a `LossDetails` after them.

    Raises:
        ValueError: for shapes that disagree, targets out of range, options out of range, ranks that
            were given different ones, and a weight sharded over ranks of which nothing says that
            they share their tokens. What one rank of a group refuses the others refuse too. On a
            device the targets are asserted there, and the host does not wait.
        TypeError: for targets that are no integers, for mixed dtypes, for tensors of a type that
            computes in its own way, and for an output layer that does more than `nn.Linear`.
        RuntimeError: from a second backward pass unless `recompute`, for second derivatives, inside
            `torch.func` and for forward-mode derivatives.

    Numerics:
        Softmax in FP32, from exact products of 16-bit numbers, summed in FP32 and rounded to
        `logits_dtype`. Logit gradients, `softmax - onehot`, round to the dtype of `hidden` at unit
        scale; what that takes at the target is added to the products in FP32. Gradients of
        weight and bias are summed in FP32 over the chunks and reach a parameter whose `grad_dtype`
        is FP32 as they are; others get them rounded once. The incoming gradient (loss scale, 1/T)
        multiplies in FP32 after all products.

    Source: Wijmans et al. 2024, arXiv:2411.09009; chunks instead of tiles, no gradient filter.

    >>> import torch
    >>> from mixprec.cross_entropy import linear_cross_entropy
    >>> hidden, weight = torch.zeros(3, 2), torch.zeros(4, 2)
    >>> loss_sum, num_tokens = linear_cross_entropy(hidden, weight, torch.tensor([1, 2, -100]))
    >>> round((loss_sum / num_tokens).item(), 4)  # uniform over four classes: log 4
    1.3863
    >>> targets = torch.tensor([0, 2, -100])
    >>> details = linear_cross_entropy(hidden, weight, targets, return_details=True)[2]
    >>> details.argmax, details.correct
    (tensor([ 0,  0, -1]), tensor([ True, False, False]))
    """
    shared_in, given = sharing_group(hidden, weight, process_group), (hidden, targets, weight)
    try:  # what one rank refuses the others refuse too, and nobody waits
        if isinstance(weight, nn.Module):
            weight, bias = weight_and_bias(weight, bias)
        tensors = {"hidden": hidden, "weight": weight, "targets": targets, "bias": bias}
        factors = {"class_weight": class_weight, "token_weight": token_weight}
        check_tensors(**tensors, **factors)
        hidden, weight, bias, class_weight, group_name, most_rows = local_shard(
            hidden, weight, bias, class_weight, process_group
        )
        check_tensors(hidden=hidden, weight=weight, bias=bias, class_weight=class_weight)
        differentiable = (hidden, weight, bias)
        check_shapes(hidden, weight, targets, bias, class_weight, token_weight)
        dtype = operand_dtype(hidden, weight, bias)
        logits_dtype = dtype_of_logits(logits_dtype, dtype, hidden.device)
        if chunk_size is None and most_rows is not None:
            chunk_size = default_chunk_size(most_rows, logits_dtype)
        check_options(
            reduction, label_smoothing, logit_multiplier, softcap, z_loss, chunk_size, num_tokens
        )
        check_targets_options(ignore_index, shift, targets)
        refuse_transforms(differentiable)
    except Exception:
        say_refused(shared_in, *given)
        raise
    targets = _shifted(targets.long(), shift, ignore_index)
    if token_weight is not None:
        token_weight = _shifted(token_weight, shift, 0)
    grad_enabled = torch.is_grad_enabled()
    options = _Options(
        ignore_index,
        float(label_smoothing),
        float(logit_multiplier),
        None if softcap is None else float(softcap),
        float(z_loss),
        logits_dtype,
        chunk_size,
        num_tokens,
        dtype,
        reduction == "none",
        recompute or reduction == "none",
        [grad_enabled and t is not None and t.requires_grad for t in differentiable],
        group_name,
        return_details,
    )
    loss, count, *found = _LinearCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        class_weight,
        None if token_weight is None else token_weight.reshape(-1),
        options,
    )
    loss = loss.reshape(targets.shape) if reduction == "none" else loss
    if not return_details:
        return loss, count
    return loss, count, _details(found, targets, ignore_index, z_loss, token_weight)


def _details(
    found: list[Tensor],
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    token_weight: Tensor | None,
) -> LossDetails:
    logsumexp, argmax = found[0].reshape(targets.shape), found[1].reshape(targets.shape)
    squares = z_loss * logsumexp.square()
    if token_weight is not None:
        squares = squares * token_weight.to(squares.dtype)
    correct = (argmax == targets) & (targets != ignore_index)
    squares = squares.where(targets != ignore_index, 0.0)  # for infinite weights of padding
    return LossDetails(logsumexp, argmax, correct, squares.sum(), found[2])


def _shifted(values: Tensor, places: int, padding: int) -> Tensor:
    """`values[..., places:]`, and `padding` after them up to the same shape."""
    if not places:
        return values
    later = values[..., places:]
    return F.pad(later, (0, values.shape[-1] - later.shape[-1]), value=padding)


class LinearCrossEntropy(nn.Module):
    """An output layer that is asked for its loss instead of its logits.

    Holds `weight` `[num_classes, in_features]` and, if asked for, `bias`, named and initialised as
    in `nn.Linear`, whose state dicts it loads. `forward` is `linear_cross_entropy` with them, so
    sharding that gathers parameters around a module's forward finds them there. To tie it, assign:
    `head.weight = embedding.weight`.

    Args:
        options: whatever else `linear_cross_entropy` takes by name, for every call; an unknown
            name is a TypeError. A `class_weight` stays on the device it is given on.

    >>> import torch
    >>> from mixprec.cross_entropy import LinearCrossEntropy
    >>> head = LinearCrossEntropy(8, 50, shift=True)
    >>> loss_sum, num_tokens = head(torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.long))
    >>> num_tokens
    tensor(8)
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        layer = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        signature(linear_cross_entropy).bind_partial(**options)  # raises for an unknown name
        self.options = options

    def forward(self, hidden: Tensor, targets: Tensor, **options: Any) -> tuple[Any, ...]:
        """Loss sum and token count (and details); `options` override those of the constructor."""
        options = {**self.options, **options}
        return linear_cross_entropy(hidden, self.weight, targets, bias=self.bias, **options)

    def extra_repr(self) -> str:
        shown = {"bias": self.bias is not None, **self.options}
        named = ", ".join(f"{k}={v}" for k, v in shown.items() if not isinstance(v, Tensor))
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {named}"


class _Options(NamedTuple):
    """What goes to the operator besides tensors; then what becomes of its results."""

    ignore_index: int
    label_smoothing: float
    logit_multiplier: float
    softcap: float | None
    z_loss: float
    logits_dtype: torch.dtype
    chunk_size: int | None
    num_tokens: int | None
    dtype: torch.dtype
    """Of the operands of all products."""
    per_token: bool
    recompute: bool
    needs: list[bool]
    """Which of hidden, weight and bias want a gradient."""
    group_name: str | None
    details: bool


_Gradients = tuple[Tensor | None, ...]


class _LinearCrossEntropy(Function):
    """Saves gradients and scales them in backward; or saves inputs and computes gradients there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        class_weight: Tensor | None,
        token_weight: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        inputs = hidden, weight, bias, targets, class_weight, token_weight
        needs = [need and not options.recompute for need in options.needs]
        losses, count, *rest = _evaluate(inputs, options, needs)
        grads, details = rest[:3], rest[3:]
        ctx.save_for_backward(*(inputs if options.recompute else grads))
        ctx.options, ctx.used_up = options, False
        ctx.mark_non_differentiable(count, *details)
        return losses if options.per_token else losses.sum(), count, *details

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> _Gradients:
        options: _Options = ctx.options
        factor = grad_outputs[0]
        if not torch.compiler.is_compiling():
            _refuse_second_derivative()
            if not options.recompute:
                _refuse_second_backward(ctx)
        if options.recompute:
            hidden, weight, bias, targets, class_weight, token_weight = ctx.saved_tensors
            if options.per_token:
                unit = _power_of_two_near(factor)
                rows = factor / unit
                token_weight = rows if token_weight is None else token_weight * rows
                factor = unit
            inputs = hidden, weight, bias, targets, class_weight, token_weight
            grads = _evaluate(inputs, options._replace(details=False), options.needs)[2:5]
        else:
            grads = ctx.saved_tensors
        # Gradients are those by the products, which the bias is added to after the multiplier.
        product = factor if options.logit_multiplier == 1 else factor * options.logit_multiplier
        wanted = zip(grads, options.needs, (product, product, factor), strict=True)
        return *(_times_(grad, f) if need else None for grad, need, f in wanted), *[None] * 4


def _evaluate(
    inputs: tuple[Tensor | None, ...], options: _Options, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Losses, count, gradients. Casts in here, so that none of them is differentiated."""
    operands = (None if t is None else t.to(options.dtype) for t in inputs[:3])
    return losses_and_gradients(
        *operands, *inputs[3:], *options[:8], needs, options.group_name, options.details
    )


def _times_(grad: Tensor, factor: Tensor) -> Tensor:
    """`grad * factor` in FP32, in place: a 16-bit `mul_` may round the factor first.

    A factor of 1 costs no pass over the gradient.
    """
    if torch.compiler.is_compiling():
        return (grad.to(factor.dtype) * factor).to(grad.dtype)
    if factor.device.type == "cpu" and factor.item() == 1:
        return grad
    twin(grad.device, factor.dtype).scale_(grad, factor)
    return grad


def _power_of_two_near(factors: Tensor) -> Tensor:
    """The power of two at or above the largest magnitude, 0-d; 1 where there is none.

    Divided by it, per-token factors are near 1 inside the products, whatever loss scale they carry.
    """
    if not factors.numel():
        return factors.new_ones(())
    largest = factors.abs().amax()
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    return torch.where(largest.isfinite() & (largest > 0), unit, 1.0)


def _refuse_second_backward(ctx: Any) -> None:
    if ctx.used_up:
        raise RuntimeError(
            "linear_cross_entropy computed its gradients in forward, and the first backward pass "
            "has multiplied them in place; a second one would multiply them again. Give "
            "recompute=True to go backward more than once."
        )
    ctx.used_up = True


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy has no second derivative, and create_graph=True asks for one. "
            "Use F.cross_entropy(F.linear(hidden, weight), targets, reduction='sum') there."
        )
