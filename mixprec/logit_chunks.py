"""Logits, one chunk of tokens at a time: made, turned in place into their own gradients, and gone.

For one token with logits z, target y and log-sum-exp l, the loss and its gradient are

    loss = a (l - z_y) + s sum_c w_c (l - z_c) + z_loss l^2
    dloss/dz_c = (a + s sum_c w_c + 2 z_loss l) p_c - a [c = y] - s w_c,    p = softmax(z)

with class weights w, s = label_smoothing / V and a = (1 - label_smoothing) w_y; plainly p - onehot.
That is the gradient of a sum, at unit scale: its -1 is exact in 16 bits, as 1/T is not, and its
p are as large as they get, so FP16 flushes the fewest. What the loss is multiplied by later comes
to the gradients in FP32, after the matrix products.

`softmax_gradient_` is the whole elementwise part, in plain torch, with several passes over the
chunk. `losses_and_gradients` is an operator, so that a compiler sees neither the loop nor the
number of tokens, which depends on the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["default_chunk_size", "losses_and_gradients", "softmax_gradient_"]

_SLAB_BYTES = 2**30
# Each chunk of C tokens reads and writes the FP32 weight gradient once. By an H200's peak rates
# that takes 245 / C of the time of the products: 6 % at 4096, half at 512.
_MOST_TOKENS = 4096
_FEWEST_TOKENS = 512


def default_chunk_size(vocab: int, dtype: torch.dtype) -> int:
    """Tokens a chunk: the power of two in [512, 4096] whose logits fit 1 GiB.

    A logit takes 4 bytes, and its gradient 2 more beside them if `dtype` has 16 bits.

    >>> import torch
    >>> default_chunk_size(50304, torch.bfloat16), default_chunk_size(128256, torch.bfloat16)
    (2048, 1024)
    """
    bytes_per_logit = 4 + 2 if dtype.itemsize == 2 else dtype.itemsize
    fitting = max(_SLAB_BYTES // (bytes_per_logit * max(vocab, 1)), 1)
    return min(max(1 << (fitting.bit_length() - 1), _FEWEST_TOKENS), _MOST_TOKENS)


def softmax_gradient_(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses and log-sum-exps of `logits`, which become the gradient of the losses' sum.

    In place, without a second slab (softcap takes one, for its slope); a kernel may take its place.

    Args:
        logits: before the softcap, `[tokens, vocab]`, FP32 or FP64; overwritten.
        targets: `[tokens]`, int64, all in `[0, vocab)`.
        class_weight: `[vocab]`, of the logits' dtype; weights the cross entropy, not the z-loss.
        token_weight: `[tokens]`, of the logits' dtype; multiplies losses and gradients.
        gradient: False leaves `logits` with no meaning.

    Returns:
        Losses and log-sum-exps, `[tokens]`, of the logits' dtype.

    >>> import torch
    >>> logits = torch.zeros(1, 4)
    >>> losses, lse = softmax_gradient_(logits, torch.tensor([2]))
    >>> logits
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    slope = None
    if softcap is not None:
        logits.div_(softcap).tanh_()
        slope = 1 - logits.square() if gradient else None
        logits.mul_(softcap)
    column = targets[:, None]
    hit = torch.full_like(targets, 1 - label_smoothing, dtype=logits.dtype)
    if class_weight is not None:
        hit *= class_weight[targets]
    picked = logits.gather(1, column).squeeze(1)
    spread = label_smoothing / logits.shape[1]
    weight_sum: Tensor | int = logits.shape[1] if class_weight is None else class_weight.sum()
    weighted: Tensor | float = 0.0
    if spread:
        weighted = logits.sum(1) if class_weight is None else logits @ class_weight

    top = logits.amax(1)
    total = logits.sub_(top[:, None]).exp_().sum(1)
    lse = top + total.log()

    losses = hit * (lse - picked)
    if spread:
        losses += spread * (weight_sum * lse - weighted)
    if z_loss:
        losses += z_loss * lse.square()
    if gradient:
        logits.mul_(((hit + spread * weight_sum + 2 * z_loss * lse) / total)[:, None])
        if spread:
            logits.sub_(spread if class_weight is None else spread * class_weight)
        logits.scatter_add_(1, column, -hit[:, None])
        if slope is not None:
            logits.mul_(slope)
        if token_weight is not None:
            logits.mul_(token_weight[:, None])
    return losses if token_weight is None else losses * token_weight, lse


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    chunk_size: int,
    num_tokens: int | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Losses `[tokens]` and their count; gradients of their sum by hidden, weight and bias.

    Padding has loss 0 and gradient 0 and is multiplied by nothing. Gradients by weight and bias are
    FP32 (FP64 for FP64), those that `needs` does not ask for are empty.
    """
    kept = _rows_kept(targets, weight.shape[0], ignore_index, num_tokens)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    class_weight = None if class_weight is None else class_weight.to(dtype)
    losses = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
    grads = _empty_gradients(hidden, weight, needs)
    for grad in grads:
        grad.zero_()
    # 16-bit operands with FP32 sums are CUDA's alone; elsewhere operands are widened, values kept.
    operand = hidden.dtype if hidden.is_cuda else dtype
    matrix = weight.to(operand)
    slab = torch.empty(min(chunk_size, len(kept)), len(weight), dtype=dtype, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round FP32 operands
        for start in range(0, len(kept), chunk_size):
            rows = kept[start : start + chunk_size]
            states = hidden[rows].to(operand)
            logits = _multiply_into(slab[: len(rows)], states, matrix.T)
            if bias is not None:
                logits.add_(bias)
            losses[rows], _ = softmax_gradient_(
                logits,
                targets[rows],
                class_weight=class_weight,
                token_weight=None if token_weight is None else token_weight[rows].to(dtype),
                label_smoothing=label_smoothing,
                softcap=softcap,
                z_loss=z_loss,
                gradient=any(needs),
            )
            if any(needs):
                _add_gradients_(grads, needs, rows, _rounded(logits, hidden), states, matrix)
    return losses, (targets != ignore_index).sum(), *grads


def _rounded(logits: Tensor, hidden: Tensor) -> Tensor:
    """`logits` with the values of the dtype of `hidden`; on a CPU too, to show what they lose."""
    rounded = logits.to(hidden.dtype)
    return rounded if hidden.is_cuda else logits.copy_(rounded)


def _add_gradients_(
    grads: tuple[Tensor, ...],
    needs: list[bool],
    rows: Tensor,
    grad_logits: Tensor,
    states: Tensor,
    matrix: Tensor,
) -> None:
    """Multiply the logit gradients of `rows` into the gradients that are needed."""
    by_hidden, by_weight, by_bias = grads
    if needs[0]:
        by_hidden[rows] = (grad_logits @ matrix).to(by_hidden.dtype)
    if needs[1]:
        _add_product_(by_weight, grad_logits.T, states)
    if needs[2]:
        by_bias.add_(grad_logits.sum(0, dtype=by_bias.dtype))


losses_and_gradients = torch.library.custom_op(
    "mixprec::linear_cross_entropy",
    _losses_and_gradients,
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weight, "
        "Tensor? token_weight, SymInt ignore_index, float label_smoothing, float? softcap, "
        "float z_loss, SymInt chunk_size, SymInt? num_tokens, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
)


@losses_and_gradients.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    chunk_size: int,
    num_tokens: int | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(targets.shape, dtype=dtype)
    return losses, targets.new_empty(()), *_empty_gradients(hidden, weight, needs)


def _empty_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=dtype),
    )


