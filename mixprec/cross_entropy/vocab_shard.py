"""A vocabulary that is spread over ranks: which classes are here, and sums over all of them.

Each rank of a tensor-parallel group holds some rows of the output weight, in order of rank and
however many, and so some columns of the logits, for the same tokens. What a softmax needs of the
others are two numbers a token: the largest logit, and sums of exponentials below it (Shoeybi et al.
2019, arXiv:1909.08053, section 3).

Before that all ranks meet once: they say how many rows they have, and what must be equal among
them. A rank that refuses its arguments says so there, so that no other one waits for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixprec.gradients import is_dtensor

__all__ = ["Local", "VocabShard", "local_shard", "locate", "say_refused", "sharing_group"]


class VocabShard(NamedTuple):
    """Classes `start` to `start + rows of the weight` of `vocab`; all of them without a group."""

    group_name: str | None
    start: int | Tensor
    """0-d int64 where ranks have told each other: the host does not read it."""
    vocab: int | Tensor
    """0-d FP64 there, which counts exactly and divides in any precision."""

    @property
    def whole(self) -> bool:
        return self.group_name is None

    def reduce_(self, values: Tensor, operation: str) -> Tensor:
        """`values`, contiguous, with the "sum" or "max" over the ranks in their place."""
        if self.group_name is not None:
            op = dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX
            dist.all_reduce(values, op, group=_group(self.group_name))
        return values

    def local(self, targets: Tensor, vocab: int) -> Tensor:
        """Rows of the weight here that `targets` mean, -1 for those that are elsewhere."""
        if self.whole:
            return targets
        rows = targets - self.start
        return rows.where((rows >= 0) & (rows < vocab), -1)


def locate(
    group_name: str | None, rows: int, targets: Tensor, padding: Tensor, same: tuple[Any, ...]
) -> tuple[VocabShard, Tensor | None]:
    """Which classes the `rows` of this rank are, and how many each rank has; no host waits.

    Refuses ranks that disagree on the targets or on `same`, every rank alike.
    """
    if group_name is None:
        return VocabShard(None, 0, rows), None
    number = (~padding).sum()
    order = torch.arange(1, len(targets) + 1, device=targets.device)
    checksum = (targets * order).sum() & (2**62 - 1)  # its negative is a number too
    options = torch.full_like(number, crc32(repr(same).encode()))
    most, sizes = _meet(group_name, targets.device, rows, number, checksum, options)
    _require(
        most[0] == 0,
        "another rank of process_group has refused its arguments; the error there says why",
    )
    shared = "a group whose ranks share a vocabulary must be given the same tokens. For "
    shared += "data-parallel ranks leave it out"
    _require(
        most[1] == -most[2],
        f"ranks of process_group differ in the number of targets; {shared}",
    )
    _require(most[3] == -most[4], f"ranks of process_group differ in their targets; {shared}")
    _require(
        most[5] == -most[6],
        "ranks of process_group differ in an option, in the shape or dtype of the hidden states, "
        "in whether those want a gradient, or in which of bias, class_weight and token_weight they "
        "have; one of them would wait for the others for ever. Give all of them the same",
    )
    before = sizes[: dist.get_rank(_group(group_name))].sum()
    return VocabShard(group_name, before, sizes.sum().double()), sizes


def sharing_group(hidden: Any, weight: Any, process_group: Any) -> str | None:
    """The group that ranks will meet in, told from arguments that nobody has checked yet."""
    if isinstance(weight, nn.Module):
        weight = weight._parameters.get("weight")
    group = process_group if _is_group(process_group) else None
    if group is None and dist.is_available() and is_dtensor(weight) and is_dtensor(hidden):
        shards = [i for i, p in enumerate(weight.placements) if p.is_shard(0)]
        group = weight.device_mesh.get_group(shards[0]) if len(shards) == 1 else None
    if group is None or dist.get_world_size(group) == 1:
        return None
    return group.group_name


def say_refused(group_name: str | None, *given: Any) -> None:
    """Meet the other ranks, which may be there already, with nothing but a refusal.

    On the device of the first tensor among `given`.
    """
    if group_name is not None and not torch.compiler.is_compiling():
        devices = (value.device for value in given if isinstance(value, Tensor))
        _meet(group_name, next(devices, torch.device("cpu")), 0)


def _meet(
    group_name: str, device: torch.device, rows: int, *numbers: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether a rank refused, the largest of each number and its negative; rows of each rank."""
    group = _group(group_name)
    said = torch.zeros(7 + dist.get_world_size(group), dtype=torch.int64, device=device)
    if numbers:
        said[1:7] = torch.stack([sign for number in numbers for sign in (number, -number)])
    else:
        said[0] = 1
    said[7 + dist.get_rank(group)] = rows
    dist.all_reduce(said, dist.ReduceOp.MAX, group=group)
    return said[:7], said[7:]


