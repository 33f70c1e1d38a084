"""Arguments of `linear_cross_entropy` that cannot be meant, refused before any work is done."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = [
    "check_options",
    "check_shapes",
    "check_targets_options",
    "check_tensors",
    "dtype_of_logits",
    "operand_dtype",
    "refuse_transforms",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(**given: Any) -> None:
    """Refuse what is no tensor, and tensors that compute in a way of their own.

    A quantized weight, or an adapter in the shape of a tensor, multiplies as its type says. The
    loss multiplies the numbers that lie in memory, which may be codes, or a part of the weight.
    """
    for name, value in given.items():
        if value is None and name in ("bias", "class_weight", "token_weight"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; it must be a tensor")
        if _computes_itself(type(value)):
            raise TypeError(
                f"{name} is a {type(value).__qualname__}, a tensor that computes in its own way, "
                f"and the loss multiplies the numbers that lie in memory: it would be another one. "
                f"Give a plain tensor, such as {name}.dequantize() where there is one, or use "
                f"F.cross_entropy(F.linear(hidden, weight), targets, reduction='sum')"
            )


_OF_TORCH = ("torch._subclasses.", "torch.distributed.")
"""Where tensors come from that stand for plain ones: traced, sharded, or on their way."""

_PLAIN: Any = Tensor
_NO_DISPATCH = _PLAIN.__torch_dispatch__
_FUNCTIONS = torch._C._disabled_torch_function_impl, _PLAIN.__torch_function__.__func__


def _computes_itself(kind: type[Tensor]) -> bool:
    """Whether operations on tensors of this type are its own code."""
    if kind is Tensor or kind is nn.Parameter or kind.__module__.startswith(_OF_TORCH):
        return False
    theirs: Any = kind
    function = theirs.__torch_function__
    own = getattr(function, "__func__", function) not in _FUNCTIONS
    return own or theirs.__torch_dispatch__ is not _NO_DISPATCH


def operand_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The one dtype of all operands: their own, or autocast's."""
    dtypes = {"hidden": hidden.dtype, "weight": weight.dtype}
    if bias is not None:
        dtypes["bias"] = bias.dtype
    named = " and ".join(f"{name} is {dtype}" for name, dtype in dtypes.items())
    if not all(dtype in _FLOATS for dtype in dtypes.values()):
        raise TypeError(f"{named}; they must be FP32, BF16, FP16 or FP64")
    device = hidden.device.type
    castable = torch.float64 not in dtypes.values()
    if castable and _autocast(device):
        return torch.get_autocast_dtype(device)
    if len(set(dtypes.values())) > 1:
        raise TypeError(
            f"{named}; they must be of one dtype, because which of them to round is yours to "
            f"choose: cast one, or run under torch.autocast"
        )
    return hidden.dtype


def _autocast(device: str) -> bool:
    """Compilers of some versions know one of these functions only; what they compile for has it."""
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def dtype_of_logits(
    asked: torch.dtype | None, operands: torch.dtype, device: torch.device
) -> torch.dtype:
    """FP32 (FP64 for FP64), or the dtype of 16-bit operands: the faster one of them, or `asked`."""
    wide = torch.promote_types(operands, torch.float32)
    if asked is None:
        return operands if device.type == "cuda" else wide
    if asked not in (wide, operands):
        raise ValueError(
            f"logits_dtype is {asked}; for hidden states in {operands} it must be "
            + " or ".join(str(dtype) for dtype in dict.fromkeys((wide, operands)))
        )
    return asked


def check_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
) -> None:
    """Refuse shapes that disagree, and targets and factors of the wrong kind."""
    if not hidden.dim() or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        width = hidden.shape[-1] if hidden.dim() else "width"
        raise ValueError(
            f"weight is {list(weight.shape)} but hidden is {list(hidden.shape)}; weight must be "
            f"[vocab, {width}] and hidden [..., width]"
        )
    if targets.dtype.is_floating_point or targets.dtype.is_complex or targets.dtype == torch.bool:
        raise TypeError(
            f"targets are {targets.dtype}; they must be integers, the number of each token's "
            f"class. Probabilities of classes are not supported."
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets are {list(targets.shape)} but hidden is {list(hidden.shape)}; give one "
            f"target for each hidden state, {list(hidden.shape[:-1])}. To score the next token, "
            f"slice neither and give shift=True."
        )
    vocab = weight.shape[:1]
    if bias is not None and bias.shape != vocab:
        raise ValueError(
            f"bias is {list(bias.shape)} but weight is {list(weight.shape)}; bias must be "
            f"{list(vocab)}"
        )
    _check_factor("class_weight", class_weight, vocab)
    _check_factor("token_weight", token_weight, targets.shape)


