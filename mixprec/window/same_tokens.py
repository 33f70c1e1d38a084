"""Ranks that hold the same tokens, found by what they report.

Tokens are counted over the ranks that hold different ones. Ranks of tensor or context parallelism
hold the same, and a reduction over all ranks would count each token as often as it is held. Nothing
says so but the numbers: such ranks report the same count and the same loss, to the last bit, window
after window. Others do so by chance at most in a first window, when a fresh model gives every token
the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.gradients import is_dtensor
from mixprec.parameters import listed, names_of

__all__ = ["RankTwins", "refuse_meshes"]


class RankTwins:
    """Compares what the ranks report in their first three windows."""

    WINDOWS = 3

    def __init__(self) -> None:
        self._windows = 0
        self._same: Tensor | None = None

    def look(self, tokens: Tensor, total: Tensor, group: Any) -> str:
        """What to say of the ranks of `group` that reported the same in each of those windows.

        Nothing before and after the last of them. One more reduction in each, and in the last the
        host reads it.
        """
        if self._windows == RankTwins.WINDOWS:
            return ""
        self._windows += 1
        distributed = torch.distributed
        me = distributed.get_rank(group)
        everybody = total.new_zeros((distributed.get_world_size(group), 2))
        everybody[me, 0], everybody[me, 1] = tokens, total
        distributed.all_reduce(everybody, group=group)
        same = (everybody == everybody[me]).all(1) & (everybody[me, 0] > 0)
        self._same = same if self._same is None else self._same & same
        if self._windows < RankTwins.WINDOWS:
            return ""
        twins = [rank for rank in self._same.nonzero().flatten().tolist() if rank != me]
        self._same = None
        return _twins_found(twins) if twins else ""

    def __getstate__(self) -> dict[str, Any]:
        return {"_windows": RankTwins.WINDOWS if self._windows else 0, "_same": None}


def _twins_found(twins: list[int]) -> str:
    return (
        f"ranks {listed(list(map(str, twins)))} of the process group reported the same token count "
        f"and loss as this one, to the last bit, in each of {RankTwins.WINDOWS} windows. If they "
        f"hold the same tokens (tensor or context parallelism), each token is counted "
        f"{len(twins) + 1} times, and gradients are scaled by the wrong number of ranks: give "
        f'process_group= the ranks that hold different tokens, such as mesh["dp"].get_group(). If '
        f"not, look at what the data loader gives each rank."
    )


def refuse_meshes(optimizer: Optimizer) -> None:
    """Which ranks of a mesh of several dimensions hold the same tokens, nobody can tell from it."""
    world = torch.distributed.get_world_size()
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        mesh: Any = getattr(param, "device_mesh", None) if is_dtensor(param) else None
        if mesh is not None and (mesh.ndim > 1 or mesh.size() < world):
            name = next(name for other, name in names_of(optimizer.param_groups) if other is param)
            raise ValueError(
                f"{name} is sharded over a mesh of {mesh.size()} ranks, dimensions "
                f"{mesh.mesh_dim_names or mesh.ndim}; ranks of tensor parallelism hold the same "
                f"tokens, which would be counted several times over. Give process_group= the ranks "
                f'that hold different tokens, such as mesh["dp"].get_group(), or '
                f"torch.distributed.group.WORLD if all do."
            )
