"""Unit-scaled attention, its multiplier frozen when the model is built.

Where all logits are equal, position t averages t + 1 values, so the output of causal attention over
S positions has RMS

    (H_S / S)^1/2,    H_S = 1 + 1/2 + ... + 1/S        (S^-1/2 without a causal mask)

and where one logit wins, 1. Dividing by a point between the two gives output of RMS near 1. That
point must not depend on the tensors of a call: in a decoding step with a cache there is one query,
and a shorter prompt is no other model. So S is an argument: the length that the model is trained
at. The familiar ln S in place of H_S is the limit for long sequences; at S = 8 it is off by 14 %.

Single positions are not at unit scale: at S = 512 the first has 8.6 and the last 0.4.
Gradients of query and key have RMS near multiplier * head_dim^-1/2; that of value 1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from mixprec.umup.scaling import interpolate

__all__ = ["attention_multiplier", "scaled_dot_product_attention"]


def attention_multiplier(
    seq_len: int,
    head_dim: int,
    *,
    causal: bool,
    multiplier: float = 1.0,
    dropout_p: float = 0.0,
    limit: Literal["harmonic", "log"] = "harmonic",
) -> float:
    """What output and gradients of attention are multiplied by to have RMS near 1.

    Args:
        seq_len: positions of a training sequence, S.
        head_dim: width of one head.
        causal: whether training masks the future.
        multiplier: of the logits, which are `multiplier / head_dim * q @ k.T`.
        dropout_p: of the attention weights.
        limit: "harmonic" is exact for equal logits; "log" puts ln S in place of H_S.

    Raises:
        ValueError: for numbers out of range.

    Source: arXiv:2407.17465, table 12, with the exact limit.

    >>> from mixprec.umup.attention import attention_multiplier
    >>> round(attention_multiplier(512, 64, causal=True), 3)
    8.594
    """
    if seq_len < 1 or head_dim < 1 or multiplier <= 0 or not 0 <= dropout_p < 1:
        raise ValueError(
            f"seq_len={seq_len}, head_dim={head_dim}, multiplier={multiplier}, "
            f"dropout_p={dropout_p}; sizes must be 1 or more, the multiplier positive and "
            f"0 <= dropout_p < 1"
        )
    if limit not in ("harmonic", "log") or (limit == "log" and causal and seq_len < 2):
        raise ValueError(
            f"limit={limit!r} with seq_len={seq_len}; use 'harmonic', or 'log' from 2 positions on"
        )
    mass = 1.0
    if causal:
        mass = _harmonic(seq_len) if limit == "harmonic" else math.log(seq_len)
    flat = (mass / seq_len) ** 0.5
    sharpness = 1 / (1 + 4 * head_dim / multiplier**2)
    return float((1 - dropout_p) ** 0.5 / interpolate(sharpness, flat, 1.0))


def _harmonic(n: int) -> float:
    """1 + 1/2 + ... + 1/n. From 32 on by Euler and Maclaurin, to n^-6 / 252."""
    if n < 32:
        return sum([1 / i for i in range(1, n + 1)])
    return math.log(n) + 0.57721566490153286 + 1 / (2 * n) - 1 / (12 * n**2) + 1 / (120 * n**4)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    seq_len: int,
    trained_causal: bool | None = None,
    multiplier: float = 1.0,
    limit: Literal["harmonic", "log"] = "harmonic",
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of unit scale, with logits `multiplier / head_dim * q @ k.T`.

    The factor of `attention_multiplier` multiplies output and all gradients alike, since attention
    sits inside residual branches.

    Args:
        query, key, value, attn_mask, dropout_p, is_causal, enable_gqa: as in `torch.nn.functional`.
        seq_len: length of the sequences that the model is trained on; never of this call.
        trained_causal: whether training is causal, where this call does not say so: a decoding step
            over a cache has `is_causal=False` and needs `trained_causal=True`. None is `is_causal`.
        multiplier, limit: see `attention_multiplier`.

    >>> import torch
    >>> from mixprec.umup import functional as U
    >>> q = torch.randn(1, 2, 8, 16)
    >>> U.scaled_dot_product_attention(q, q, q, is_causal=True, seq_len=8).shape
    torch.Size([1, 2, 8, 16])
    """
    causal = is_causal if trained_causal is None else trained_causal
    head_dim = query.shape[-1]
    factor = attention_multiplier(
        seq_len, head_dim, causal=causal, multiplier=multiplier, dropout_p=dropout_p, limit=limit
    )
    mixed = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=multiplier / head_dim,
        enable_gqa=enable_gqa,
    )
    return mixed * factor