def _check_factor(name: str, factor: Tensor | None, shape: torch.Size) -> None:
    if factor is None:
        return
    if factor.shape != shape or not factor.dtype.is_floating_point:
        raise ValueError(
            f"{name} is {factor.dtype} of shape {list(factor.shape)}; it must be floating-point of "
            f"shape {list(shape)}"
        )
    if factor.requires_grad:
        raise ValueError(
            f"{name} requires a gradient and would get none; detach it"
            + (", or multiply reduction='none' losses by it" if name == "token_weight" else "")
        )


def check_options(
    reduction: str,
    label_smoothing: Any,
    logit_multiplier: Any,
    softcap: Any,
    z_loss: Any,
    chunk_size: Any,
    num_tokens: Any,
) -> None:
    """Refuse options of other types or out of range."""
    if reduction not in ("sum", "none"):
        raise ValueError(
            f"reduction is {reduction!r}; it must be 'sum' or 'none'. For a mean divide loss_sum "
            f"by the tokens of the whole step, once, as GradientAccumulator does."
        )
    _check_number("label_smoothing", label_smoothing, "0.0 for none")
    _check_number("logit_multiplier", logit_multiplier, "1.0 for none")
    _check_number("z_loss", z_loss, "0.0 for none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be between 0 and 1")
    if not math.isfinite(logit_multiplier):
        raise ValueError(f"logit_multiplier is {logit_multiplier}; it must be finite")
    if softcap is not None:
        _check_number("softcap", softcap, "None for no cap")
        if not 0 < softcap < math.inf:
            raise ValueError(
                f"softcap is {softcap}; it must be finite and above 0, or None for no cap"
            )
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss is {z_loss}; it must be 0 or more, and finite")
    if chunk_size is not None and (not _is_int(chunk_size) or chunk_size < 1):
        raise ValueError(
            f"chunk_size is {chunk_size!r}; it must be an int of at least 1, the tokens whose "
            f"logits are held at once, or None"
        )
    if num_tokens is not None and (not _is_int(num_tokens) or num_tokens < 0):
        raise ValueError(
            f"num_tokens is {num_tokens!r}; it must be an int of at least 0 that the host knows "
            f"already (reading it from a tensor would wait for the device), or None"
        )


def check_targets_options(ignore_index: Any, shift: Any, targets: Tensor) -> None:
    """Refuse what cannot be compared with targets or move them."""
    if not _is_int(ignore_index) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(
            f"ignore_index is {ignore_index!r}; it must be an int, of at most 64 bits. If nothing "
            f"is padding leave it out: -100 is no class."
        )
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(
            f"shift is {shift!r}; it must be an int of at least 0, the places from a hidden state "
            f"on to its target: True or 1 for the next token"
        )
    if shift and not targets.dim():
        raise ValueError(
            f"shift is {shift!r} but targets are a single number; they need a last axis to move "
            f"along, [tokens] or [batch, time]"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object, none: str) -> None:
    """A tensor is refused: the host would wait for it, and it would get no gradient."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r}; it must be a float that the host knows, {none}. A tensor would "
            f"get no gradient here."
        )


def refuse_transforms(tensors: tuple[Tensor | None, ...]) -> None:
    """Refuse derivatives other than those of a backward pass. A compiler has words of its own."""
    if torch.compiler.is_compiling():
        return
    duals = (t for t in tensors if t is not None and forward_ad.unpack_dual(t).tangent is not None)
    if torch._C._are_functorch_transforms_active() or next(duals, None) is not None:
        raise RuntimeError(
            "linear_cross_entropy has no derivative inside torch.func or in forward mode, because "
            "its backward is computed in its forward. Use F.cross_entropy(F.linear(hidden, weight)"
            ", targets, reduction='sum') there."
        )
