"""FP8 weights that FSDP2 gathers as bytes: half the traffic, and the same numbers.

Where a weight's multiplier is a power of two known before the weight is gathered, each rank can
cast its own rows before they travel. Every value is rounded once and by the same multiplier, so
what arrives is to the bit what a cast of the gathered weight would give.

FSDP2 asks the local tensor of a sharded parameter for two methods. `WeightShard` adds them to a
plain tensor, and is in every other way one: what an operation makes of it is a plain tensor, and so
is what a state dict or a pickle holds. The gathered parameter is a `GatheredWeight`, bytes that
have the shape and dtype of the weight, and read as its rounded values.

An adaptive exponent must be the same on all ranks, which see different rows. It is fitted to the
largest value of all ranks in the first gathering, and what its casts have counted since is summed
over ranks, of all weights in one small message, when an optimizer that holds them is about to step.
Counts that are not summed move nothing: so no rank waits for another, or goes its own way, because
of an optimizer that it alone has.
"""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map_only

from mixprec.devices import is_capturing
from mixprec.float8.casts.cast import cast_scaled
from mixprec.float8.casts.counters import AMAX_BITS
from mixprec.float8.exponents import scale_for
from mixprec.float8.operand import Operand
from mixprec.gradients import local

__all__ = ["ByteGather", "GatheredWeight", "WeightShard"]


class ByteGather:
    """Casts one weight's shards before they are gathered.

    Args:
        operand: how; static or adaptive.
    """

    def __init__(self, operand: Operand) -> None:
        self.operand = operand
        self.uncounted = torch.zeros_like(operand.counters)
        """What casts counted on this rank and no other has heard of."""
        self.has_counted = False
        _listen()

    def mark(self, weight: Any) -> None:
        """Have FSDP2 gather the DTensor `weight`, cut along its rows, by this."""
        if getattr(weight._local_tensor, "by", None) is self:
            return
        *others, last = weight.placements
        if last.is_shard(0) and all(placement.is_replicate() for placement in others):
            weight._local_tensor = _shard(weight._local_tensor, self)

    def cast(self, rows: Tensor, size: torch.Size, mesh: Any) -> Tensor:
        """The bytes of this rank's `rows`, uint8, with zeros for as many as the first rank has."""
        operand = self.operand
        operand.move_to(rows.device)
        if not (operand.settled or operand.fitted):
            operand.scale.copy_(scale_for(_largest(rows, mesh), operand.cast.format))
            operand.fitted = True
        counters = operand.counters
        if operand.cast.scaling == "adaptive":
            counters = self.uncounted = self.uncounted.to(rows.device)
            self.has_counted = True
        format, num_rows = operand.cast.format, rows.shape[0]
        most = -(-size[0] // mesh.size())
        codes = rows.new_empty(most, size[1], dtype=torch.uint8)
        own = codes if num_rows == most else codes[:num_rows]
        cast_scaled(rows, format, operand.scale, counters, out=(own.view(format.dtype), None))
        if num_rows < most:
            codes[num_rows:].zero_()
        return codes

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _listen()


def _largest(rows: Tensor, mesh: Any) -> Tensor:
    """The largest magnitude over all ranks, inf if any is not finite."""
    found = rows.abs().amax().float() if rows.numel() else rows.new_zeros((), dtype=torch.float32)
    found = torch.where(found.isfinite(), found, float("inf"))
    dist.all_reduce(found, dist.ReduceOp.MAX, mesh.get_group())
    return found


# ------------------------------------------------------------------ before: a shard


class WeightShard(Tensor):
    """The rows of a weight that a rank holds, and how FSDP2 gathers them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]
    by: ByteGather

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: torch.Size, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What this rank sends, and what it keeps for `fsdp_post_all_gather`."""
        return (self.by.cast(self.as_subclass(Tensor), outer_size, mesh),), outer_size[0]

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Any = None,
    ) -> Any:
        """The gathered weight; FSDP2 keeps it, and fills the memory of its bytes each time."""
        scale = self.by.operand.scale
        if out is None:
            rows = all_gather_outputs[0].view(self.by.operand.cast.format.dtype)[:metadata]
            out = GatheredWeight(rows, scale.new_empty(1), param_dtype)
            out.take_factor(scale)
            return out, ()
        out.take_factor(scale)
        return None

    # FSDP2 asks for it before each call, and it takes longer to find out than to cast.
    fsdp_pre_all_gather.__signature__ = signature(fsdp_pre_all_gather)  # pyright: ignore[reportFunctionMemberAccess]

    # What FSDP2 itself makes of a shard, to pad it or to move it, must not lose this.

    def new_zeros(self, *args: Any, **kwargs: Any) -> Tensor:
        return _shard(super().new_zeros(*args, **kwargs), self.by)

    def narrow(self, *args: Any, **kwargs: Any) -> Tensor:
        return _shard(super().narrow(*args, **kwargs), self.by)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return _shard(super().to(*args, **kwargs), self.by)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return _shard(super().cpu(*args, **kwargs), self.by)

    def pin_memory(self, *args: Any, **kwargs: Any) -> Tensor:
        return _shard(super().pin_memory(*args, **kwargs), self.by)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