def _require(condition: Tensor, message: str) -> None:
    if condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _group(name: str) -> Any:
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]


def _is_group(group: object) -> bool:
    """Asked in a way that the compiler of torch 2.11 can follow."""
    return dist.is_available() and isinstance(group, dist.ProcessGroup)


class Local(NamedTuple):
    """Plain tensors of this rank, and with whom it shares the vocabulary."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    class_weight: Tensor | None
    group_name: str | None
    most_rows: int | None
    """Of the weight on any rank; None if only the ranks know."""


def local_shard(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    process_group: Any,
) -> Local:
    """What this rank has."""
    if process_group is not None and not _is_group(process_group):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}; give a ProcessGroup, such as "
            f"mesh.get_group() or torch.distributed.group.WORLD"
        )
    if dist.is_available() and is_dtensor(weight):
        return _of_dtensor(hidden, weight, bias, class_weight, process_group)
    rows = weight.shape[0] if weight.dim() else 0
    if process_group is None:
        return Local(hidden, weight, bias, class_weight, None, rows)
    hidden, size = _replicated(hidden), dist.get_world_size(process_group)
    if size == 1:
        return Local(hidden, weight, bias, class_weight, None, rows)
    return Local(hidden, weight, bias, class_weight, process_group.group_name, None)


def _of_dtensor(
    hidden: Tensor, weight: Any, bias: Any, class_weight: Any, process_group: Any
) -> Local:
    mesh = weight.device_mesh
    placements = [(i, p) for i, p in enumerate(weight.placements) if not p.is_replicate()]
    said = f"weight is a DTensor with placements {weight.placements}"
    if len(placements) > 1 or any(not p.is_shard(0) for _, p in placements):
        raise ValueError(
            f"{said}; only its dim 0, the vocabulary, may be sharded, over one mesh dimension"
        )
    if placements and process_group is None and not is_dtensor(hidden):
        raise ValueError(
            f"{said}, and hidden is a plain tensor. Under FSDP read the weight inside the forward "
            f"of the module that owns it, as LinearCrossEntropy does. If all ranks of the mesh "
            f"have the same hidden states, give process_group=weight.device_mesh.get_group()."
        )
    name, size = None, 1
    if placements:
        group = mesh.get_group(placements[0][0])
        if process_group is not None and process_group.group_name != group.group_name:
            raise ValueError(f"{said} over another process group than process_group")
        size = dist.get_world_size(group)
        name = group.group_name if size > 1 else None
    hidden = _replicated(hidden, mesh, placements[0][0] if placements else None)
    weight_here, bias, class_weight = (
        t.to_local() if is_dtensor(t) else t for t in (weight, bias, class_weight)
    )
    return Local(hidden, weight_here, bias, class_weight, name, -(-weight.shape[0] // size))


def _replicated(hidden: Any, mesh: Any = None, dim: int | None = None) -> Tensor:
    """What this rank has of hidden states that all ranks of the vocabulary have."""
    if not is_dtensor(hidden):
        return hidden
    placements = hidden.placements
    if dim is not None and hidden.device_mesh == mesh:
        placements = placements[dim : dim + 1]
    if not all(p.is_replicate() for p in placements):
        raise ValueError(
            f"hidden is a DTensor with placements {hidden.placements}; ranks that share a "
            f"vocabulary need the same hidden states: redistribute it to Replicate() over them"
        )
    return hidden.to_local()
