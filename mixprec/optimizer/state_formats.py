"""How an optimizer's per-element states are stored: FP32, BF16, or 8-bit codes in blocks of 32.

A rule computes in FP32 and never knows. Between steps a state may take fewer bytes:

    fp32   4 bytes
    bf16   2 bytes, nearest even
    int8   1 byte and 1/16: codes, and a BF16 scale for each 32 consecutive elements (in memory)

A code does not stand for equal steps. Moments spread over decades inside a block, and equal steps
would lose all but the largest, so codes follow a square, and decoding takes no more than products:

    x = scale * code * |code| / top^2,    scale = BF16(max |x|)

    int8    top = 127, either sign
    uint8   top = 255, for states that cannot be negative, which twice as many codes serve

BF16 rounds by at most 2^-8, whose root is less than half a code at the end of the range. So the
largest x of a block has the last code and decodes to the scale itself, and a second trip changes
nothing. An x > 0 never gets the code 0 of uint8: a second moment that vanished would make the next
update as large as the learning rate allows. Which states cannot be negative is proved from the
rule's program (`fused.program.signs`).

The dtype of codes tells the law, so stored states explain themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["BLOCK", "StateFormat", "StateFormats", "decode", "encode", "format_of", "scale_key"]

StateFormat = Literal["fp32", "bf16", "int8"]

StateFormats = Mapping[str, StateFormat] | Literal["8bit", "bf16"] | None
"""What a user asks for: a format by state name, or one for all states."""

BLOCK = 32

TOP = {torch.int8: 127, torch.uint8: 255}
"""The largest code of each kind."""

_ALL: dict[str, StateFormat] = {"8bit": "int8", "bf16": "bf16"}
_FORMATS = ("fp32", "bf16", "int8")


def scale_key(name: object) -> str:
    """The key, in a parameter's state, of the scales that belong to the codes called `name`.

    >>> scale_key("exp_avg")
    'exp_avg.scale'
    """
    return f"{name}.scale"


def scales_in(entry: Mapping[Any, Any], name: Any) -> Tensor | None:
    """The scales of what a parameter's state holds under `name`, if these are codes of ours.

    A rule may have states of such names itself.

    >>> import torch
    >>> codes, scales = encode(torch.ones(40), torch.int8)
    >>> scales_in({"m": codes, "m.scale": scales}, "m") is scales
    True
    >>> scales_in({"m": torch.ones(40), "m.scale": torch.ones(40)}, "m")
    """
    codes, scales = entry.get(name), entry.get(scale_key(name))
    if not isinstance(codes, Tensor) or not isinstance(scales, Tensor) or codes.dtype not in TOP:
        return None
    fits = scales.is_floating_point() and scales.shape == (num_blocks(codes.numel()),)
    return scales if fits else None  # a checkpoint may have widened them


def check_formats(state_formats: Any) -> None:
    """Refuse what is no format before any state exists to name.

    Raises:
        ValueError: for an unknown format or word.
        TypeError: for anything but a word or a mapping of names.
    """
    if state_formats is None:
        return
    if isinstance(state_formats, str):
        if state_formats not in _ALL:
            raise ValueError(
                f"state_formats={state_formats!r}; use '8bit' or 'bf16' for all states, or a "
                f"mapping such as {{'exp_avg': 'bf16', 'exp_avg_sq': 'int8'}}"
            )
        return
    if not isinstance(state_formats, Mapping):
        raise TypeError(
            f"state_formats is a {type(state_formats).__name__}; use '8bit', 'bf16', or a mapping "
            f"of state names to 'fp32', 'bf16' or 'int8'"
        )
    for name, format in state_formats.items():
        if format not in _FORMATS:
            raise ValueError(f"state_formats[{name!r}]={format!r}; use 'fp32', 'bf16' or 'int8'")


def format_of(name: str, state_formats: StateFormats) -> StateFormat:
    """The format asked for a state; FP32 if nothing is said of it.

    >>> format_of("exp_avg", {"exp_avg": "bf16"}), format_of("exp_avg_sq", {"exp_avg": "bf16"})
    ('bf16', 'fp32')
    """
    if state_formats is None:
        return "fp32"
    if isinstance(state_formats, str):
        return _ALL[state_formats]
    return state_formats.get(name, "fp32")


def check_names(state_formats: StateFormats, states: Iterable[str], rule: str) -> None:
    """Refuse a format for a state that the rule does not keep.

    Raises:
        ValueError: with the names of the states that it keeps.
    """
    known = list(states)
    for name in () if state_formats is None or isinstance(state_formats, str) else state_formats:
        if name not in known:
            raise ValueError(
                f"state_formats names {name!r}, which {rule} does not keep for each element; its "
                f"states are {', '.join(known) or 'none'}"
            )


def check_keys(state_formats: StateFormats, keys: Iterable[Any], rule: str) -> None:
    """Refuse codes whose scales would be kept where the rule keeps something itself.

    Raises:
        ValueError: with the two names.
    """
    known = set(keys)
    for name in known:
        if format_of(name, state_formats) == "int8" and scale_key(name) in known:
            raise ValueError(
                f"{rule} keeps a state called {scale_key(name)!r}, where the scales of {name!r} in "
                f"8 bits would be. Give {name!r} another format, as in state_formats={{{name!r}: "
                f"'bf16'}}, or rename one of the two in the rule."
            )


def stored_dtype(format: StateFormat, *, non_negative: bool) -> torch.dtype:
    """What a state of this format is held in."""
    if format == "int8":
        return torch.uint8 if non_negative else torch.int8
    return torch.bfloat16 if format == "bf16" else torch.float32


def num_blocks(numel: int) -> int:
    """Scales that `numel` elements need."""
    return -(-numel // BLOCK)


@torch.no_grad()
def encode(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes of FP32 `values`, in their shape, and their scales, `[ceil(numel / 32)]` BF16 or None.

    Values must be finite, below 2^110, and not negative for `torch.uint8`. Blocks are of elements
    that follow each other in memory, which must have no gaps; an all-zero block has scale 0.

    >>> import torch
    >>> codes, scales = encode(torch.tensor([1.0, -0.25, 0.0]), torch.int8)
    >>> codes.tolist(), scales.tolist()
    ([127, -64, 0], [1.0])
    """
    if dtype not in TOP:
        return values.to(dtype), None
    blocks, top = _blocks(values), TOP[dtype]
    scales = blocks.abs().amax(1).bfloat16()
    wide = scales.float()[:, None]
    # Torch multiplies by the reciprocal of a Python number on CUDA; a tensor is divided by.
    unit = torch.where(wide > 0, wide.new_full((), top * top) / wide, 0.0)
    codes = ((blocks.abs() * unit).sqrt_() + 0.5).to(torch.int32).clamp_(max=top)
    if dtype == torch.uint8:
        codes = torch.where((codes == 0) & (blocks > 0), 1, codes)
    return _unblocked(torch.where(blocks < 0, -codes, codes).to(dtype), values), scales


