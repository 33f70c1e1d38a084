"""Updates of a given spectral norm, for rules whose own size depends on rank and batch.

The change of a layer's output, A * |dW x|, is free of the width if `dW` has spectral norm
`lr * fan_out^1/2`. Muon's update has that by construction. SOAP's lies between an orthogonal matrix
and Adam's, depending on how many directions the gradients have had so far, so no learning rate rule
fits it at all widths; measuring the update and dividing does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["spectral_norm", "spectral_normalize"]


def spectral_normalize(optimizer: Optimizer, *, iterations: int = 8) -> Optimizer:
    """Give every step of a hidden matrix the spectral norm `lr * fan_out^1/2`.

    Works by hooks around `optimizer.step`, on those parameters of groups of `param_groups` whose
    role is "hidden", whatever else is in their groups. The group's weight decay is taken to be
    decoupled and left out of the norm. Costs a copy of these parameters during the step, and
    `2 * iterations` products with a vector each.

    Args:
        iterations: of the power method; see `spectral_norm`.

    Returns:
        The optimizer itself.

    Raises:
        ValueError: if no parameter has the role "hidden", or groups tell no roles.
        TypeError: at the step, for parameters that are not FP32 or FP64: their changes are rounded.

    Source: Qiu et al. 2025, arXiv:2512.05620, who find it for Shampoo and SOAP.

    >>> import torch
    >>> from mixprec import umup
    >>> layer = umup.layers.Linear(16, 64, bias=False)
    >>> groups = umup.param_groups(layer, 0.5, "soap")
    >>> optimizer = umup.spectral_normalize(torch.optim.SGD(groups), iterations=50)
    >>> before = layer.weight.detach().clone()
    >>> layer.weight.grad = torch.randn(64, 16)
    >>> optimizer.step()
    >>> change = torch.linalg.matrix_norm(layer.weight.detach() - before, 2)
    >>> abs(change / (0.5 * 64**0.5) - 1) < 0.1
    tensor(True)
    """
    if not any(True for _ in _hidden(optimizer)):
        found = sorted({role for group in optimizer.param_groups for role in _roles(group)})
        raise ValueError(
            f"spectral_normalize acts on hidden matrices, and no group of "
            f"{type(optimizer).__name__} says that it has one (its roles are {found}), so it would "
            f"do nothing. Make the groups with umup.param_groups(model, lr, 'soap')."
        )
    before: Any = WeakIdKeyDictionary()

    def keep(optimizer: Optimizer, *_: Any) -> None:
        for _group, param in _hidden(optimizer):
            if param.grad is not None:
                _check(param)
                before[param] = param.detach().clone()

    @torch.no_grad()
    def rescale(optimizer: Optimizer, *_: Any) -> None:
        for group, param in _hidden(optimizer):
            lr, decay = float(group["lr"]), float(group.get("weight_decay", 0.0))
            old = before.pop(param, None)
            if old is not None:
                old.mul_(1 - lr * decay)
                update = param.detach() - old
                norm = spectral_norm(update.flatten(1), iterations)
                factor = lr * param.shape[0] ** 0.5 / norm
                param.copy_(old.add_(update * torch.where(norm > 0, factor, 0.0)))

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(rescale)
    return optimizer


def spectral_norm(matrix: Tensor, iterations: int = 8) -> Tensor:
    """The largest singular value, from below, 0-d: by the power method from a fixed start.

    Where singular values are close to one another it stays below the largest, by a few percent. The
    start depends on the width alone, so that a resumed run goes on exactly.

    >>> import torch
    >>> from mixprec.umup.spectral import spectral_norm
    >>> round(spectral_norm(torch.diag(torch.tensor([1.0, 4.0, 2.0]))).item(), 3)
    4.0
    """
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator).to(matrix)
    tiny = torch.finfo(matrix.dtype).tiny
    for _ in range(iterations):
        image = matrix @ (vector / vector.norm().clamp(min=tiny))
        vector = matrix.mT @ (image / image.norm().clamp(min=tiny))
    return vector.norm()


def _hidden(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Hidden matrices, each with its group."""
    for group in optimizer.param_groups:
        roles = _roles(group)
        if roles and len(roles) != len(group["params"]):
            raise ValueError(
                f"a group has {len(group['params'])} parameters and param_roles of {len(roles)}, "
                f"so it cannot be told which are hidden. Change both lists, or make groups anew."
            )
        for param, role in zip(group["params"], roles, strict=bool(roles)):
            if role == "hidden":
                yield group, param


def _roles(group: dict[str, Any]) -> list[str]:
    """Of the group's parameters, one by one; none if `param_groups` has not made it."""
    return group.get("param_roles", [])


def _check(param: Tensor) -> None:
    if param.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"spectral_normalize measures how a step changes a parameter, and this one of shape "
            f"{list(param.shape)} is {param.dtype}, whose changes are rounded. Keep it in FP32."
        )