def _rows_kept(targets: Tensor, vocab: int, ignore_index: int, num_tokens: int | None) -> Tensor:
    """Indices of the targets that are no padding; the host waits unless it knows their number."""
    kept = targets != ignore_index
    wrong = kept & ((targets < 0) | (targets >= vocab))
    if targets.device.type == "cpu":
        _check_on_host(targets, kept, wrong, vocab, ignore_index, num_tokens)
    else:
        torch._assert_async(~wrong.any(), f"a target is neither in [0, {vocab}) nor ignore_index")
        if num_tokens is not None:
            counted = kept.sum() == num_tokens
            torch._assert_async(counted, f"num_tokens={num_tokens} is not the number of targets")
    if num_tokens is None:
        return kept.nonzero().squeeze(1)
    return kept.nonzero_static(size=num_tokens).squeeze(1)


def _check_on_host(
    targets: Tensor,
    kept: Tensor,
    wrong: Tensor,
    vocab: int,
    ignore_index: int,
    num_tokens: int | None,
) -> None:
    if wrong.any():
        raise ValueError(
            f"a target is {targets[wrong][0].item()}, but weight has {vocab} rows: a target must "
            f"be in [0, {vocab}), or ignore_index={ignore_index} for padding"
        )
    if num_tokens is not None and num_tokens != kept.sum():
        raise ValueError(
            f"num_tokens is {num_tokens}, but {kept.sum().item()} targets are no padding "
            f"(ignore_index={ignore_index}); count them after the shift, or leave num_tokens out"
        )


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in the dtype of `out`, FP32 from 16-bit operands without rounding between."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`out += left @ right`, in the dtype of `out`."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right)
    return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
