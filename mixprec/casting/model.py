"""Casting a model to a 16-bit format around islands of FP32.

Some modules lose too much in 16 bits: a norm sums squares over a whole row, and batch statistics
move by less than half a BF16 step at a time. Such a module stays in FP32 while its neighbours speak
16 bits, so its edges translate: one hook widens the 16-bit inputs of `forward`, another narrows its
FP32 outputs. Nothing is wrapped or replaced; names, parameters and state dict stay what they were.
The price is a cast of the activations on each side.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from mixprec import formats
from mixprec.casting import losses as cast_losses
from mixprec.casting.losses import Loss
from mixprec.formats import FP32, Format
from mixprec.text import aligned
from mixprec.user_warnings import Said

__all__ = ["NORMS", "Report", "Row", "convert", "matches", "nearest", "refuse_text"]

NORMS = "*norm*"
"""Pattern of the modules kept in FP32 by default: few parameters, statistics over many values."""


@dataclass(frozen=True)
class Row:
    """What `convert` did to the floating tensors that one module owns."""

    module: str
    kind: str
    num_parameters: int
    before: str
    after: str
    reason: str
    num_buffered: int = 0
    """Values in floating-point buffers."""


@dataclass(frozen=True)
class Report:
    """One `Row` for each module that owns floating tensors, and a `Loss` for each tensor that lost
    more than a parameter's last digits; printed as a table and sentences.
    """

    rows: tuple[Row, ...]
    losses: tuple[Loss, ...]
    """Tensors of which values became inf or 0, and buffers of which values were rounded."""

    def __str__(self) -> str:
        if not self.rows:
            return "no floating tensors"
        buffered = any(row.num_buffered for row in self.rows)
        cells = [
            (
                row.module,
                row.kind,
                f"{row.num_parameters} parameters",
                *([f"{row.num_buffered} in buffers" * bool(row.num_buffered)] if buffered else []),
                f"{row.before} -> {row.after}",
                row.reason,
            )
            for row in self.rows
        ]
        return "\n".join(
            [aligned(cells, right={2, 3} if buffered else {2}), *map(str, self.losses)]
        )


def convert(model: nn.Module, format: Format, *, keep_fp32: Sequence[str] = (NORMS,)) -> Report:
    """What was done to each module of `model`, now in `format` with FP32 islands, in place.

    `mixprec.cast_model` says which modules a pattern keeps, and what is refused.

    >>> from mixprec import formats
    >>> from mixprec.casting.model import convert
    >>> print(convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), formats.FP16))
    0  Linear     20 parameters  fp32 -> fp16
    1  LayerNorm   8 parameters  fp32 -> fp32  matches '*norm*'
    """
    kept = _kept_modules(model, keep_fp32)
    _check_tensors(model, kept)
    cast = ((name, each) for name, each in _named_tensors(model) if _parent(name) not in kept)
    losses = cast_losses.losses(cast, format)
    if fault := cast_losses.warning(losses, format, keep_fp32):
        Said().warn("cast", fault)  # before the cast: where warnings are errors nothing is changed
    rows: list[Row] = []
    neighbour = next((p for n, p in model.named_parameters() if _parent(n) not in kept), None)
    for name, module in model.named_modules():
        for handle in vars(module).pop("_fp32_island_hooks", ()):
            handle.remove()
        held = FP32 if name in kept else format
        before = {
            formats.by_dtype(tensor.dtype).name
            for tensor in _own_tensors(module)
            if tensor.is_floating_point()
        }
        # Not .to(): that recurses, and would round the islands below before they are reached.
        module._apply(functools.partial(_float_to, dtype=held.dtype), recurse=False)
        if name in kept and _parent(name) not in kept and format != FP32:
            _make_island(module, format.dtype, neighbour)
        if before:
            kind, seen = type(module).__name__, "+".join(sorted(before))
            sizes = _num_values(module.parameters(recurse=False))
            buffered = _num_values(module.buffers(recurse=False))
            why = kept.get(name, "")
            rows.append(Row(name or "(model)", kind, sizes, seen, held.name, why, buffered))
    return Report(tuple(rows), losses)


def _num_values(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def _kept_modules(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Why each module that stays in FP32 does, by the module's name."""
    refuse_text("keep_fp32", patterns)
    kept: dict[str, str] = {}
    unused = set(patterns) - {NORMS}
    for name, module in model.named_modules(remove_duplicate=False):
        matching = [pattern for pattern in patterns if matches(pattern, name, module)]
        unused.difference_update(matching)
        if matching:
            kept[name] = f"matches {matching[0]!r}"
        elif _parent(name) in kept:
            kept[name] = f"inside {_parent(name) or 'the model'}"
    if unused:
        pattern = min(unused, key=list(patterns).index)
        names = [name for name, _ in model.named_modules() if name]
        raise ValueError(
            f"keep_fp32 pattern {pattern!r} matches no module, so nothing would be kept for it. "
            f"Modules with similar names: {nearest(pattern, names)}"
        )
    return kept