@torch.no_grad()
def decode(codes: Tensor, scales: Tensor | None) -> Tensor:
    """The FP32 values that codes stand for, in their shape.

    >>> import torch
    >>> decode(torch.tensor([127, -64, 0], dtype=torch.int8), torch.tensor([1.0]))
    tensor([ 1.0000, -0.2540,  0.0000])
    """
    if codes.dtype not in TOP:
        return codes.float()
    assert scales is not None
    wide, blocks = scales.float()[:, None], _blocks(codes.float())
    top = wide.new_full((), TOP[codes.dtype])
    return _unblocked((blocks * blocks.abs() * wide).div_(top * top), codes)


def survives(values: Tensor, dtype: torch.dtype) -> bool:
    """Whether codes of these values stand for them, as near as their law allows.

    A code is off by half a step at most, `(1/top + 1/(4 top²)) * scale`, and clamped where the BF16
    scale was rounded down, by 2^-8 of it. Infinities and values beyond 2^110 do not survive.

    >>> survives(torch.tensor([1.0, -0.3]), torch.int8), survives(torch.tensor([-1.0]), torch.uint8)
    (True, False)
    """
    top, largest = TOP[dtype], _blocks(values).abs().amax(1, keepdim=True)
    error = (_blocks(decode(*encode(values, dtype))) - _blocks(values)).abs()
    return bool((error <= (1 / top + 0.25 / top**2 + 2**-8) * 1.01 * largest).all())


def _blocks(values: Tensor) -> Tensor:
    """`values` in order of memory as rows of 32, the last one filled up with zeros."""
    flat = values.as_strided((values.numel(),), (1,))
    padding = -flat.numel() % BLOCK
    return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, BLOCK)


def _unblocked(blocks: Tensor, like: Tensor) -> Tensor:
    """The reverse, with the shape and strides of `like`."""
    return blocks.reshape(-1)[: like.numel()].as_strided(like.shape, like.stride())
