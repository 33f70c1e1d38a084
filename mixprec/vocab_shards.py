"""A vocabulary that is spread over ranks: which classes are here, and sums over all of them.

Each rank of a tensor-parallel group holds some rows of the output weight, and so some columns of
the logits, for the same tokens. What a softmax needs of the others are two numbers a token: the
largest logit, and sums of exponentials below it (Shoeybi et al. 2019, arXiv:1909.08053, section 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixprec.gradients import is_dtensor

__all__ = ["VocabShard", "local_shard"]


class VocabShard(NamedTuple):
    """Classes `start` to `start + rows of the weight` of `vocab`; all of them without a group."""

    group_name: str | None
    start: int
    vocab: int
    even: bool = True
    """Whether every rank must hold equally many, because that is how `start` was found."""

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

    def check(self, vocab: int, num_tokens: Tensor) -> None:
        """Refuse ranks that disagree on the tokens, or on the size of a shard; no host waits."""
        if self.whole:
            return
        size = torch.full_like(num_tokens, vocab if self.even else 0)
        said = torch.stack([num_tokens, -num_tokens, size, -size])
        most = self.reduce_(said, "max")
        _require(
            most[2] == -most[3],
            "ranks of process_group hold different numbers of rows of the weight; pad the "
            "vocabulary to a multiple of the ranks, or give the weight as a DTensor",
        )
        _require(
            most[0] == -most[1],
            "ranks of process_group differ in the number of targets; a group whose ranks share a "
            "vocabulary must be given the same tokens. For data-parallel ranks leave it out",
        )


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


def local_shard(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, process_group: Any
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard]:
    """Plain tensors of this rank, and what part of the vocabulary they are."""
    if process_group is not None and not _is_group(process_group):
        raise TypeError(
            f"process_group is a {type(process_group).__name__}; give a ProcessGroup, such as "
            f"mesh.get_group() or torch.distributed.group.WORLD"
        )
    if not dist.is_available() or not is_dtensor(weight):
        if process_group is None:
            return hidden, weight, bias, VocabShard(None, 0, weight.shape[0])
        rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
        name, rows = process_group.group_name, weight.shape[0]
        shard = VocabShard(name if size > 1 else None, rank * rows, size * rows)
        return _replicated(hidden), weight, bias, shard
    return _of_dtensor(hidden, weight, bias, process_group)


def _of_dtensor(
    hidden: Tensor, weight: Any, bias: Any, process_group: Any
) -> tuple[Tensor, Tensor, Tensor | None, VocabShard]:
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
    local, start = weight.to_local(), 0
    name = None
    if placements:
        group = mesh.get_group(placements[0][0])
        if process_group is not None and process_group.group_name != group.group_name:
            raise ValueError(f"{said} over another process group than process_group")
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        start = min(-(-weight.shape[0] // size) * rank, weight.shape[0])
        name = group.group_name if size > 1 else None
    shard = VocabShard(name, start, weight.shape[0], even=False)
    hidden = _replicated(hidden, mesh, placements[0][0] if placements else None)
    return hidden, local, bias.to_local() if is_dtensor(bias) else bias, shard


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
