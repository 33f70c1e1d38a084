"""A chunk of tokens at a time: logits made, turned in place into their own gradients, and gone.

    logits = hidden weight^T,    dhidden = dlogits weight,    dweight += dlogits^T hidden

What happens to the logits of a chunk is in `rows`. Here are the products. Sums that
go on over chunks are FP32, and so are those of the remainders, which the rounding of dlogits took
at the targets: times a row of the weight in dhidden, times a hidden state in dweight.

`losses_and_gradients` is an operator, so that a compiler sees neither the loop nor the number of
tokens, which depends on the data.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from mixprec.cross_entropy.rows import LossTerms, Rows, wide
from mixprec.cross_entropy.softmax import softmax_gradient_, twin
from mixprec.cross_entropy.vocab_shard import VocabShard, locate

__all__ = ["default_chunk_size", "losses_and_gradients"]

_SLAB_BYTES = 2**30
_MOST_TOKENS = 8192
_FEWEST_TOKENS = 512
_TILE = 128  # tokens of one tile of a product
_TILE_COLUMNS = 256
# With fewer tiles than processors a product is split along what it sums over, and parts in 16 bits
# are added up in 16 bits (torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction).
_ELEMENTS_OF_A_WAVE = 2**22
_ALIGNMENT = 64  # elements: rows that start at multiples of 128 bytes are read in whole lines


def default_chunk_size(vocab: int, logits_dtype: torch.dtype) -> int:
    """Most tokens a chunk: the power of two in [512, 8192] whose logits fit 1 GiB.

    >>> import torch
    >>> default_chunk_size(128256, torch.bfloat16), default_chunk_size(128256, torch.float32)
    (4096, 2048)
    """
    fitting = max(_SLAB_BYTES // (logits_dtype.itemsize * max(vocab, 1)), 1)
    return min(max(1 << (fitting.bit_length() - 1), _FEWEST_TOKENS), _MOST_TOKENS)


def _losses_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    logit_multiplier: float,
    softcap: float | None,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
    num_tokens: int | None,
    needs: list[bool],
    group_name: str | None,
    details: bool,
) -> tuple[Tensor, ...]:
    """Losses `[tokens]` and their count; gradients of their sum by hidden, weight and bias.

    Those by hidden and weight are left without the factor `logit_multiplier`, which comes last.
    Padding has loss 0 and gradient 0 and is multiplied by nothing. Gradients by weight and bias are
    FP32 (FP64 for FP64), those that `needs` does not ask for are empty. Then, for `details`,
    log-sum-exps and argmaxes `[tokens]`, 0 and -1 at padding, and the sum of the tokens' weights.

    With a `group_name` the weight is a shard, and the gradient by hidden that of all shards. If it
    has no `chunk_size` either, the host waits to hear of the largest shard.
    """
    padding = targets == ignore_index
    count = (~padding).sum()
    given = bias is None, class_weight is None, token_weight is None
    options = ignore_index, label_smoothing, logit_multiplier, softcap, z_loss, logits_dtype
    plan = chunk_size, num_tokens, needs[0], details, hidden.dtype, *hidden.shape
    same = (*given, *options, *plan)
    shard, sizes = locate(group_name, len(weight), targets, padding, same)
    if chunk_size is None:
        most_rows = len(weight) if sizes is None else int(sizes.max())
        chunk_size = default_chunk_size(most_rows, logits_dtype)
    kept = _rows_kept(targets, padding, shard.vocab, ignore_index, num_tokens)
    labels = shard.local(targets, len(weight)).masked_fill(padding, -1)
    dtype = wide(hidden.dtype)
    bias = None if bias is None else bias.contiguous()
    class_weight = None if class_weight is None else class_weight.to(dtype).contiguous()
    token_weight = None if token_weight is None else token_weight.to(dtype).contiguous()
    terms = LossTerms(bias, class_weight, label_smoothing, softcap, z_loss)
    # 16-bit operands with FP32 sums are CUDA's alone; elsewhere operands are widened, values kept.
    matrix = weight.to(hidden.dtype if hidden.is_cuda else dtype)
    losses = torch.zeros(targets.shape, dtype=dtype, device=hidden.device)
    remainders = torch.zeros_like(losses)
    target_logits = _target_logits(hidden, matrix, labels, logits_dtype)
    if target_logits is not None:
        target_logits *= logit_multiplier
    lses = torch.zeros_like(losses) if details else losses.new_empty(0)
    argmaxes = torch.full_like(targets, -1) if details else targets.new_empty(0)
    grads = _empty_gradients(hidden, weight, needs)
    _zero_what_no_product_writes(grads, kept, targets)
    slab = None
    with torch.autocast(hidden.device.type, enabled=False):  # it would round FP32 operands
        size = _size_of_chunks(len(kept), chunk_size, hidden.shape[1], _processors(hidden.device))
        for rows in _chunks(kept, len(targets), size):
            first = slab is None
            states, classes = _pick(hidden, rows).to(matrix.dtype), labels[rows]
            if slab is None:
                slab = _slab(len(states), matrix, logits_dtype)
            logits = slab[: len(states)]
            if len(matrix):
                _multiply_into(logits, states, matrix.T, logit_multiplier)
            done = softmax_gradient_(
                _with_the_values_of(logits_dtype, logits),
                classes,
                terms,
                None if token_weight is None else token_weight[rows],
                target_logits=None if target_logits is None else target_logits[rows],
                rounded_to=hidden.dtype if any(needs) else None,
                argmax=details,
                shard=shard,
            )
            losses[rows] = done.losses
            if done.argmaxes is not None:
                lses[rows], argmaxes[rows] = done.log_sum_exps, done.argmaxes
            if done.remainders is not None:
                remainders[rows] = done.remainders
                _add_gradients_(grads, needs, rows, classes, done, states, matrix, first, shard)
        if hidden.dtype.itemsize == 2:
            _add_remainders_(grads, needs, labels, remainders, hidden)
    weight_sum = losses.new_zeros(())
    if details:
        weight_sum = _weight_sum(labels, padding, class_weight, token_weight, losses, shard)
    return losses, count, *grads, lses, argmaxes, weight_sum


def _weight_sum(
    labels: Tensor,
    padding: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    losses: Tensor,
    shard: VocabShard,
) -> Tensor:
    """Sum of `class_weight[target] * token_weight` over targets that are no padding."""
    weights = torch.ones_like(losses) if token_weight is None else token_weight
    weights = weights.where(~padding, 0.0)
    if class_weight is None:
        return weights.sum()
    here = labels >= 0
    own = class_weight[labels.clamp(min=0)] if len(class_weight) else weights
    return shard.reduce_((own * weights).where(here, 0.0).sum(), "sum")


def _zero_what_no_product_writes(grads: tuple[Tensor, ...], kept: Tensor, targets: Tensor) -> None:
    by_hidden, by_weight, by_bias = grads
    by_bias.zero_()
    if len(kept) < len(targets):
        by_hidden.zero_()
    if not len(kept):
        by_weight.zero_()


@cache
def _processors(device: torch.device) -> int:
    """How many tiles of a product are made at once."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _size_of_chunks(tokens: int, most: int, width: int, processors: int) -> int:
    """Tokens a chunk, at most `most`: the size for which all chunks together take least time.

    The product for the hidden states has few tiles, all of them `vocab` deep, and lasts as long as
    that many waves of one tile a processor: a wave that is not full costs as much as one that is.
    Each chunk also reads and writes the FP32 weight gradient once. On an H200, at 700 TFLOP/s and
    4 TB/s, a wave takes 12.4 ns a class, and that gradient 2 ps a class and column.

    >>> _size_of_chunks(8192, 4096, 4096, processors=132)
    4096
    >>> _size_of_chunks(7021, 4096, 4096, processors=132)  # 7 waves; two equal chunks would take 8
    3968
    >>> _size_of_chunks(1000, 600, 64, processors=1)
    512
    """
    if most < _TILE:
        return most
    tiles = max(-(-tokens // _TILE), 1)
    columns = -(-width // _TILE_COLUMNS)

    def time(size: int) -> float:
        whole, rest = divmod(tiles, size)
        busy = whole * -(-size * columns // processors) + -(-rest * columns // processors)
        return busy + (whole + (rest > 0)) * width * 2e-3 / 12.4

    return min(range(1, min(most // _TILE, tiles) + 1), key=time) * _TILE


def _chunks(kept: Tensor, tokens: int, size: int) -> Iterator[slice | Tensor]:
    """Rows of each chunk; slices where nothing is padding, which copy nothing."""
    for start in range(0, len(kept), size):
        whole = slice(start, min(start + size, tokens))
        yield whole if len(kept) == tokens else kept[whole]


def _pick(matrix: Tensor, rows: slice | Tensor) -> Tensor:
    return matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)


def _slab(tokens: int, matrix: Tensor, logits_dtype: torch.dtype) -> Tensor:
    """Memory for the logits of a chunk; without a kernel they are FP32 or FP64."""
    vocab = len(matrix)
    return torch.empty(
        tokens,
        -(-vocab // _ALIGNMENT) * _ALIGNMENT,
        dtype=twin(matrix.device, logits_dtype).dtype_of_slab(logits_dtype),
        device=matrix.device,
    )[:, :vocab]


def _with_the_values_of(dtype: torch.dtype, logits: Tensor) -> Tensor:
    """`logits`, rounded in place as a product that writes `dtype` would have rounded them."""
    return logits if logits.dtype == dtype else logits.copy_(logits.to(dtype))


def _target_logits(
    hidden: Tensor, matrix: Tensor, labels: Tensor, logits_dtype: torch.dtype
) -> Tensor | None:
    """`hidden[i] @ matrix[labels[i]]` in FP32, where a product rounds the others to 16 bits.

    Those of a label of -1 mean nothing.
    """
    if logits_dtype.itemsize > 2 or not len(matrix):
        return None
    picked: Tensor = twin(hidden.device, hidden.dtype).target_logits(hidden, matrix, labels)
    return picked


def _add_gradients_(
    grads: tuple[Tensor, ...],
    needs: list[bool],
    rows: slice | Tensor,
    classes: Tensor,
    done: Rows,
    states: Tensor,
    matrix: Tensor,
    first: bool,
    shard: VocabShard,
) -> None:
    """Multiply the logit gradients of `rows` into the gradients that are needed."""
    by_hidden, by_weight, by_bias = grads
    grad_logits, remainders = done.gradient, done.remainders
    assert grad_logits is not None and remainders is not None
    if needs[2]:
        by_bias.add_(grad_logits.sum(0, dtype=by_bias.dtype))
    if needs[1] and len(matrix):
        multiply = _multiply_into if first else _add_product_
        multiply(by_weight, grad_logits.T, states)
    if not needs[0]:
        return
    # Sums over shards are FP32, others are rounded as they leave the product.
    dtype = matrix.dtype if shard.whole else by_weight.dtype
    in_place = isinstance(rows, slice) and by_hidden.dtype == dtype
    if in_place:
        out = by_hidden[rows]
    elif isinstance(rows, Tensor) and states.dtype == dtype:
        out = states  # a copy, which nothing reads any more
    else:
        out = states.new_empty(states.shape, dtype=dtype)
    here = twin(out.device, out.dtype)
    if not len(matrix):
        out.zero_()
    elif by_hidden.dtype.itemsize > 2:
        torch.mm(grad_logits, matrix, out=out)
    elif out.dtype.itemsize == 2 and out.numel() <= _ELEMENTS_OF_A_WAVE:
        sums = states.new_empty(states.shape, dtype=torch.float32)
        product = _multiply_into(sums, grad_logits, matrix)
        here.write_multiples_of_rows_(out, remainders, matrix, classes, product)
    else:
        # At most 2^-9 of a row of the weight, so 16 bits hold it beside the product's FP32 sum.
        here.write_multiples_of_rows_(out, remainders, matrix, classes, None)
        _add_product_(out, grad_logits, matrix)
    shard.reduce_(out, "sum")
    if not in_place:
        by_hidden[rows] = out.to(by_hidden.dtype)


def _add_remainders_(
    grads: tuple[Tensor, ...],
    needs: list[bool],
    labels: Tensor,
    remainders: Tensor,
    hidden: Tensor,
) -> None:
    """Add the remainders to the gradients of weight and bias, in a fixed order."""
    _, by_weight, by_bias = grads
    if not len(by_weight if needs[1] else by_bias):
        return
    here = twin(by_weight.device, by_weight.dtype)
    if needs[1]:
        here.add_by_class_(by_weight, labels, remainders, hidden)
    if needs[2]:
        here.add_by_class_(by_bias[:, None], labels, remainders, torch.ones_like(hidden[:, :1]))


losses_and_gradients = torch.library.custom_op(
    "mixprec::linear_cross_entropy",
    _losses_and_gradients,
    mutates_args=(),
    schema=(
        "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? class_weight, "
        "Tensor? token_weight, SymInt ignore_index, float label_smoothing, "
        "float logit_multiplier, float? softcap, float z_loss, ScalarType logits_dtype, "
        "SymInt? chunk_size, SymInt? num_tokens, "
        "bool[] needs, str? group_name, bool details) "
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
    logit_multiplier: float,
    softcap: float | None,
    z_loss: float,
    logits_dtype: torch.dtype,
    chunk_size: int | None,
    num_tokens: int | None,
    needs: list[bool],
    group_name: str | None,
    details: bool,
) -> tuple[Tensor, ...]:
    dtype = wide(hidden.dtype)
    losses = hidden.new_empty(targets.shape, dtype=dtype)
    found = (
        (torch.empty_like(losses), torch.empty_like(targets))
        if details
        else (
            losses.new_empty(0),
            targets.new_empty(0),
        )
    )
    grads = _empty_gradients(hidden, weight, needs)
    return losses, targets.new_empty(()), *grads, *found, losses.new_empty(())


def _empty_gradients(hidden: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, ...]:
    dtype = wide(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if needs[0] else (0,)),
        hidden.new_empty(weight.shape if needs[1] else (0,), dtype=dtype),
        hidden.new_empty(weight.shape[:1] if needs[2] else (0,), dtype=dtype),
    )


def _rows_kept(
    targets: Tensor, padding: Tensor, vocab: int | Tensor, ignore_index: int, num_tokens: int | None
) -> Tensor:
    """Indices of the targets that are no padding; the host waits unless it knows their number."""
    kept = ~padding
    wrong = kept & ((targets < 0) | (targets >= vocab))
    if targets.device.type == "cpu":
        _check_on_host(targets, kept, wrong, int(vocab), ignore_index, num_tokens)
    else:
        classes = f"in [0, {vocab})" if isinstance(vocab, int) else "a class of any rank's shard"
        torch._assert_async(~wrong.any(), f"a target is neither {classes} nor ignore_index")
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


def _multiply_into(out: Tensor, left: Tensor, right: Tensor, multiplier: float = 1.0) -> Tensor:
    """`multiplier * left @ right` in the dtype of `out`, rounded once."""
    if multiplier != 1:
        options = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
        return torch.addmm(out, left, right, beta=0, alpha=multiplier, out=out, **options)
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product_(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`out += left @ right`, in the dtype of `out`."""
    if left.dtype == out.dtype:
        return out.addmm_(left, right)
    return torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