def refuse_text(option: str, patterns: object) -> None:
    """A TypeError for patterns given as one string, whose letters would be the patterns."""
    if isinstance(patterns, str):
        raise TypeError(f"{option} is a sequence of patterns; write {option}=({patterns!r},)")


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The names that a mistyped pattern may have meant, for an error.

    >>> nearest("lm_haed", ["embedding", "lm_head"]), nearest("x", [])
    ('lm_head, embedding', 'none')
    """
    return ", ".join(difflib.get_close_matches(pattern, list(names), n=3, cutoff=0)) or "none"


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether `pattern` means the module called `name`; `mixprec.cast_model` says what it may be.

    >>> matches("*.down", "blocks.3.down", nn.Linear(2, 2)), matches("linear", "0", nn.Linear(2, 2))
    (True, True)
    """
    if pattern == NORMS and next(module.children(), None) is not None:
        # A container named after the norm inside it, say PreNorm, is no norm unless it owns weights
        # or statistics as one does.
        if not _own_tensors(module):
            return False
    candidates = [name] if "." in pattern else [name.rpartition(".")[2], type(module).__name__]
    return any(fnmatchcase(candidate.lower(), pattern.lower()) for candidate in candidates)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name that it has."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _parent(name: str) -> str | None:
    """Name of the module that holds `name`; the root has none."""
    return name.rpartition(".")[0] if name else None


def _check_tensors(model: nn.Module, kept: dict[str, str]) -> None:
    """Refuse what has no place in either format, before anything is changed."""
    seen: dict[int, tuple[str, bool]] = {}
    for name, tensor in _named_tensors(model):
        if is_lazy(tensor):
            raise ValueError(
                f"{name!r} has no shape yet; run a batch through the model first, then cast it"
            )
        is_kept = _parent(name) in kept
        known = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
        if tensor.is_complex() and not is_kept:
            raise TypeError(
                f"{name!r} is {tensor.dtype}, which has no 16-bit counterpart; keep its module as "
                f"it is with keep_fp32=({_parent(name) or type(model).__name__!r},)"
            )
        if not tensor.is_floating_point():
            continue
        if not known:
            raise TypeError(
                f"{name!r} is {tensor.dtype}, and a cast would change its digits unasked; call "
                "float() on its module first if FP32 is meant"
            )
        other, other_is_kept = seen.setdefault(id(tensor), (name, is_kept))
        if is_kept != other_is_kept:
            inside, outside = (name, other) if is_kept else (other, name)
            raise ValueError(
                f"{inside!r} would stay in FP32, but it is one tensor with {outside!r}, which "
                "would not. Name both modules in keep_fp32, or neither."
            )


def _float_to(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _make_island(module: nn.Module, outside: torch.dtype, neighbour: nn.Parameter | None) -> None:
    # The handles live on the module for two reasons: a second cast has to find the hooks of the
    # first, and unpickling a handle keeps torch from giving its number to another hook.
    narrow = functools.partial(_narrow_outputs, dtype=outside, neighbour=neighbour)
    module._fp32_island_hooks = (  # pyright: ignore[reportArgumentType]
        module.register_forward_pre_hook(_widen_inputs, with_kwargs=True),
        module.register_forward_hook(narrow),
    )


def _widen_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    narrow = (torch.bfloat16, torch.float16)
    return tree_map_only(Tensor, lambda t: t.float() if t.dtype in narrow else t, (args, kwargs))


def _narrow_outputs(
    module: nn.Module,
    args: Any,
    output: Any,
    *,
    dtype: torch.dtype,
    neighbour: nn.Parameter | None,
) -> Any:
    """Outputs in the model's 16 bits, unless its masters stand in for its weights just now."""
    if neighbour is not None and neighbour.dtype == torch.float32:
        return output
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, output)
