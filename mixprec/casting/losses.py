"""What a cast makes of a model's tensors beyond rounding them: infinities and zeros.

FP16 ends at 65504, so the -1e9 of an attention mask becomes -inf; it turns 3e-8 and less into 0,
an epsilon of 1e-9 for one. BF16 ends 0.4 % below FP32, so `torch.finfo(torch.float32).min` becomes
-inf there as well. A cast says nothing of it, and the first loss that is NaN is far away.

Looked for before the cast, while the numbers are still there. A cast keeps zeros and infinities, so
how many it makes is a difference of two counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from mixprec.binades import MAX_FLUSHED
from mixprec.formats import BF16, FP32, Format
from mixprec.gradients import local

__all__ = ["Loss", "losses", "warning"]

_PIECE = 2**20
"""Elements looked at at once: bounds the scratch, about 12 bytes an element."""
_NAMED = 5
"""Tensors that a warning names."""


@dataclass(frozen=True)
class Loss:
    """What one tensor loses in a cast to `format`; printed as a sentence."""

    tensor: str
    """Its name in the model."""
    kind: str
    """"parameter" or "buffer"."""
    format: Format
    values: int
    infinities: int
    """Finite values that become inf or -inf."""
    zeros: int
    """Values that become 0 and were not."""
    rounded: int
    """Other values of a buffer that change. Those of a parameter are not counted: most do."""
    largest: float
    """Largest finite magnitude before the cast."""
    error: float
    """Largest change of a buffer's value that stays finite."""

    @property
    def is_fault(self) -> bool:
        """Whether to warn of it: any infinity, or more than 5 % of the values become 0."""
        return self.infinities > 0 or self.zeros > MAX_FLUSHED * self.values

    def __str__(self) -> str:
        parts: list[str] = []
        if self.infinities:
            ends = f"{self.format} ends at {self.format.max:.6g}, the largest is {self.largest:.6g}"
            parts.append(f"{_become(self.infinities)} inf ({ends})")
        if self.zeros:
            tiny = self.format.smallest_subnormal / 2
            parts.append(f"{_become(self.zeros)} 0 ({self.format} makes 0 of {tiny:.2g} and less)")
        if self.rounded:
            parts.append(f"{self.rounded} rounded by up to {self.error:.2g}")
        number = "1 value" if self.values == 1 else f"{self.values} values"
        return f"{self.kind} {self.tensor!r}, {number}: {', '.join(parts)}"


def _become(number: int) -> str:
    return f"{number} become{'s' if number == 1 else ''}"


@torch.no_grad()
def losses(tensors: Iterable[tuple[str, Tensor]], format: Format) -> tuple[Loss, ...]:
    """A `Loss` for each of the named tensors that loses anything in a cast to `format`.

    Each tensor once, under its first name; of a DTensor this rank's part, of meta tensors nothing.
    The host waits for each.

    >>> from mixprec import formats
    >>> print(*losses([("mask", torch.tensor([0.0, -1e9]))], formats.FP16))
    buffer 'mask', 2 values: 1 becomes inf (fp16 ends at 65504, the largest is 1e+09)
    """
    if format == FP32:  # holds whatever a 16-bit format holds
        return ()
    found: list[Loss] = []
    seen: set[int] = set()
    for name, tensor in tensors:
        values = local(tensor)
        is_there = values.numel() > 0 and not values.is_meta
        if id(tensor) not in seen and tensor.is_floating_point() and is_there:
            seen.add(id(tensor))
            found.append(_look(name, tensor, values.detach().flatten(), format))
    return tuple(loss for loss in found if loss.infinities or loss.zeros or loss.rounded)


def warning(found: Sequence[Loss], format: Format, keep_fp32: Sequence[str]) -> str | None:
    """What to say of the faults among `found`, worst first; None if there are none."""
    faults = sorted((loss for loss in found if loss.is_fault), key=lambda loss: not loss.infinities)
    if not faults:
        return None
    named = [f"{loss}." for loss in faults[:_NAMED]]
    more = [f"And {len(faults) - _NAMED} tensors more."] if faults[_NAMED:] else []
    return " ".join(
        [f"a cast to {format} loses numbers.", *named, *more, *_advice(faults, keep_fp32)]
    )


def _advice(faults: Sequence[Loss], keep_fp32: Sequence[str]) -> list[str]:
    """Why it matters, and what to write."""
    worst = faults[0]
    owners = dict.fromkeys(loss.tensor.rpartition(".")[0] for loss in faults[:_NAMED])
    patterns = (*keep_fp32, *(owner for owner in owners if owner))
    ways = [f"keep_fp32={patterns!r}"] if any(owners) else []
    ways += ["'bf16', which has the range of FP32"] if worst.format != BF16 else []
    said = ["A product with inf is inf or NaN." if worst.infinities else "Divided by, 0 gives inf."]
    if ways:
        said.append(f"Use {' or '.join(ways)}.")
    if worst.infinities:
        limit, name = f"{worst.format.max:.6g}", f"model.get_{worst.kind}({worst.tensor!r})"
        said.append(
            f"Where the numbers only have to be large, as in a mask, make them fit before: "
            f"{name}.detach().clamp_(-{limit}, {limit})."
        )
    return said


def _look(name: str, tensor: Tensor, values: Tensor, format: Format) -> Loss:
    is_buffer = not isinstance(tensor, nn.Parameter)
    infinities = zeros = rounded = 0
    largest = error = 0.0
    for piece in values.split(_PIECE):
        cast = piece.to(format.dtype)
        new_infinities = cast.isinf().count_nonzero() - piece.isinf().count_nonzero()
        new_zeros = piece.count_nonzero() - cast.count_nonzero()  # a NaN is not 0 in either
        counts = torch.stack([new_infinities, new_zeros]).tolist()
        infinities, zeros = infinities + counts[0], zeros + counts[1]
        if counts[0]:
            largest = max(largest, _largest(piece))
        if is_buffer:
            change = (cast.float() - piece.float()).nan_to_num(nan=0.0, posinf=inf, neginf=-inf)
            rounded += int(change.count_nonzero()) - sum(counts)
            error = max(error, _largest(change))
    kind = "buffer" if is_buffer else "parameter"
    return Loss(name, kind, format, len(values), infinities, zeros, rounded, largest, error)


def _largest(values: Tensor) -> float:
    """Largest finite magnitude."""
    return values.float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().amax().item()
