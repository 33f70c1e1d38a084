"""A byte-level language model, small enough for a CPU and built like the large ones.

RMSNorm with FP32 statistics, rotary positions in FP32, SwiGLU, a head of its own.

A 16-bit matrix unit reads 16-bit operands, adds up their products in FP32 and rounds each sum once.
Where there is no such unit, `emulate=True` takes the same steps in the open:

    (x.float() @ weight.float().T).to(x.dtype)

Autograd casts every gradient back to its tensor's dtype, so the same line emulates both products of
the backward pass. Weights, activations and gradients are stored in 16 bits all along. The price is
an FP32 copy of both operands while a product runs. What it leaves out is the rounding inside 16-bit
attention kernels, between the softmax and its second product.

Hidden layers that are to run in FP8 are plain `nn.Linear`, for `Precision("fp8").convert`, which
emulates where it has to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec.cli.demo_text import VOCAB

__all__ = ["LanguageModel"]


class LanguageModel(nn.Module):
    """Logits `[batch, time, 257]` of the next byte, for inputs `[batch, time]` in 0..256.

    Matrices start normal with deviation 0.05, drawn in FP32 by `generator`: cast to 16 bits
    afterwards, a model starts from the same numbers, rounded.

    >>> import torch
    >>> model = LanguageModel(width=8, depth=1, num_heads=2)
    >>> model(torch.tensor([[256, 97, 98]])).shape
    torch.Size([1, 3, 257])
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        num_heads: int,
        emulate: bool = False,
        float8: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.head_width = width // num_heads
        self.embedding = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(_Block(width, num_heads, emulate, float8) for _ in range(depth))
        self.norm = _RMSNorm(width)
        self.head = _Linear(width, VOCAB, emulate)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.05, generator=generator)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.last_hidden(inputs))

    def last_hidden(self, inputs: Tensor) -> Tensor:
        """What the head multiplies, `[batch, time, width]`."""
        # Widened so that the gradient of a row, a sum over all uses of its byte, is rounded once.
        table = self.embedding.weight
        hidden = F.embedding(inputs, table.float()).to(table.dtype)
        rotation = _rotation(inputs.shape[1], self.head_width, inputs.device)
        for block in self.blocks:
            hidden = block(hidden, rotation)
        return self.norm(hidden)


class _Linear(nn.Module):
    """`x @ weight.T`, in 16-bit kernels or emulated."""

    def __init__(self, fan_in: int, fan_out: int, emulate: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.emulate = emulate

    def forward(self, x: Tensor) -> Tensor:
        if self.emulate:
            return F.linear(x.float(), self.weight.float()).to(x.dtype)
        return F.linear(x, self.weight)


def _hidden(fan_in: int, fan_out: int, emulate: bool, float8: bool) -> nn.Module:
    if float8:
        return nn.Linear(fan_in, fan_out, bias=False)
    return _Linear(fan_in, fan_out, emulate)


class _RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), eps=1e-6).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int, emulate: bool, float8: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.emulate = emulate
        self.attention_norm = _RMSNorm(width)
        self.queries_keys_values = _hidden(width, 3 * width, emulate, float8)
        self.attention_out = _hidden(width, width, emulate, float8)
        self.mlp_norm = _RMSNorm(width)
        self.gate_and_up = _hidden(width, 6 * width, emulate, float8)
        self.down = _hidden(3 * width, width, emulate, float8)

    def forward(self, hidden: Tensor, rotation: Tensor) -> Tensor:
        hidden = hidden + self.attention_out(self._attend(self.attention_norm(hidden), rotation))
        gate, up = self.gate_and_up(self.mlp_norm(hidden)).chunk(2, -1)
        return hidden + self.down(F.silu(gate) * up)

    def _attend(self, x: Tensor, rotation: Tensor) -> Tensor:
        parts = self.queries_keys_values(x).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = parts.transpose(1, 3).unbind(2)  # [batch, heads, time, head width]
        queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)
        if self.emulate:
            queries, keys, values = queries.float(), keys.float(), values.float()
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return mixed.transpose(1, 2).flatten(2).to(x.dtype)


def _rotation(time: int, head_width: int, device: torch.device) -> Tensor:
    """Cosines and sines of `t * 10000^(-2i/head_width)`, FP32, `[2, time, head_width / 2]`.

    Made anew for each batch: a buffer would be cast with the model, and BF16 has no 257.
    """
    exponents = torch.arange(0, head_width, 2, device=device) / head_width
    angles = torch.arange(time, device=device)[:, None] * 10000.0**-exponents
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair `(x[i], x[i + half])` turned by its angle in FP32 and rounded once.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.
    """
    cosines, sines = rotation
    first, second = x.float().chunk(2, -1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.cat(turned, -1).to(x.dtype)
