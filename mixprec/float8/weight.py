"""A weight in FP8, with its transpose, cast once a step.

Between two optimizer steps a weight is read by every micro-batch, forward and backward, and again
by recomputation. The cast is kept until the weight is another tensor, has other memory, was written
in place (its version counter tells), or an optimizer has stepped that holds it. A frozen weight is
cast again after a step of any optimizer.

Writes through `.data` leave no trace: merging an adapter, clamping, averaging weights, storing and
restoring them around an evaluation. They happen between steps, or where nothing is trained. So a
cast is kept for training alone, where a layer in training mode records what autograd goes back
through, and only once a backward pass has come through it: micro-batches follow such a pass, and
recomputation is part of one. Without gradients, and in evaluation mode, the weight that is there is
cast at every use, into memory that is freed again. What remains, a write through `.data` between
two micro-batches of one step, has to be told (`Precision.recast`).

While a CUDA graph is captured a weight is cast, so that replays cast too, and from then on at every
use, because replays may change it and leave no trace.

The price is two bytes a parameter. Constant factors of the layer's products are folded into the
scales of its weight, where they cost nothing.

A weight that FSDP2 gathers for each use, and frees again, gets no copy that stays: two bytes for
each parameter of the whole would be more than its shards take. Its rows are cast in the forward
pass, and its columns in the backward pass, from what is gathered anew for that.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mixprec.devices import is_capturing
from mixprec.float8.casts.cast import Operand8, cast_scaled, has_kernel
from mixprec.float8.exponents import follow_weight
from mixprec.float8.late_cast import late_cast
from mixprec.float8.operand import Operand, cast_as, cast_named, settle_at
from mixprec.float8.operators import operator
from mixprec.float8.sharded.all_gather import ByteGather, GatheredWeight
from mixprec.gradients import local

__all__ = ["CachedWeight"]


class CachedWeight:
    """The FP8 copies of one weight `[out_features, in_features]`, and what they were made of.

    Args:
        operand: how to cast it.
        weight: decides shape and device; nothing is cast yet.
    """

    def __init__(self, operand: Operand, weight: Tensor) -> None:
        self.operand = operand
        self.held: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.is_gathered = False
        """Whether the weight is whole only while it is used, as under FSDP2."""
        self.by_bytes: ByteGather | None = None
        """How FSDP2 gathers it, if not in 16 bits."""
        self._placements: Any = None
        # No reference, not even a weak one: `Module.to` could not swap such a DTensor.
        self._put: int | None = None
        self._made_of: tuple[StorageWeakRef, list[Any]] | None = None
        self._is_frozen = False
        """Whether they were made of a weight that no optimizer trains."""
        self._in_graph = False
        """Whether a CUDA graph holds a cast: replays may change the weight past every counter."""
        self._grad: tuple[int, int] | None = None
        """Tells the gradient of the weight apart from later ones; None if it has none to come."""
        self.allocate(weight)
        if not weight.is_meta:
            operand.settle(weight.detach())

    def put(self, weight: Tensor) -> None:
        """`weight` has become the layer's. A DTensor that gives way to another layout is gathered.

        FSDP2 puts the shards back after each use; `parallelize_module` puts them there for good.
        """
        self._put = id(weight)
        placements, before = getattr(weight, "placements", None), self._placements
        if placements is None and before is None:
            self.replaced()
            return
        if before is None:
            self.operand.fitted = False  # at first use, to what then is the same on all ranks
        self.is_gathered |= before is not None and placements != before
        if placements is not None:
            self._placements = placements
            if self.by_bytes is not None:
                self.by_bytes.mark(weight)
        self.allocate(weight)

    def allocate(self, weight: Tensor) -> None:
        """Memory for the copies on the device of `weight`, which may be new, or of its shard."""
        self.forget()
        self.held = None
        if self.is_gathered or weight.is_meta:
            return
        weight = local(weight)
        self.operand.move_to(weight.device)
        fp8, device = self.operand.cast.format.dtype, weight.device
        out_features, in_features = weight.shape
        scales = ((out_features, 1), (in_features, 1)), ((1,), (1,))
        for_rows, for_cols = scales[self.operand.cast.scaling != "rowwise"]
        # Scales are tensors of their own: a product takes none that is not aligned to 16 bytes.
        with torch.inference_mode(False):  # they are for training too, whoever comes first
            self.held = (
                torch.empty(out_features, in_features, dtype=fp8, device=device),
                torch.empty(in_features, out_features, dtype=fp8, device=device),
                torch.empty(for_rows, dtype=torch.float32, device=device),
                torch.empty(for_cols, dtype=torch.float32, device=device),
            )
        _at_address[self.held[0].data_ptr()] = self
        follow_weight(self)

    def __call__(self, weight: Tensor, output: float, grad_input: float, keep: bool) -> Operand8:
        """The copies of `weight`, scaled for the products output and grad_input.

        Args:
            keep: serve later calls too. Otherwise, as for a weight that is gathered, `cols` is None
                and made by `late_cols`, if there is a backward pass.
        """
        compiling = torch.compiler.is_compiling()
        if isinstance(weight, GatheredWeight):
            factor = _times(weight.factor, output)
            return Operand8(weight.rows, None, factor, factor)
        if self.is_gathered or not keep:
            made = self.operand(weight, cols=False)
            factor = _times(made.row_scale, output)
            return made._replace(row_scale=factor, col_scale=factor)
        if not compiling and (self.held is None or self.held[2].device != weight.device):
            self.allocate(weight)
        if self.held is None:
            return _scaled(self.operand(weight), output, grad_input)
        operand, held = self.operand, self.held
        plan = operand.cast.format.name, operand.cast.scaling, operand.cast.power_of_two
        refresh = _refresh
        if compiling:
            refresh = _kept_op if has_kernel(weight.device) else _refresh_op
        refresh(weight, *held, *plan, operand.scale, operand.counters, output, grad_input)
        return Operand8(*held)

    def late_cols(
        self, weight: Tensor, grad_output: Tensor, grad_input: float, scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The transpose of a gathered weight and its factor, in the backward pass.

        Args:
            weight: as gathered for the backward pass.
            grad_output: what the compiler must wait for.
            scale: the operand's, where the compiler has traced it.
        """
        cast = self.operand.cast
        scale = self.operand.scale if scale is None else scale
        if isinstance(weight, GatheredWeight):
            cols, _ = late_cast(weight.rows, grad_output, cast, scale)
            return cols, _times(weight.factor, grad_input)
        cols, factor = late_cast(weight, grad_output, cast, scale)
        return cols, _times(factor, grad_input)

    def is_made_of(self, weight: Tensor, output: float, grad_input: float) -> bool:
        """Whether the copies are those of `weight` as it is now."""
        if self._made_of is None or self._in_graph or is_capturing(weight.device):
            return False
        storage, signs = self._made_of
        # Held weakly, so that no later memory has its address.
        same_memory = storage.cdata == weight.untyped_storage()._cdata
        return same_memory and signs == _signs(weight, output, grad_input)

    def has_gone_back(self, weight: Tensor) -> bool:
        """Whether a backward pass has come or comes through `weight` since the copies were made."""
        if self._grad is None or torch._C._current_graph_task_id() != -1:
            return True
        return self._grad != _grad_signs(weight)

    def note(self, weight: Tensor, output: float, grad_input: float) -> None:
        """The copies were made of `weight` just now."""
        self._grad = _grad_signs(weight)
        self._in_graph |= is_capturing(weight.device)
        self._is_frozen = not weight.requires_grad
        storage = StorageWeakRef(weight.untyped_storage())
        self._made_of = storage, _signs(weight, output, grad_input)

    def forget(self) -> None:
        """Cast anew at the next use."""
        self._made_of = None

    def replaced(self) -> None:
        """Cast anew, by an exponent for other values, unless ranks have agreed on it."""
        self.forget()
        if self._placements is None:
            self.operand.unsettle()

    def forget_if_of(self, identities: set[int]) -> None:
        """Cast anew after a step that trained the tensors of these `id`s, if made of one of them.

        A frozen weight goes with every step: what is written into it, no step announces.
        """
        made_of = None if self._made_of is None else self._made_of[1][0]
        if self._is_frozen or made_of in identities or self._put in identities:
            self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "operand": self.operand,
            "is_gathered": self.is_gathered,
            "by_bytes": self.by_bytes,
            "_placements": self._placements,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.held = self._made_of = self._put = self._grad = None
        self._in_graph = self._is_frozen = False


