"""The losses of a window's micro-batches: what is differentiated, and what they add up to."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mixprec.window.scaled_losses import is_scaled
from mixprec.window.token_counts import Count

__all__ = ["loss_of", "sum_of"]


def loss_of(loss_sum: Any, count: Count, aux_loss: Any) -> Tensor:
    """The loss to differentiate: a scalar with a graph, which carries no loss scale yet."""
    loss = _scalar("loss_sum", loss_sum)
    if aux_loss is not None:
        loss = loss + _scalar("aux_loss", aux_loss) * count
    if not loss.requires_grad:
        raise RuntimeError(
            "loss_sum has no graph, so nothing would be learned from this micro-batch; compute "
            "it from the model's output outside of torch.no_grad() and do not detach it"
        )
    if is_scaled(loss):
        raise RuntimeError(
            "the loss was multiplied by a loss scaler already, and the accumulator multiplies it "
            "too: its gradients would be too large by a loss scale that nobody takes off. Give "
            "backward() the loss itself, and the scaler to MixedPrecision or to the accumulator."
        )
    return loss


def _scalar(name: str, loss: Any) -> Tensor:
    """A scalar loss in FP32, or FP64 if it is."""
    if not isinstance(loss, Tensor):
        hint = "; unpack it, backward(*loss_fn(...))" if isinstance(loss, tuple) else ""
        raise TypeError(f"{name} is a {type(loss).__name__}; it must be a scalar tensor{hint}")
    if loss.numel() != 1 or not loss.dtype.is_floating_point:
        raise ValueError(
            f"{name} is {loss.dtype} of shape {list(loss.shape)}; it must be one floating-point "
            f"number, the sum over all tokens: reduction='sum'"
        )
    return loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))


def sum_of(losses: list[Tensor]) -> Tensor:
    """Sum of the losses, 0-d. One reduction, not a chain of additions, for devices without FP64."""
    device = losses[0].device
    wide = _widest_dtype(device)
    return torch.stack([loss.to(device=device, dtype=wide) for loss in losses]).sum()


@cache
def _widest_dtype(device: torch.device) -> torch.dtype:
    """FP64, or FP32 on a device that has no FP64 (Apple's)."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64
