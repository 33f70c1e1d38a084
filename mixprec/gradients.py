"""Norm, finiteness and scaling of a list of gradients, never in 16 bits.

Everything that a step does to its gradients before the rule sees them is one number:
`1/loss_scale`, `1/num_tokens` and the clip coefficient multiply into a single factor. What decides
whether the step happens at all is one number too: the FP32 norm, which is non-finite if any
gradient is. A norm kept in FP16 overflows at 65504 and makes the clip coefficient 0, which erases
every gradient without a word; kept in BF16 it has three digits. So norms accumulate in FP32 here
whatever the gradients' dtype (in FP64 for FP64 gradients).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "are_zero",
    "grad_norm",
    "is_dtensor",
    "local",
    "nonfinite_names",
    "part_norms",
    "scale_",
]


_IN_CACHE = 2**17  # elements: 512 KiB in FP32, within a core's L2; a third of the time of 2^20


def local(tensor: Tensor) -> Tensor:
    """The shard that this process holds of a DTensor; any other tensor itself."""
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)
    return shard


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a DTensor; no process without one imports what defines it."""
    return hasattr(tensor, "_local_tensor")


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients as one vector, 0-d, on the device of the first; 0 for no gradient.

    FP32, or FP64 if any gradient is FP64. Non-finite if any gradient is non-finite, and also where
    the sum of squares leaves the accumulator's range (FP32: elements near 1e19).

    >>> import torch
    >>> half = torch.full((1000,), 3000.0, dtype=torch.float16)
    >>> round(grad_norm([half, half, half]).item())  # 3000 * sqrt(3000); FP16 would say inf
    164317
    """
    return torch.linalg.vector_norm(part_norms(grads)[0])


def part_norms(grads: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """L2 norms of parts of the gradients, `[parts]`, and for each part the place of its gradient.

    Together they have the norm of all; see `grad_norm` for precision and device.
    """
    dense = [(place, grad) for place, grad in enumerate(map(_dense_values, grads)) if grad.numel()]
    if not dense:
        return torch.zeros(0, device=local(grads[0]).device if grads else None), []
    accumulator = torch.float32
    if any(grad.dtype == torch.float64 for _, grad in dense):
        accumulator = torch.float64
    device = dense[0][1].device
    norms: list[Tensor] = []
    owners: list[int] = []
    for same in _by_device_and_dtype(dense):
        # Without `dtype` the sum of squares would be kept in the gradients' own 16 bits.
        wider = None if same[0][1].dtype == accumulator else accumulator
        if wider is not None and same[0][1].device.type == "cpu":
            # Torch widens a whole tensor into memory there; a part of it stays in the cache.
            same = [(i, part) for i, grad in same for part in grad.reshape(-1).split(_IN_CACHE)]
        found = torch._foreach_norm([part for _, part in same], 2, dtype=wider)
        norms.extend(norm.to(device=device, dtype=accumulator) for norm in found)
        owners.extend(place for place, _ in same)
    return torch.stack(norms), owners


def are_zero(grads: Iterable[Tensor]) -> bool:
    """Whether there are elements and all of them are exactly 0. Reads the device.

    >>> import torch
    >>> are_zero([torch.zeros(3)]), are_zero([torch.tensor([1e-30])]), are_zero([torch.zeros(0)])
    (True, False, False)
    """
    values = [dense for dense in map(_dense_values, grads) if dense.numel()]
    return bool(values) and not any(bool(dense.any()) for dense in values)


def scale_(grads: Iterable[Tensor], factor: Tensor | float) -> None:
    """Multiply gradients by `factor` in place.

    A 0-d FP64 `factor` is rounded once, to the gradient's own dtype, so powers of two stay exact.
    16-bit gradients would be rounded as well and may underflow: give FP32 ones. Two gradients that
    are one memory, as after `q.grad = p.grad.detach()`, are multiplied once.

    >>> import torch
    >>> grad = torch.tensor([2.0, 6.0])
    >>> scale_([grad, grad.detach()], 0.5)
    >>> grad
    tensor([1., 3.])
    """
    values = (grad._values() if grad.is_sparse else grad for grad in map(local, grads))
    stored = {_memory(grad): grad for grad in values}.values()
    for group in _by_device_and_dtype(enumerate(stored)):
        same = [grad for _, grad in group]
        if isinstance(factor, Tensor):
            torch._foreach_mul_(same, factor.to(same[0].device))
        else:
            torch._foreach_mul_(same, factor)


def _memory(tensor: Tensor) -> object:
    """What is equal for tensors that are one memory. A subclass may have its own elsewhere."""
    plain = type(tensor) is Tensor and tensor.numel()
    return (tensor.device, tensor.data_ptr(), tensor.numel()) if plain else id(tensor)


def once(grads: Iterable[Tensor]) -> list[Tensor]:
    """Every gradient once, although torch allows a parameter to be in a group twice."""
    return list({id(grad): grad for grad in grads}.values())


def nonfinite_names(named_grads: Iterable[tuple[str, Tensor | None]], limit: int = 3) -> list[str]:
    """Names of the first `limit` gradients that hold an infinity or a NaN. Reads the device.

    >>> import torch
    >>> nonfinite_names([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("inf")]))])
    ['b']
    """
    names: list[str] = []
    for name, grad in named_grads:
        if grad is not None and not bool(torch.isfinite(_dense_values(grad)).all()):
            names.append(name)
            if len(names) == limit:
                break
    return names


def _dense_values(grad: Tensor) -> Tensor:
    grad = local(grad)
    return grad.coalesce().values() if grad.is_sparse else grad


def _by_device_and_dtype(
    tensors: Iterable[tuple[int, Tensor]],
) -> Iterable[list[tuple[int, Tensor]]]:
    """Numbered tensors in lists that one foreach kernel can take, in order of first appearance."""
    groups: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for place, tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append((place, tensor))
    return groups.values()