@torch.no_grad()
def _shard(rows: Tensor, by: ByteGather) -> Tensor:
    shard = rows.as_subclass(WeightShard)
    shard.by = by
    return shard


# ------------------------------------------------------------------ after: a gathered weight


class GatheredWeight(Tensor):
    """A weight of which FP8 bytes are there.

    It has the shape of the weight and the dtype of its gradient. Read by anything but an FP8 layer
    it is the rounded weight, computed for that use; it cannot be written to.

    Args:
        rows: FP8, `[out_features, in_features]`.
        factor: FP32, one element; multiply `rows` by it.
        dtype: to read as.
    """

    rows: Tensor
    factor: Tensor

    @staticmethod
    def __new__(
        cls: type[GatheredWeight], rows: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> GatheredWeight:
        made = Tensor._make_wrapper_subclass(cls, rows.shape, dtype=dtype, device=rows.device)
        made.rows, made.factor = rows, factor
        return made

    def __init__(self, rows: Tensor, factor: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self._taken: tuple[Tensor, int] | None = None
        self._in_graph = False
        """Whether a CUDA graph holds a gathering: replays may move `scale` past its version."""

    def take_factor(self, scale: Tensor) -> None:
        """Go on with the factor `scale[1]`, which is copied only if it may have moved."""
        self._in_graph |= is_capturing(scale.device)
        if not self._in_graph and self._taken is not None:
            tensor, version = self._taken
            if tensor is scale and version == scale._version:
                return
        # As FSDP2 does with the bytes: what is saved for a backward pass is written anew.
        with torch.autograd._unsafe_preserve_version_counter(self.factor):
            self.factor.copy_(scale[1:])
        self._taken = scale, scale._version

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"GatheredWeight({list(self.shape)}, {self.dtype}, held in {self.rows.dtype})"

    def read(self) -> Tensor:
        """The rounded weight."""
        return (self.rows.float() * self.factor).to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["rows", "factor"], self.dtype

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], dtype: torch.dtype, outer_size: Any, outer_stride: Any
    ) -> GatheredWeight:
        return GatheredWeight(inner["rows"], inner["factor"], dtype)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _ALIASES and _is_whole(args):
            return GatheredWeight(args[0].rows, args[0].factor, args[0].dtype)
        if func._schema.is_mutable:
            raise RuntimeError(
                f"{func} would write to a weight that was gathered in FP8, and is gone after its "
                "use. Change the sharded parameter instead, outside of the forward pass."
            )
        args, kwargs = tree_map_only(GatheredWeight, GatheredWeight.read, (args, kwargs or {}))
        return func(*args, **kwargs)


_ALIASES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.as_strided.default,
)


def _is_whole(args: tuple[Any, ...]) -> bool:
    """Whether an alias is of the whole weight, as it lies."""
    whole, *geometry = args
    return not geometry or (
        tuple(geometry[0]) == whole.shape and tuple(geometry[1]) == whole.stride()
    )


# ------------------------------------------------------------------ before a step


@cache
def _listen() -> None:
    register_optimizer_step_pre_hook(_before_step)


@torch.no_grad()
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Sum over ranks what was counted of the weights of this optimizer, which steps on all."""
    by_group: dict[Any, list[ByteGather]] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            shard = local(param)
            if isinstance(shard, WeightShard) and shard.by.has_counted:
                mesh = param.device_mesh
                by_group.setdefault(mesh.get_group(mesh.ndim - 1), []).append(shard.by)
    for process_group, gathers in by_group.items():
        _agree(gathers, process_group)


def _agree(gathers: list[ByteGather], group: Any) -> None:
    mine = torch.stack([gather.uncounted for gather in gathers])
    every = mine.new_empty(dist.get_world_size(group), *mine.shape)
    dist.all_gather(list(every), mine, group)
    agreed = every.sum(0)
    agreed[:, AMAX_BITS] = every[..., AMAX_BITS].amax(0)
    torch._foreach_copy_([gather.operand.counters for gather in gathers], list(agreed))
    for gather in gathers:
        gather.uncounted.zero_()
        gather.has_counted = False
