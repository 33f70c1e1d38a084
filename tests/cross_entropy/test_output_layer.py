"""An output layer as a module: used as it is, or refused by the name of what it does more."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import FP64, case
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import mixprec
from mixprec.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from mixprec.float8.conversion import convert as convert_to_fp8
from mixprec.umup.decoder import Decoder


class LowRank(nn.Module):
    """The weight and what an adapter adds to it, as `parametrize` takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 16, dtype=FP64))
        self.up = nn.Parameter(torch.randn(50, 2, dtype=FP64))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


class SameForward(nn.Linear):
    """A subclass that adds nothing to a call."""


def parametrized(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


def normed(layer: nn.Linear) -> nn.Module:
    return parametrizations.weight_norm(layer)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(16, 50, bias=bias, dtype=FP64)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "with a bias": linear,
    "without a bias": lambda: linear(bias=False),
    "a subclass": lambda: SameForward(16, 50, dtype=FP64),
    "low rank": lambda: parametrized(linear()),
    "weight norm": lambda: normed(linear()),
    "spectral norm": lambda: parametrizations.spectral_norm(linear()),
}


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"reduction": "none"}])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_gives_the_loss_and_all_gradients_of_its_logits(
    name: str, how: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    hidden, _, targets = case()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    expected = F.cross_entropy(layer(hidden), targets, reduction="sum")
    leaves = [hidden, *layer.parameters()]
    grads = torch.autograd.grad(expected, leaves)
    layer.load_state_dict(state)  # one call moves what a spectral norm keeps, and so does ours
    loss, _ = linear_cross_entropy(hidden, layer, targets, **how)
    torch.testing.assert_close(loss.sum(), expected, rtol=1e-12, atol=0)
    found = torch.autograd.grad(loss.sum(), leaves)
    torch.testing.assert_close(found, grads, rtol=1e-10, atol=1e-11)


def test_parametrised_weight_is_computed_once() -> None:
    calls: list[int] = []

    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            calls.append(1)
            return weight

    layer = linear()
    parametrize.register_parametrization(layer, "weight", Counted())
    calls.clear()
    hidden, _, targets = case()
    linear_cross_entropy(hidden, layer, targets)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled_function_takes_a_layer() -> None:
    hidden, _, targets = case()
    layer = linear()
    torch._dynamo.reset()
    compiled: Any = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(hidden, layer, targets), linear_cross_entropy(hidden, layer, targets)
    )


class Adapter(nn.Module):
    """As wrappers of adapter libraries are: the base layer's weight is to be had by name."""

    def __init__(self) -> None:
        super().__init__()
        self.base = linear()
        self.down = nn.Linear(16, 2, bias=False, dtype=FP64)
        self.up = nn.Linear(2, 50, bias=False, dtype=FP64)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Called(nn.Linear):
    def __call__(self, *args: Any) -> Any:
        return 3 * super().__call__(*args)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def hooked(register: str) -> nn.Module:
    layer = linear()
    hook: Any = double
    getattr(layer, register)(functools.partial(hook) if "pre" in register else hook)
    return layer


def replaced() -> nn.Module:
    layer = linear()
    forward = layer.forward
    layer.forward = lambda input: 2 * forward(input)
    return layer


def pruned() -> nn.Module:
    return prune.l1_unstructured(linear(), "weight", amount=0.5)


def in_fp8() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 64))
    convert_to_fp8(model, "rowwise", min_dim=16)
    return model[0]


def fp32_island() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 50))
    mixprec.cast_model(model, "bf16", keep_fp32=("1",))
    return model[1]


ADAPTER = r"Give the tensors that it comes to .* base\.weight \+ scaling \* B\.weight @ A\.weight"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "adapter": (Adapter, rf"weight is a Adapter, whose forward is .*Adapter\.forward .*{ADAPTER}"),
    "subclass": (lambda: Scaled(16, 50), r"weight is a Scaled, whose forward is .*Scaled\.forward"),
    "call": (lambda: Called(16, 50), "weight is a Called, whose forward was replaced"),
    "replaced": (replaced, "weight is a Linear, whose forward was replaced by another one"),
    "hook": (lambda: hooked("register_forward_hook"), "has a forward hook, double, that runs"),
    "pre-hook": (
        lambda: hooked("register_forward_pre_hook"),
        "has a forward pre hook, double, that runs",
    ),
    "backward hook": (
        lambda: hooked("register_full_backward_hook"),
        "has a backward hook, double, that runs",
    ),
    "pruned": (pruned, "has a forward pre hook, L1Unstructured, that runs"),
    "lazy": (lambda: nn.LazyLinear(50), "weight is a LazyLinear, which has a forward pre hook"),
    "island": (fp32_island, "has a forward pre hook, _widen_inputs, that runs"),
    "fp8": (in_fp8, r"weight is a Float8Linear, whose forward is .*Float8Linear\.forward"),
    "several": (lambda: nn.Sequential(linear()), "weight is a Sequential, whose forward is"),
    "embedding": (lambda: nn.Embedding(50, 16), r"is a Embedding, .*give embedding\.weight"),
    "readout": (
        lambda: mixprec.umup.layers.LinearReadout(16, 50),
        r"is a LinearReadout, .*taken by umup\.losses\.linear_cross_entropy",
    ),
    "our own": (
        lambda: LinearCrossEntropy(16, 50),
        r"weight is a LinearCrossEntropy, .*Call it: head\(hidden, targets\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layer_that_does_more_is_refused_by_the_name_of_it(name: str) -> None:
    make, said = REFUSED[name]
    hidden, _, targets = case()
    with pytest.raises(TypeError, match=said):
        linear_cross_entropy(hidden, make(), targets)


def test_second_bias_and_hooks_of_all_modules_are_refused() -> None:
    hidden, _, targets = case()
    layer = linear()
    with pytest.raises(TypeError, match="bias is given beside a module as weight, whose own bias"):
        linear_cross_entropy(hidden, layer, targets, bias=layer.bias)
    hook: Any = double
    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        with pytest.raises(TypeError, match="has a forward hook, double, that runs"):
            linear_cross_entropy(hidden, layer, targets)
    finally:
        handle.remove()
    linear_cross_entropy(hidden, layer, targets)


def test_what_only_watches_a_layer_does_not_bar_it() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 50))
    hidden = torch.randn(4, 16)
    with mixprec.watch(model):
        loss, _ = linear_cross_entropy(model[0](hidden), model[1], torch.arange(4))
        loss.backward()
    decoder = Decoder(50, width=16, depth=1, num_heads=1, seq_len=8)
    tokens = torch.randint(50, (1, 8))
    with mixprec.watch(decoder):
        decoder.loss(tokens, tokens)
    report = mixprec.umup.check_scales(decoder, lambda _: decoder.loss(tokens, tokens))
    assert report.rows
