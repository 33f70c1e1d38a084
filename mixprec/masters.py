"""Where the FP32 master of a 16-bit parameter lives.

An update smaller than half the spacing of a 16-bit weight (2^-9 of its value in BF16) vanishes when
it is added to the weight. So the rule updates an FP32 master, and the model gets the master's
rounding. Two ways to store it:

    full   an FP32 tensor, 4 bytes a parameter; the weight is its rounding to nearest even
    split  an int16 remainder, 2 bytes: the BF16 weight is the upper half of the master, rounded to
           nearest with ties away from zero, and `join(weight, remainder)` is the master, bit by bit

FP16 has too few exponents to be half of an FP32 number, so its masters are full. FP32 and FP64
parameters are their own masters.

The weight is what the model computes with, so the weight wins over its master when somebody writes
it outside of a step: a checkpoint loaded late, a pruned or clamped weight. A full master is
compared with the weight and keeps its bits where the weight is still its rounding (`agree`). A
split master follows by itself: the weight is its upper half, and of what was there only the
remainder stays, less than half of the weight's spacing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mixprec import formats
from mixprec.gradients import local

MASTER = "master"
"""The key of the master in a parameter's optimizer state."""

Storage = Literal["none", "full", "split"]

LOW = (torch.bfloat16, torch.float16)


def begin(param: Tensor, storage: Storage) -> Tensor:
    """What to store for a master that is exactly `param`."""
    if storage == "split":
        return torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    return param.detach().float()


