"""Unit-scaled modules, the decoder, and updates of a given spectral norm."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from mixprec import umup
from mixprec.umup.decoder import Attention, Decoder, SwiGLU
from mixprec.umup.spectral import spectral_norm

L = umup.layers


def rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MODULES: dict[str, Any] = {
    "Linear": (lambda: L.Linear(16, 32, constraint="gmean", multiplier=2.0), (4, 16)),
    "LinearReadout": (lambda: L.LinearReadout(16, 32, multiplier=2.0), (4, 16)),
    "Conv1d": (lambda: L.Conv1d(4, 6, 3, constraint=None), (2, 4, 9)),
    "Conv2d": (lambda: L.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
    "LayerNorm": (lambda: L.LayerNorm(16), (4, 16)),
    "RMSNorm": (lambda: L.RMSNorm(16), (4, 16)),
    "GELU": (lambda: L.GELU("tanh", multiplier=2.0), (4, 16)),
    "SiLU": (lambda: L.SiLU(constraint=None), (4, 16)),
    "Softmax": (lambda: L.Softmax(multiplier=2.0), (4, 16)),
    "Dropout": (lambda: L.Dropout(0.5).eval(), (4, 16)),
    "SwiGLU": (lambda: SwiGLU(16, 48, multiplier=2.0, branch=0.5), (4, 16)),
    "Attention": (
        lambda: Attention(16, num_heads=2, num_kv_heads=1, seq_len=8, branch=0.5),
        (2, 8, 16),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_copied_pickled_saved_and_loaded_with_what_they_were_told(name: str) -> None:
    make, shape = MODULES[name]
    module = make()
    x = torch.randn(shape, generator=seeded())
    wanted = module(x)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(saved, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x), wanted)
    if any(True for _ in module.parameters()):
        assert umup.spec(copy.deepcopy(module)) == umup.spec(module)


@pytest.mark.parametrize("name", ["Linear", "LinearReadout", "Conv1d", "Conv2d"])
def test_weights_begin_normal_and_biases_at_0_also_from_the_meta_device(name: str) -> None:
    make, _ = MODULES[name]
    with torch.device("meta"):
        module = make()
    module = module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)
    assert rms(module.weight) == pytest.approx(1, abs=0.2)
    assert module.bias is not None and module.bias.count_nonzero() == 0


def test_embeddings_begin_normal_and_padding_at_0() -> None:
    layer = L.Embedding(200, 16, padding_idx=3)
    assert rms(layer.weight) == pytest.approx(1, abs=0.1)
    assert layer.weight[3].count_nonzero() == 0


@pytest.mark.parametrize("kind", [L.Conv1d, L.Conv2d])
@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_convolutions_pad_once_in_every_mode(kind: Any, mode: str) -> None:
    plain = {L.Conv1d: nn.Conv1d, L.Conv2d: nn.Conv2d}[kind]
    options: Any = {"padding": 1, "padding_mode": mode, "stride": 2}
    ours, theirs = kind(4, 6, 3, **options), plain(4, 6, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, *(9,) * (ours.weight.ndim - 2), generator=seeded())
    fan_in = ours.weight[0].numel()
    torch.testing.assert_close(ours(x), theirs(x) * fan_in**-0.5)


def test_printed_modules_say_what_they_are() -> None:
    assert "in_features=4, out_features=2" in repr(L.Linear(4, 2))


# ------------------------------------------------------------------ the decoder


def text(batch: int = 8, time: int = 32, vocab: int = 64) -> Tensor:
    return torch.randint(vocab, (batch, time), generator=seeded(5))


@pytest.mark.parametrize("width", [64, 256])
@pytest.mark.parametrize("kv", [1, 2])
def test_the_branches_of_a_decoder_are_at_unit_scale(width: int, kv: int) -> None:
    torch.manual_seed(0)
    model = Decoder(64, width=width, depth=4, seq_len=32, num_heads=2, num_kv_heads=kv)
    seen: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, L.Linear):
            branch = module.output_multiplier

            def look(_m: Any, _x: Any, y: Tensor, name: str = name, branch: float = branch) -> None:
                seen[name] = rms(y) / branch

            module.register_forward_hook(look)
    logits = model(text())
    for name, size in seen.items():
        if "attention.out" not in name:
            assert size == pytest.approx(1, abs=0.15), name
    # Attention of tokens that repeat, and behind that of the same positions, is not independent.
    assert all(0.7 < size < 3 for name, size in seen.items() if "attention.out" in name)
    assert rms(logits) == pytest.approx(width**-0.5, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"depth_rule": "completep"}])
def test_the_losses_of_a_decoder_agree_with_and_without_logits(options: Any) -> None:
    model = Decoder(64, width=32, depth=2, seq_len=32, **options).double()
    tokens, targets = text(), text().roll(-1, 1)
    targets[2, 7:] = -100
    loss_sum, count = model.loss(tokens, targets)
    logits = model(tokens).flatten(0, 1)
    plain = umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum, plain)
    assert count == (targets != -100).sum()
    params = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss_sum, params), torch.autograd.grad(plain, params)
    )


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one() -> None:
    model = Decoder(64, width=32, depth=2, seq_len=32)
    torch.testing.assert_close(model(text()[:, :5]), model(text())[:, :5], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_decoder_compiles_to_at_most_two_graphs_for_any_batch_and_length(
    dynamic: bool | None,
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = Decoder(64, width=32, depth=1, seq_len=32)
    compiled = torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True)
    for batch, time in ((2, 8), (3, 9), (3, 12), (5, 12), (2, 32), (7, 9)):
        tokens = text(batch, time)
        logits = compiled(tokens)
        torch.testing.assert_close(logits, model(tokens), rtol=1e-4, atol=1e-5)
        logits.sum().backward()
    assert counter.frame_count <= 2


# ------------------------------------------------------------------ spectral norms


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (8, 4, 3, 3)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_a_steps_spectral_norm_is_what_the_rule_says_and_decay_is_beside_it(
    kind: Any, shape: tuple[int, ...]
) -> None:
    matrix = len(shape) == 2
    layer: Any = L.Linear(shape[1], shape[0]) if matrix else L.Conv2d(shape[1], shape[0], 3)
    groups = umup.param_groups(layer, 0.5, "soap", 2**-7)
    optimizer = umup.spectral_normalize(kind(groups, lr=1.0), iterations=50)
    for step in range(3):
        before = layer.weight.detach().clone() * (1 - 2**-7)
        for param in layer.parameters():
            param.grad = torch.randn(param.shape, generator=seeded(step))
        optimizer.step()
        change = (layer.weight.detach() - before).flatten(1)
        found = torch.linalg.matrix_norm(change, 2).item()
        assert found == pytest.approx(0.5 * shape[0] ** 0.5, rel=0.01)
    layer.weight.grad = torch.zeros_like(layer.weight)
    before = layer.weight.detach().clone()
    if kind is torch.optim.SGD:  # the others have moments that go on
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), before * (1 - 2**-7))


@pytest.mark.parametrize("depth_rule", ["sqrt", "completep"])
@pytest.mark.parametrize("kind", ["plain stack", "decoder"])
def test_every_hidden_matrix_is_normalised_whatever_else_is_in_its_group(
    kind: str, depth_rule: Any
) -> None:
    if kind == "decoder":
        model: torch.nn.Module = umup.Decoder(32, width=64, depth=2, seq_len=8)
    else:
        layers = L.Linear(32, 64), L.Linear(64, 64), L.LinearReadout(64, 8)
        model = torch.nn.Sequential(*layers)
    groups = umup.param_groups(model, 0.1, "soap", depth_rule=depth_rule)
    if kind != "decoder" or depth_rule == "completep":
        assert all(group["roles"] != ["hidden"] for group in groups)  # else it is too easy
    optimizer = umup.spectral_normalize(torch.optim.Adam(groups), iterations=50)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=seeded(0))
    optimizer.step()
    spec = umup.spec(model)
    for name, param in model.named_parameters():
        entry, change = spec[name], param.detach() - before[name]
        rate = 0.1 * (entry.depth**-0.5 if depth_rule == "sqrt" else 1.0)
        if entry.role == "hidden":
            found = torch.linalg.matrix_norm(change, 2).item()
            assert found == pytest.approx(rate * param.shape[0] ** 0.5, rel=0.02), name
        elif entry.role in ("norm", "bias"):
            assert change.abs().max() == pytest.approx(rate, rel=1e-3)  # Adam's first step


@pytest.mark.parametrize("grouped", [True, False])
def test_nothing_to_normalise_is_an_error(grouped: bool) -> None:
    layer = L.LinearReadout(8, 8)
    groups: Any = umup.param_groups(layer, 0.5, "soap") if grouped else layer.parameters()
    with pytest.raises(ValueError, match=r"no group of SGD says that it has .*umup\.param_groups"):
        umup.spectral_normalize(torch.optim.SGD(groups, lr=0.1))


def test_roles_that_do_not_fit_the_parameters_are_refused() -> None:
    layer = L.Linear(8, 8)
    optimizer = umup.spectral_normalize(torch.optim.SGD(umup.param_groups(layer, 0.5, "soap")))
    del optimizer.param_groups[0]["params"][:]
    with pytest.raises(ValueError, match=r"a group has 0 parameters and param_roles of \d, so it"):
        optimizer.step()


def test_the_power_method_is_close_and_never_above() -> None:
    for seed in range(5):
        matrix = torch.randn(64, 48, generator=seeded(seed))
        found, exact = spectral_norm(matrix), torch.linalg.matrix_norm(matrix, 2)
        assert 0.9 < float(found / exact) < 1 + 1e-6
    assert spectral_norm(torch.zeros(3, 4)) == 0


def test_16_bit_parameters_are_refused_by_their_changes() -> None:
    layer = L.Linear(8, 8, bias=False).bfloat16()
    optimizer = umup.spectral_normalize(torch.optim.SGD(umup.param_groups(layer, 0.5, "soap")))
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(TypeError, match=r"this one of shape \[8, 8\] is torch.bfloat16, whose"):
        optimizer.step()


def test_a_swiglu_is_its_projections_around_the_function() -> None:
    layer = SwiGLU(16, 48, multiplier=3.0).double()
    x = torch.randn(5, 16, generator=seeded(), dtype=torch.float64)
    inner = umup.functional.silu_glu(layer.up(x), layer.gate(x), multiplier=3.0)
    right = umup.functional.linear(inner, layer.down.weight, constraint=None)
    assert torch.allclose(layer(x), right, rtol=1e-14, atol=1e-13)  # 2^-53 for each of 48 terms
