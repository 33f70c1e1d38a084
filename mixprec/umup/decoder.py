"""A unit-scaled pre-norm decoder of demonstration size: RoPE, grouped queries, SwiGLU.

Every multiplier sits inside a product that is there anyway: attention's factor and the branch
multiplier in the output projection, SwiGLU's in the down projection. Only the two branch
multipliers of the backward pass are nodes of their own.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec.umup import losses
from mixprec.umup.attention import attention_multiplier
from mixprec.umup.functional import branch_multipliers, silu_glu_multiplier
from mixprec.umup.layers import DepthModuleList, Embedding, Linear, LinearReadout, RMSNorm
from mixprec.umup.scaling import scale_bwd

__all__ = ["Attention", "Decoder", "DecoderLayer", "SwiGLU"]


class SwiGLU(nn.Module):
    """`down(up(x) * silu(gate(x)))` at unit scale, `[..., width]` to `[..., width]`.

    The projections mirror each other, d^-1/2 and f^-1/2 forward, f^-1/2 and d^-1/2 backward, so
    each is at unit scale both ways and the branch as a whole has its true gradient.

    >>> import torch
    >>> from mixprec.umup.decoder import SwiGLU
    >>> abs(SwiGLU(256, 1024)(torch.randn(256, 256)).std().item() - 1) < 0.1
    True
    """

    def __init__(
        self, width: int, hidden_width: int, *, multiplier: float = 1.0, branch: float = 1.0
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.umup_gate = ("gate", multiplier)  # for `export`
        self.gate = Linear(width, hidden_width, bias=False, constraint=None)
        self.up = Linear(width, hidden_width, bias=False, constraint=None)
        self.down = Linear(
            hidden_width,
            width,
            bias=False,
            constraint=None,
            multiplier=silu_glu_multiplier(multiplier) / multiplier,
            output_multiplier=branch,
        )

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        if self.multiplier != 1:
            gate = gate * self.multiplier
        return self.down(self.up(x) * F.silu(gate))


class Attention(nn.Module):
    """Causal attention with rotary positions and grouped queries, `[batch, time, width]`.

    >>> import torch
    >>> from mixprec.umup.decoder import Attention
    >>> attend = Attention(128, num_heads=4, num_kv_heads=2, seq_len=32)
    >>> abs(attend(torch.randn(16, 32, 128)).square().mean().sqrt().item() - 1) < 0.2
    True
    """

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        seq_len: int,
        multiplier: float = 1.0,
        branch: float = 1.0,
    ) -> None:
        super().__init__()
        self.head_dim = width // num_heads
        self.grouped = num_kv_heads != num_heads
        self.logit_multiplier = multiplier / self.head_dim
        self.umup_query = ("query", multiplier * self.head_dim**-0.5)  # for `export`
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, num_kv_heads * self.head_dim, bias=False)
        self.value = Linear(width, num_kv_heads * self.head_dim, bias=False)
        factor = attention_multiplier(seq_len, self.head_dim, causal=True, multiplier=multiplier)
        self.out = Linear(width, width, bias=False, multiplier=factor, output_multiplier=branch)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.query, self.key, self.value)
        )
        query, key, value = (head.transpose(-2, -3) for head in heads)
        rotation = _rotation(x.shape[-2], self.head_dim, x.device)
        mixed = F.scaled_dot_product_attention(
            _rotate(query, rotation),
            _rotate(key, rotation),
            value,
            is_causal=True,
            scale=self.logit_multiplier,
            enable_gqa=self.grouped,  # fewer kernels take it
        )
        return self.out(mixed.transpose(-2, -3).flatten(-2))


def _rotation(time: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of `t * 10000^(-2i / head_dim)`, FP32, `[2, time, head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, device=device) / head_dim
    angles = torch.arange(time, device=device)[:, None] * 10000.0**-exponents
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair `(x[i], x[i + half])` turned by its angle, in FP32, which keeps its length."""
    cosines, sines = rotation
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.cat(turned, -1).to(x.dtype)


class DecoderLayer(nn.Module):
    """Two residual branches, attention and MLP, each behind an RMSNorm."""

    def __init__(self, attention: Attention, mlp: SwiGLU, width: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), attention
        self.mlp_norm, self.mlp = RMSNorm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        for norm, branch, last in (
            (self.attention_norm, self.attention, self.attention.out),
            (self.mlp_norm, self.mlp, self.mlp.down),
        ):
            # `residual`, whose forward multiplier is in the branch's last product.
            x = x + branch(norm(scale_bwd(x, last.output_multiplier)))
        return x


class Decoder(nn.Module):
    """Logits `[batch, time, vocab_size]` of the next token, for tokens `[batch, time]`.

    Args:
        vocab_size, width, depth: V, d and L.
        num_heads: `width / 64` by default, and 1 at least.
        num_kv_heads: heads of keys and values, which divides `num_heads`; `num_heads` by default.
        seq_len: length of training sequences. It sets one multiplier; others can be fed.
        mlp_width: inside SwiGLU; 4 widths by default.
        tied: one weight for embedding and readout.
        residual_multiplier, attention_ratio, depth_rule: see `functional.branch_multipliers`; give
            the same `depth_rule` to `param_groups`.
        attention_multiplier: of the attention logits, over `1 / head_dim`.

    Raises:
        ValueError: for widths that heads do not divide.

    >>> import torch
    >>> from mixprec.umup.decoder import Decoder
    >>> model = Decoder(257, width=64, depth=2, seq_len=16)
    >>> model(torch.zeros(1, 16, dtype=torch.long)).shape
    torch.Size([1, 16, 257])
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        width: int,
        depth: int,
        seq_len: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        mlp_width: int | None = None,
        tied: bool = False,
        residual_multiplier: float = 1.0,
        attention_ratio: float = 1.0,
        attention_multiplier: float = 1.0,
        depth_rule: Literal["sqrt", "completep"] = "sqrt",
    ) -> None:
        super().__init__()
        num_heads = num_heads or max(1, width // 64)
        num_kv_heads = num_kv_heads or num_heads
        if width % (2 * num_heads) or num_heads % num_kv_heads:
            raise ValueError(
                f"width={width}, num_heads={num_heads}, num_kv_heads={num_kv_heads}; heads must "
                f"have an even width, and num_kv_heads must divide num_heads"
            )
        branches = branch_multipliers(depth, residual_multiplier, attention_ratio, depth_rule)

        def layer() -> DecoderLayer:
            attention = Attention(
                width,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                seq_len=seq_len,
                multiplier=attention_multiplier,
                branch=branches.attention,
            )
            return DecoderLayer(
                attention, SwiGLU(width, mlp_width or 4 * width, branch=branches.mlp), width
            )

        self.embedding = Embedding(vocab_size, width)
        self.layers = DepthModuleList([layer() for _ in range(depth)])
        self.norm = RMSNorm(width)
        self.readout = LinearReadout(width, vocab_size, bias=False)
        if tied:
            self.readout.weight = self.embedding.weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the readout is given, `[batch, time, width]`."""
        x: Tensor = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy and number of targets, by `losses.linear_cross_entropy`."""
        return losses.linear_cross_entropy(self.hidden(tokens), self.readout, targets)
