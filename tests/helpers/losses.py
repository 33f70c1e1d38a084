"""Inputs of a loss, what full logits make of them, and how far two gradients are apart."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = -100
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def case(
    tokens: int = 37,
    width: int = 16,
    vocab: int = 50,
    dtype: torch.dtype = FP64,
    *,
    sharpness: float = 1.0,
    padding: float = 0.2,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight that want gradients, and targets; logits have std `sharpness`."""
    g = seeded(seed)
    hidden = torch.randn(tokens, width, generator=g, dtype=FP64)
    weight = torch.randn(vocab, width, generator=g, dtype=FP64) * (sharpness / width**0.5)
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < padding] = PADDING
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def trained_model(learnt: float, device: str = "cpu", width: int = 64) -> list[Tensor]:
    """`case` in BF16 of 4096 tokens and 1024 classes, whose frequencies are by Zipf's law.

    Hidden states have learnt their targets: mean loss is near 3 for 4.5, and 0.2 for 12.
    """
    g = seeded()
    weight = torch.randn(1024, width, generator=g) / width**0.5
    targets = torch.multinomial(1 / torch.arange(1.0, 1025), 4096, True, generator=g)
    hidden = torch.randn(4096, width, generator=g) + learnt * weight[targets]
    leaves = [t.bfloat16().to(device).requires_grad_() for t in (hidden, weight)]
    return [*leaves, targets.to(device)]


def full_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    logit_multiplier: float = 1.0,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """What the loss is of, as a whole."""
    logits = F.linear(hidden, weight) * logit_multiplier
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    **options: Any,
) -> Tensor:
    """The loss of each token from full logits, in the dtype of the inputs."""
    logits = full_logits(hidden, weight, **options)
    losses = F.cross_entropy(
        logits, targets, weight=class_weight, label_smoothing=label_smoothing, reduction="none"
    )
    losses = losses + z_loss * logits.logsumexp(-1) ** 2 * (targets != PADDING)
    return losses if token_weight is None else losses * token_weight


def fp64_twins(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def error(ours: Tensor | None, exact: Tensor | None) -> float:
    """Relative, by Frobenius norms."""
    assert ours is not None and exact is not None
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def fp32_gradients(*tensors: Tensor) -> None:
    for tensor in tensors:
        tensor.grad_dtype = FP32


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "class weight": {"class_weight": True},
    "class weight and smoothing": {"class_weight": True, "label_smoothing": 0.3},
    "token weight": {"token_weight": True},
    "multiplier": {"logit_multiplier": 0.3},
    "softcap": {"softcap": 1.5},
    "z-loss": {"z_loss": 0.01},
    "bias": {"bias": True},
    "everything": {
        "label_smoothing": 0.1,
        "class_weight": True,
        "token_weight": True,
        "logit_multiplier": 1.7,
        "softcap": 2.0,
        "z_loss": 0.01,
        "bias": True,
    },
}


def filled(options: dict[str, Any], tokens: int, vocab: int, dtype: torch.dtype) -> dict[str, Any]:
    """`options` with tensors in place of True."""
    g = seeded(1)
    tensors = {
        "class_weight": torch.rand(vocab, generator=g, dtype=FP64).to(dtype),
        "token_weight": torch.rand(tokens, generator=g, dtype=FP64).to(dtype),
        "bias": torch.randn(vocab, generator=g, dtype=FP64).to(dtype).requires_grad_(),
    }
    return {name: tensors[name] if value is True else value for name, value in options.items()}
