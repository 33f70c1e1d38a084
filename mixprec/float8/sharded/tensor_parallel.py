"""A linear layer whose weight is cut up over ranks: which local product makes which DTensor.

`parallelize_module` turns the weight of a layer into a DTensor. Its products are then products of
what each rank holds, and only the placements of the results differ. By the placement of the weight
along a dimension of the mesh:

    weight       input        output       gradient of input   of weight   of bias
    Shard(0)     Replicate    Shard(-1)    Partial             Shard(0)    Shard(0)
    Shard(1)     Shard(-1)    Partial      Shard(-1)           Shard(1)    Replicate
    Replicate    any p        p            p                   Replicate if p is, else Partial

Each rank casts its own shard, so a scale that follows the data follows that of the shard. What
crosses ranks is in 16 bits and is torch's to do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function

from mixprec.float8.products import ALIGNMENT
from mixprec.gradients import is_dtensor

__all__ = ["Shards"]


class Shards:
    """What this rank holds of the operands of one linear layer.

    Args:
        input: `[..., in_features]`, redistributed to what `weight` asks for.
        weight: `[out_features, in_features]`, placed as in the table above.
        bias: `[out_features]` or None.

    Raises:
        TypeError: if only one of `input` and `weight` is a DTensor.
        ValueError: for a placement that is not in the table, for two meshes, and for a shard of a
            size that is no multiple of 16.
    """

    def __init__(self, input: Any, weight: Any, bias: Any) -> None:
        _check(input, weight)
        self.mesh = weight.device_mesh
        pairs = zip(weight.placements, input.placements, strict=True)
        along = [_plan(*pair, input.ndim - 1) for pair in pairs]
        self.output = [plan.output for plan in along]
        wanted = [plan.input for plan in along]
        if wanted != list(input.placements):
            input = input.redistribute(placements=wanted)
        self.input_source, self.weight_source = input._local_tensor, weight._local_tensor
        """The very tensors that are cast, the same object at each use of a weight."""
        self.input = input.to_local(grad_placements=[plan.grad_input for plan in along])
        self.weight = weight.to_local(grad_placements=[plan.grad_weight for plan in along])
        self.bias = None if bias is None else _bias(bias, along)
        self._shape = (*input.shape[:-1], weight.shape[0])

    def result(self, output: Tensor) -> Tensor:
        """The output of the layer, of which this rank has computed `output`."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size(self._shape)
        stride = tuple(shape[axis + 1 :].numel() for axis in range(len(shape)))
        return DTensor.from_local(
            output, self.mesh, self.output, run_check=False, shape=shape, stride=stride
        )


class _Plan(NamedTuple):
    """Placements along one dimension of the mesh."""

    input: Any
    output: Any
    grad_input: Any
    grad_weight: Any
    bias: Any
    grad_bias: Any
    is_sum: bool = False
    """Whether ranks hold addends of the output, the bias among them."""


def _plan(weight: Any, input: Any, last: int) -> _Plan:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if weight.is_shard(0):
        return _Plan(Replicate(), Shard(last), Partial(), Shard(0), Shard(0), Shard(0))
    if weight.is_shard(1):
        return _Plan(
            Shard(last), Partial(), Shard(last), Shard(1), Replicate(), Replicate(), is_sum=True
        )
    if input.is_partial() or input.is_shard(last):
        input = Replicate()
    grad = Replicate() if input.is_replicate() else Partial()
    return _Plan(input, input, input, grad, Replicate(), grad)


def _bias(bias: Any, along: list[_Plan]) -> Tensor:
    wanted = [plan.bias for plan in along]
    if wanted != list(bias.placements):
        bias = bias.redistribute(placements=wanted)
    addends = 1
    for axis, plan in enumerate(along):
        addends *= bias.device_mesh.size(axis) if plan.is_sum else 1
    shard = bias.to_local(grad_placements=[plan.grad_bias for plan in along])
    return shard if addends == 1 else _Share.apply(shard, addends)


class _Share(Function):
    """A rank's part of a bias that is added on each; its gradient is that of the whole."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, ranks: int) -> Tensor:
        return bias / ranks

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _check(input: Any, weight: Any) -> None:
    if not is_dtensor(input):
        raise TypeError(
            f"weight is a DTensor with placements {weight.placements}, but input is a plain tensor "
            f"of shape {list(input.shape)}. Under tensor parallelism parallelize_module makes the "
            "input a DTensor, by ColwiseParallel or RowwiseParallel; under FSDP2 call the module "
            "that was given to fully_shard, which gathers the weight first."
        )
    if not is_dtensor(weight):
        raise TypeError(
            f"input is a DTensor with placements {input.placements}, but weight is a plain tensor. "
            "Name this layer in the plan of parallelize_module too, or give it input.to_local() or "
            "input.full_tensor()."
        )
    if input.device_mesh != weight.device_mesh:
        raise ValueError(
            f"input is on {input.device_mesh} but weight on {weight.device_mesh}; a layer takes "
            "its input on the mesh of its weight"
        )
    if not all(p.is_replicate() or type(p).__name__ == "Shard" for p in weight.placements):
        raise ValueError(
            f"weight has placements {weight.placements}; an FP8 layer takes Shard(0), Shard(1) and "
            "Replicate(). Leave it in 16 bits with overrides={'its.name': 'bf16'} in "
            "Precision.convert."
        )
    shard = list(weight._local_tensor.shape)
    if any(size % ALIGNMENT for size in shard):
        raise ValueError(
            f"weight {list(weight.shape)} with placements {weight.placements} over "
            f"{tuple(weight.device_mesh.shape)} ranks leaves this rank a shard {shard}, and FP8 "
            f"units multiply only sizes that are multiples of {ALIGNMENT}. Use fewer ranks, or "
            "leave the layer in 16 bits with overrides={'its.name': 'bf16'} in Precision.convert."
        )