def read(
    param: Tensor, stored: Tensor, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """The FP32 master. A full one is `stored` itself; a split one is written to `out` or is new.

    `spare` is FP32 room of the same shape that may be overwritten; it spares an allocation.

    >>> import torch
    >>> weight = torch.tensor([1.0], dtype=torch.bfloat16)
    >>> read(weight, torch.tensor([1], dtype=torch.int16)).item() - 1.0 == 2.0**-23
    True
    """
    if stored.dtype != torch.int16:
        return stored
    out = torch.empty_like(param, dtype=torch.float32, requires_grad=False) if out is None else out
    scratch = None if spare is None else local(spare).view(torch.int32)
    formats.join(local(param.detach()), local(stored), out=local(out), scratch=scratch)
    return out


def write(param: Tensor, stored: Tensor, master: Tensor, *, spent: bool = False) -> None:
    """Set the weight to the rounding of `master` and `stored` to what restores its bits.

    `spent` says that the values in `master` may be overwritten, which spares an allocation.
    """
    if stored.dtype != torch.int16:
        param.detach().copy_(master)
        if stored is not master:
            stored.copy_(master)
        return
    scratch = local(master).view(torch.int32) if spent else None
    formats.split(local(master), out=(local(param.detach()), local(stored)), scratch=scratch)


def agree(param: Tensor, master: Tensor) -> Tensor:
    """`master` where the weight is a rounding of it, the weight's value elsewhere.

    Both roundings count, nearest even and ties away, so a checkpoint of one storage keeps every bit
    in the other.

    >>> import torch
    >>> master = torch.tensor([1.0001, 5.0])
    >>> agree(torch.tensor([1.0, 3.0], dtype=torch.bfloat16), master)
    tensor([1.0001, 3.0000])
    """
    weight = param.detach()
    rounded = master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
    if weight.dtype == torch.bfloat16:
        away, _ = formats.split(local(master).contiguous())
        tie = away.view(torch.int16) == local(weight).contiguous().view(torch.int16)
        local(rounded).logical_or_(tie)
    return torch.where(rounded, master, weight.float())


class MasterStore:
    """The masters of an optimizer's 16-bit parameters, each in its parameter's state.

    A master that is set before the rule has made its own state waits in `early`: a state that holds
    nothing but a master would tell rules and distributed checkpoints that there is nothing left to
    initialise.
    """

    def __init__(self, choice: Literal["auto", "full", "split"]) -> None:
        self.choice = choice
        self.whole = False
        """Whether the rule sees all tensors at once, which takes full masters."""
        self.early: dict[Tensor, Tensor] = {}
        self.edited: list[Tensor] = []
        """Parameters found to differ from their masters, until somebody clears the list."""
        self._versions: dict[Tensor, int] = {}

    def has(self, param: Tensor) -> bool:
        """Whether the parameter needs a master."""
        return param.dtype in LOW

    def storage(self, param: Tensor) -> Storage:
        """How the parameter's master is stored."""
        if param.dtype not in LOW:
            return "none"
        full = param.dtype == torch.float16 or self.choice == "full" or self.whole
        return "full" if full else "split"

    def origin(self, state: dict[Tensor, Any], param: Tensor) -> Literal["state", "early", "new"]:
        """Where the parameter's master is; "new" if there is none yet."""
        if MASTER in state.get(param, ()):
            return "state"
        return "early" if param in self.early else "new"

    def known(self, state: dict[Tensor, Any], param: Tensor) -> bool:
        """Whether the parameter has a master that may differ from it."""
        return self.origin(state, param) != "new"

    def take(self, state: dict[Tensor, Any], param: Tensor) -> Tensor:
        """Remove from `state` what is stored for the master, brought up to date with the weight."""
        entry = state.get(param)
        stored: Tensor | None = entry.pop(MASTER, None) if entry else None
        if entry is not None and not entry:
            del state[param]  # rules initialise a state that is absent or empty
        stored = self.early.pop(param, None) if stored is None else stored
        storage = self.storage(param)
        if stored is None:
            return begin(param, storage)
        if stored.dtype == torch.int16:
            return stored if storage == "split" else read(param, stored)
        if self._versions.get(param) != param._version:
            self._follow(param, stored)
        if storage == "full":
            return stored
        remainder = begin(param, "split")
        write(param, remainder, stored)
        return remainder

    def put(self, state: dict[Tensor, Any], param: Tensor, stored: Tensor) -> None:
        """Store a master whose weight is its rounding."""
        state[param][MASTER] = stored
        if stored.dtype != torch.int16:
            self._versions[param] = param._version

    def written(self, params: list[Tensor]) -> None:
        """Take these weights for the roundings of their full masters: a kernel wrote both."""
        self._versions.update((param, param._version) for param in params)

    def master(self, state: dict[Tensor, Any], param: Tensor) -> Tensor:
        """The FP32 master as of now, without changing anything; the parameter itself if FP32."""
        if not self.has(param):
            return param.detach()
        stored: Tensor | None = state.get(param, {}).get(MASTER, self.early.get(param))
        if stored is None:
            return param.detach().float()
        if stored.dtype == torch.int16 or self._versions.get(param) == param._version:
            return read(param, stored)
        return agree(param, stored)

    def set(self, state: dict[Tensor, Any], param: Tensor, master: Tensor) -> None:
        """Make `master` the parameter's master and its rounding the weight."""
        entry = state.get(param) or {}
        stored = entry.get(MASTER)
        if stored is None:
            stored = self.early[param] = begin(param, "full")
        write(param, stored, master)
        if stored.dtype != torch.int16:
            self._versions[param] = param._version

    def forget_versions(self) -> None:
        """Compare every full master with its weight at the next step."""
        self._versions.clear()

    def _follow(self, param: Tensor, master: Tensor) -> None:
        agreed = agree(param, master)
        if not torch.equal(local(agreed), local(master)):
            master.copy_(agreed)
            self.edited.append(param)


class Scratch:
    """Bounded FP32 room for the masters and gradients of one bucket, reused by the next.

    `largest` is the most elements that a bucket will reserve on each device. To grow later would
    hold the old room and the new one at once.
    """

    ALIGNMENT = 16  # elements: 64 bytes, a cache line and the widest vector load

    def __init__(self, largest: Mapping[torch.device, int] | None = None) -> None:
        self._largest = largest or {}
        self._room: dict[tuple[torch.device, str], Tensor] = {}
        self._used: dict[tuple[torch.device, str], int] = {}

    def reserve(self, device: torch.device, use: str, numel: int) -> None:
        """Make room for `numel` elements on `device`, all free."""
        key = (device, use)
        if numel and (key not in self._room or self._room[key].numel() < numel):
            numel = max(numel, self._largest.get(device, 0))
            self._room[key] = torch.empty(numel, dtype=torch.float32, device=device)
        self._used[key] = 0

    def rewind(self, use: str) -> None:
        """Make all room of this use free again, on every device."""
        for key in self._used:
            if key[1] == use:
                self._used[key] = 0

    def take(self, like: Tensor, use: str) -> Tensor:
        """Uninitialised FP32 room with the shape and strides of `like`."""
        key, numel = (like.device, use), like.numel()
        start = self._used[key]
        self._used[key] = start + Scratch.padded(numel)
        flat = self._room[key][start : start + numel] if numel else like.new_empty(0).float()
        if like.is_contiguous():
            return flat.view(like.shape)
        # A rule may reduce over the tensor, and the order of a reduction follows the strides.
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    def used(self, device: torch.device, use: str) -> Tensor:
        """All that was taken since `reserve`, as one vector."""
        key = (device, use)
        return self._room[key][: self._used[key]]

    @staticmethod
    def padded(numel: int) -> int:
        """`numel` rounded up so that the next tensor starts aligned."""
        return -(-numel // Scratch.ALIGNMENT) * Scratch.ALIGNMENT


def nested(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """`value` with `change` applied to every tensor in its lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: nested(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(nested(v, change) for v in value)
    return value