_at_address: weakref.WeakValueDictionary[int, CachedWeight] = weakref.WeakValueDictionary()
"""Who owns the copies, by where the rows lie; an operator is given nothing but tensors."""


def _signs(weight: Tensor, output: float, grad_input: float) -> list[Any]:
    # No reference to it, not even a weak one, with which `torch.utils.swap_tensors` refuses it.
    address, trains = weight.data_ptr(), weight.requires_grad
    return [id(weight), address, weight._version, trains, output, grad_input]


def _grad_signs(weight: Tensor) -> tuple[int, int] | None:
    if not (weight.requires_grad and weight.is_leaf):
        return None
    return id(weight.grad), -1 if weight.grad is None else weight.grad._version


def _times(factor: Tensor, multiplier: float) -> Tensor:
    """A product that is not launched where it changes nothing."""
    return factor if multiplier == 1 else factor * multiplier


def _scaled(operand: Operand8, output: float, grad_input: float) -> Operand8:
    rows, cols, row_scale, col_scale = operand
    return Operand8(rows, cols, _times(row_scale, output), _times(col_scale, grad_input))


def _refresh(
    weight: Tensor,
    rows: Tensor,
    cols: Tensor,
    row_scale: Tensor,
    col_scale: Tensor,
    format: str,
    scaling: str,
    power_of_two: bool,
    scale: Tensor,
    counters: Tensor,
    output: float,
    grad_input: float,
) -> None:
    """Write the copies of `weight` unless they are there."""
    owner = _at_address.get(rows.data_ptr())
    is_known = owner is not None and owner.is_made_of(weight, output, grad_input)
    if owner is not None and is_known and owner.has_gone_back(weight):
        return
    plan = cast_named(format, scaling, power_of_two)
    settle_at(weight, scale)
    # A layer that is used twice in a pass goes backward twice, with the bytes of this last cast.
    same = (rows, cols, row_scale, col_scale) if is_known else ()
    with torch.autograd._unsafe_preserve_version_counter(same):
        if plan.has_exponent:
            made = cast_scaled(weight, plan.format, scale, counters, out=(rows, cols))
        else:
            made = cast_as(plan, weight, scale, counters, True, True)
            rows.copy_(made.rows)  # pyright: ignore[reportArgumentType]
            cols.copy_(made.cols)  # pyright: ignore[reportArgumentType]
        torch.mul(made.row_scale.view_as(row_scale), output, out=row_scale)
        torch.mul(made.col_scale.view_as(col_scale), grad_input, out=col_scale)
    if not is_known:
        # A kernel writes without telling autograd, which would then go backward with other bytes.
        torch.autograd.graph.increment_version((rows, cols))
    if owner is not None:
        owner.note(weight, output, grad_input)


_SCALES = "row_scale", "col_scale", "counters"
_refresh_op = operator(
    "float8_weight", _refresh, lambda *arguments: None, mutates=("rows", "cols", *_SCALES)
)
_kept_op = operator("float8_kept_weight", _refresh, lambda *arguments: None, mutates=_SCALES)
"""Does not say that it writes rows and columns. If it did, the recomputation of a checkpoint, once
compiled, would be handed copies of them and cast anew into those. Products read a scale too, and so
come after this; where they are emulated, the values are read alone, and must not be read before.
"""
