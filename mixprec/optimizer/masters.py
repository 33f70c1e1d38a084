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
compared with the weight at each step and keeps its bits where the weight is still its rounding
(`agree`): writes through `.data` move no counter, so only a look can tell. A split master follows
by itself: the weight is its upper half, and of what was there only the remainder stays, less than
half of the weight's spacing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

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


def write(param: Tensor, stored: Tensor, master: Tensor, *, scratch: Tensor | None = None) -> None:
    """Set the weight to the rounding of `master` and `stored` to what restores its bits.

    May be done twice. `scratch` is int32 room shaped as `master`, which spares an allocation.
    """
    if stored.dtype != torch.int16:
        param.detach().copy_(master)
        if stored is not master:
            stored.copy_(master)
        return
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


def is_rounding(param: Tensor, master: Tensor) -> bool:
    """Whether every weight is its master, rounded to nearest even. Waits for the device."""
    weight = local(param.detach())
    return _same_bits(local(master).to(weight.dtype), weight)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether all elements of 16 bits are the same; four at once where they lie in a row.

    Torch compares integers one by one on a CPU: of 2^18 elements 105 us become 30.
    """
    both = left.view(torch.int16), right.view(torch.int16)
    if all(t.is_contiguous() and t.numel() % 4 == t.storage_offset() % 4 == 0 for t in both):
        return torch.equal(*(t.flatten().view(torch.int64) for t in both))
    return torch.equal(*both)


class MasterStore:
    """The masters of an optimizer's 16-bit parameters, each in its parameter's state.

    A master that is set before the rule has made its own state waits in `early`: a state that holds
    nothing but a master would tell rules and distributed checkpoints that there is nothing left to
    initialise. Nothing here keeps a parameter alive.
    """

    def __init__(self, choice: Literal["auto", "full", "split"]) -> None:
        self.choice = choice
        self.whole = False
        """Whether the rule sees all tensors at once, which takes full masters."""
        self.in_model = False
        """Whether 16-bit parameters are FP32 for now, see `MixedPrecision.masters_in_model`."""
        self.early: Any = WeakIdKeyDictionary()
        self.edited: Any = WeakIdKeyDictionary()
        """Parameters found to differ from their masters, until somebody clears it."""
        self._versions: Any = WeakIdKeyDictionary()
        """Versions that full masters were last seen to agree with."""

    def has(self, param: Tensor) -> bool:
        """Whether the parameter needs a master."""
        return param.dtype in LOW

    def storage(self, param: Tensor) -> Storage:
        """How the parameter's master is stored."""
        if param.dtype not in LOW:
            return "none"
        full = param.dtype == torch.float16 or self.choice == "full" or self.whole
        return "full" if full else "split"

    def stored(self, state: dict[Tensor, Any], param: Tensor) -> Tensor | None:
        """What is stored for the master, as it is; None if there is none yet."""
        found: Tensor | None = state.get(param, {}).get(MASTER)
        if found is None:
            found = self.early.get(param)
        return found

    def known(self, state: dict[Tensor, Any], param: Tensor) -> bool:
        """Whether the parameter has a master that may differ from it."""
        # A rule may keep a state of this name for an FP32 parameter, which has no master.
        masters = self.has(param) or self.in_model
        return masters and (MASTER in state.get(param, ()) or param in self.early)

    def current(self, state: dict[Tensor, Any], param: Tensor) -> Tensor:
        """What to store for the master now: up to date with the weight, as `storage` wants it.

        Changes nothing but a full master in place, where the weight was written by somebody else.
        """
        stored, storage = self.stored(state, param), self.storage(param)
        if stored is None:
            return begin(param, storage)
        if stored.dtype == torch.int16:
            return stored if storage == "split" else read(param, stored)
        self._follow(param, stored)
        if storage == "full":
            return stored
        weight, remainder = formats.split(local(stored))
        # The weight may be the other rounding of the master: it becomes the one that joins.
        local(param.detach()).copy_(weight)
        return remainder

    def put(self, state: dict[Tensor, Any], param: Tensor, stored: Tensor) -> None:
        """Store a master whose weight is its rounding."""
        state[param][MASTER] = stored
        self.early.pop(param, None)
        if stored.dtype != torch.int16:
            self._versions[param] = param._version

    def master(self, state: dict[Tensor, Any], param: Tensor) -> Tensor:
        """The FP32 master as of now, without changing anything; the parameter itself if FP32."""
        if not self.has(param):
            return param.detach()
        stored = self.stored(state, param)
        if stored is None:
            return param.detach().float()
        if stored.dtype == torch.int16:
            return read(param, stored)
        agreed = agree(param, stored)
        return stored if torch.equal(local(agreed), local(stored)) else agreed

    def set(self, state: dict[Tensor, Any], param: Tensor, master: Tensor) -> None:
        """Make `master` the parameter's master and its rounding the weight."""
        stored = self.stored(state, param)
        if stored is None:
            stored = begin(param, "full")
            self.early[param] = stored
        write(param, stored, master)

    def forget_versions(self) -> None:
        """Compare every full master with its weight at the next step, whatever torch counted."""
        self._versions.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"choice": self.choice, "whole": self.whole, "early": list(self.early.items())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["choice"])
        self.whole = state["whole"]
        for param, master in state["early"]:
            self.early[param] = master

    def _follow(self, param: Tensor, master: Tensor) -> None:
        """Read a master again where its weight was written by somebody else.

        On a device nobody waits to see whether there is such an element, unless torch's version
        counter says that there may be.
        """
        on_host = param.device.type == "cpu"
        if not on_host and self._versions.get(param) == param._version:
            master.copy_(agree(param, master))
            return
        if is_rounding(param, master):
            return
        agreed = agree(param, master)
        if not torch.equal(local(agreed), local(master)):
            master.copy_(agreed)
            self.edited[param] = None


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
        if not numel:
            return torch.empty_like(like, dtype=torch.float32, requires_grad=False)
        flat = self._room[key][start : start + numel]
        if like.is_contiguous():
            return flat.view(like.shape)
        # A rule may reduce over the tensor, and the order of a reduction follows the strides.
        return flat.as_strided(like.shape, torch.empty_like(like, device="meta").stride())

    def is_kept(self, use: str, views: Sequence[Tensor] = ()) -> bool:
        """Whether anybody but those of `views` that lie in it holds on to room of this use."""
        for room in (room for key, room in self._room.items() if key[1] == use):
            start = room.data_ptr()
            end = start + 4 * room.numel()
            ours = sum(start <= view.data_ptr() < end for view in views)
            storage = room.untyped_storage()
            # One holder is the room itself, and one the object that was just made to ask.
            if torch._C._storage_Use_Count(storage._cdata) != 2 + ours:
                return True
        return False

    def owned(self, tensor: Tensor) -> Tensor:
        """`tensor`, with memory of its own if it lies in room of this scratch."""
        if tensor.layout != torch.strided:
            return tensor
        rooms = {room.untyped_storage().data_ptr() for room in self._room.values()}
        return tensor.clone() if local(tensor).untyped_storage().data_ptr() in rooms else tensor

    def give_away(self, use: str) -> None:
        """Leave room of this use to whoever holds on to it; the next bucket gets another."""
        self._room = {key: room for key, room in self._room.items() if key[1] != use}

    def has_room(self, use: str) -> bool:
        return any(key[1] == use for key in self._room)

    def used(self, device: torch.device, use: str) -> Tensor:
        """All that was taken since `reserve`, as one vector."""
        key = (device, use)
        if key not in self._room:  # nothing but tensors without elements was taken
            return torch.empty(0, dtype=torch.float32, device=device)
        return self._room[key][: self._used[key]]

    @staticmethod
    def padded(numel: int) -> int:
        """`numel` rounded up so that the next tensor starts aligned."""
        return -(-numel // Scratch.ALIGNMENT) * Scratch.ALIGNMENT


def nested(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """`value` with `change` applied to every tensor in its lists, tuples, deques and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, deque):
        return deque((nested(v, change) for v in value), value.maxlen)
    if isinstance(value, dict):
        return {k: nested(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(nested(v, change) for v in value)
    return value
