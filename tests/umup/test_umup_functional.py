"""Unit-scaled functions: RMS 1 both ways, one node each, and what they refuse."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mixprec import umup
from mixprec.umup import functional as U
from mixprec.umup.attention import attention_multiplier
from mixprec.umup.scaling import CONSTRAINTS, constrain


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


# ------------------------------------------------------------------ unit scale


@dataclass(frozen=True)
class Case:
    """A function, what it must not be mistaken for, inputs, and the RMS that is documented."""

    unit: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    output: float = 1.0
    grads: tuple[float, ...] = (1.0,)
    sums: tuple[int, ...] = (1,)
    """How many rows each element of a gradient is a sum over; its RMS is the root of that."""


W = 256
CASES = {
    "linear": Case(U.linear, F.linear, ((512, W), (W, W)), 1, (1, 1), (1, 512)),
    "linear, 4 times wider, gmean": Case(
        partial(U.linear, constraint="gmean"),
        F.linear,
        ((512, W), (4 * W, W)),
        2**-0.5,  # (fan_in / fan_out)^1/4
        (2**0.5, 1),
        (1, 512),
    ),
    "linear on a cut edge": Case(
        partial(U.linear, constraint=None), F.linear, ((512, W), (4 * W, W)), 1, (1, 1), (1, 512)
    ),
    "linear after a branch of RMS 1/4": Case(
        lambda x, w: U.linear(x / 4, w, multiplier=4.0),
        lambda x, w: U.linear(x / 4, w),
        ((512, W), (W, W)),
        1,
        (1, 1),
        (1, 512 // 16),
    ),
    "linear_readout": Case(
        U.linear_readout, F.linear, ((512, W), (4 * W, W)), W**-0.5, (1, 1), (1, 512)
    ),
    "matmul": Case(U.matmul, torch.matmul, ((4, 64, 128), (4, 128, 128)), 1, (1, 2**-0.5), (1, 1)),
    "matmul on cut edges": Case(
        partial(U.matmul, constraint=None),
        torch.matmul,
        ((4, 64, 128), (128, 32)),
        1,
        (1, 1),
        (1, 4),
    ),
    "conv1d": Case(
        partial(U.conv1d, constraint=None),
        F.conv1d,
        ((8, 64, 130), (96, 64, 3)),
        1,
        (1, 1),
        (1, 8 * 128),
    ),
    "conv1d, strided, in groups": Case(
        partial(U.conv1d, stride=2, groups=2, constraint=None),
        partial(F.conv1d, stride=2, groups=2),
        ((8, 64, 258), (96, 32, 4)),
        1,
        (1, 1),
        (1, 8 * 128),
    ),
    "conv2d": Case(
        U.conv2d, F.conv2d, ((4, 32, 34, 34), (32, 32, 3, 3)), 1, (1, 1), (1, 4 * 32 * 32)
    ),
    "gelu": Case(U.gelu, F.gelu, ((64, W),), 1.15, (1.18,)),
    "gelu on a cut edge": Case(partial(U.gelu, constraint=None), F.gelu, ((64, W),), 1.15),
    "gelu, sharp": Case(partial(U.gelu, multiplier=4.0), F.gelu, ((64, W),), 1.21, (1.21,)),
    "silu": Case(U.silu, F.silu, ((64, W),), 1.05, (1.09,)),
    "silu on a cut edge": Case(partial(U.silu, constraint=None), F.silu, ((64, W),), 1.05),
    "silu_glu": Case(
        U.silu_glu, lambda x, gate: x * F.silu(gate), ((64, W), (64, W)), 1, (1, 1), (1, 1)
    ),
    "softmax": Case(U.softmax, partial(F.softmax, dim=-1), ((256, W),)),
    "dropout": Case(partial(U.dropout, p=0.75), partial(F.dropout, p=0.75), ((64, W),)),
    "layer_norm": Case(
        lambda x, w: U.layer_norm(3 * x + 5, (W,), w / rms(w)),
        lambda x, w: (3 * x + 5) * w,
        ((512, W), (W,)),
        1,
        (1, 1),
        (1, 512),
    ),
    "rms_norm": Case(
        lambda x, w: U.rms_norm(3 * x, (W,), w / rms(w)),
        lambda x, w: 3 * x * w,
        ((512, W), (W,)),
        1,
        (1, 1),
        (1, 512),
    ),
    "attention": Case(
        partial(U.scaled_dot_product_attention, is_causal=True, seq_len=64),
        partial(F.scaled_dot_product_attention, is_causal=True),
        ((8, 4, 64, 32),) * 3,
        1,
        (0.81 * 32**-0.5, 0.81 * 32**-0.5, 1),  # position t has no say over t' > t
        (1, 1, 1),
    ),
    "attention, not causal, sharp": Case(
        partial(U.scaled_dot_product_attention, seq_len=64, multiplier=2.0),
        F.scaled_dot_product_attention,
        ((8, 4, 64, 32),) * 3,
        1,
        (2 * 32**-0.5, 2 * 32**-0.5, 1),
        (1, 1, 1),
    ),
    "add": Case(U.add, torch.add, ((64, W), (64, W)), 1, (2**-0.5,) * 2, (1, 1)),
    "add on cut edges": Case(
        partial(U.add, constraint=None),
        torch.add,
        ((64, W), (64, 1)),
        1,
        (1, 1),
        (1, 1),
    ),
    "residual_add": Case(
        partial(U.residual_add, tau=0.5), torch.add, ((64, W), (64, W)), 1, (1, 1), (1, 1)
    ),
}


def measured(
    function: Callable[..., Tensor], case: Case, padding: float
) -> tuple[float, list[float]]:
    """RMS of the output and of each gradient over its sum, on rows that are no padding."""
    torch.manual_seed(1)  # dropout draws from the global generator
    inputs = [normal(*shape, seed=i) for i, shape in enumerate(case.shapes)]
    y = function(*inputs)
    rows = y.shape[0] - int(y.shape[0] * padding)
    dy = normal(*y.shape, seed=9).detach()
    dy[rows:] = 0.0
    y.backward(dy)
    found: list[float] = []
    for x, count in zip(inputs, case.sums, strict=True):
        assert x.grad is not None
        real = x.grad if count > 1 else x.grad[:rows]
        found.append(rms(real) / math.sqrt(count * rows / y.shape[0] if count > 1 else 1))
    return rms(y[:rows]), found


def is_unit_scaled(case: Case, output: float, grads: list[float]) -> bool:
    pairs = zip((output, *grads), (case.output, *case.grads), strict=True)
    return all(abs(found - wanted) <= 0.1 for found, wanted in pairs)


# Gradients of the few elements of a norm's weight: their RMS is uncertain to 1 / (2 W)^1/2 = 4 %.
@pytest.mark.filterwarnings("ignore:Implicit dimension")
@pytest.mark.parametrize("padding", [0.0, 0.25])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_have_the_documented_rms_and_plain_ones_have_not(
    name: str, padding: float
) -> None:
    case = CASES[name]
    output, grads = measured(case.unit, case, padding)
    assert is_unit_scaled(case, output, grads), (output, grads)
    output, grads = measured(case.plain, case, padding)
    assert not is_unit_scaled(case, output, grads), (output, grads)


def test_a_looked_up_row_has_the_root_of_its_uses_as_gradient_and_padding_none() -> None:
    weight = normal(64, W)
    indices = torch.arange(64).repeat(16)
    y = U.embedding(indices, weight, padding_idx=0)
    assert abs(rms(y) - 1) < 0.1
    y.backward(normal(*y.shape, seed=1))
    assert weight.grad is not None
    assert abs(rms(weight.grad[1:]) / 4 - 1) < 0.1  # (V / N)^1/2 = 1/4 is the optimizer's
    assert weight.grad[0].count_nonzero() == 0


def test_residual_is_at_unit_scale_inside_its_branch_in_both_directions() -> None:
    seen: list[Tensor] = []

    def branch(x: Tensor) -> Tensor:
        x.register_hook(lambda grad: seen.append(grad / multiplier))
        return U.linear(x, weight)

    x, weight, multiplier = normal(512, W), normal(W, W, seed=1), 0.25
    y = U.residual(branch, x, multiplier)
    y.backward(normal(512, W, seed=2))
    assert abs(rms(y) - (1 + 0.25**2) ** 0.5) < 0.01
    assert weight.grad is not None
    assert abs(rms(weight.grad) / 512**0.5 - 1) < 0.01  # and not 1/4 of it
    true = torch.func.vjp(lambda x: x + 0.25 * U.linear(x, weight), x.detach())[1]
    torch.testing.assert_close(x.grad, true(normal(512, W, seed=2).detach())[0])


# ------------------------------------------------------------------ products


def test_linear_equals_its_equation_and_the_bias_is_outside_of_the_multiplier() -> None:
    x, weight, bias = (normal(*s, seed=i) for i, s in enumerate(((3, 5, 16), (8, 16), (8,))))
    y = U.linear(x, weight, bias, constraint=None, multiplier=3.0, output_multiplier=0.5)
    torch.testing.assert_close(y, 0.5 * (3 / 4 * (x @ weight.T) + bias))
    dy = normal(3, 5, 8, seed=3).detach()
    y.backward(dy)
    torch.testing.assert_close(x.grad, 3 * 8**-0.5 * dy @ weight)
    torch.testing.assert_close(weight.grad, dy.flatten(0, 1).T @ x.flatten(0, 1))
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)))


@pytest.mark.parametrize("shape", [(16,), (0, 16), (2, 0, 16), (7, 16)])
def test_linear_takes_vectors_and_empty_batches(shape: tuple[int, ...]) -> None:
    x, weight, bias = normal(*shape), normal(8, 16, seed=1), normal(8, seed=2)
    y = U.linear(x, weight, bias)
    torch.testing.assert_close(y, F.linear(x, weight) / 4 + bias)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_linear_takes_what_is_not_contiguous_and_gradients_of_what_needs_one_only() -> None:
    x, weight = normal(16, 6).detach().T, normal(16, 8).T
    y = U.linear(x, weight)
    torch.testing.assert_close(y, F.linear(x, weight) / 4)
    y.sum().backward()
    assert x.grad is None


def test_linear_saves_the_original_tensors_and_makes_one_node() -> None:
    x, weight, bias = normal(4, 16), normal(8, 16, seed=1), normal(8, seed=2)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = U.linear(x, weight, bias)
    assert [t.data_ptr() for t in saved] == [x.data_ptr(), weight.data_ptr()]
    assert y.grad_fn is not None
    leaves = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None}
    assert leaves == {"AccumulateGrad"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multipliers_inside_the_product_lose_no_more_than_plain_16_bits(dtype: torch.dtype) -> None:
    x, weight, bias = (
        normal(*s, seed=i, dtype=dtype) for i, s in enumerate(((64, 96), (80, 96), (80,)))
    )
    exact = 96**-0.5 * x.double() @ weight.double().T + bias.double()
    ours = (U.linear(x, weight, bias).double() - exact).norm()
    plain = (F.linear(x, weight).mul(96**-0.5).add(bias).double() - exact).norm()
    assert ours < 0.75 * plain  # one rounding against three


def test_products_follow_autocast_forward_and_backward() -> None:
    x, weight, bias = normal(4, 16), normal(8, 16, seed=1), normal(8, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        y = U.linear(x, weight, bias)
        z = U.matmul(y, y.T)
    assert y.dtype == z.dtype == torch.bfloat16
    z.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_matmul_broadcasts_and_sums_gradients_over_what_was_broadcast() -> None:
    left, right = normal(3, 1, 4, 9), normal(5, 9, 6, seed=1)
    y = U.matmul(left, right, constraint=None)
    torch.testing.assert_close(y, left @ right / 3)
    dy = normal(*y.shape, seed=2).detach()
    y.backward(dy)
    assert left.grad is not None and right.grad is not None
    torch.testing.assert_close(left.grad, (dy @ right.mT).sum(1, keepdim=True) * 6**-0.5)
    torch.testing.assert_close(right.grad, (left.mT @ dy).sum(0) * 4**-0.5)


def test_convolutions_equal_their_equation_and_leave_the_weight_gradient_alone() -> None:
    x, weight, bias = normal(2, 4, 9, 8), normal(6, 2, 3, 2, seed=1), normal(6, seed=2)
    y = U.conv2d(x, weight, bias, (2, 1), 1, 1, 2, constraint=None)
    plain = F.conv2d(x, weight, None, (2, 1), 1, 1, 2)
    torch.testing.assert_close(y, plain * 12**-0.5 + bias[:, None, None])
    dy = normal(*y.shape, seed=3).detach()
    dx, dweight = torch.autograd.grad(plain, (x, weight), dy)
    y.backward(dy)
    torch.testing.assert_close(x.grad, dx * (2 * 2 / (6 * 6)) ** 0.5)
    torch.testing.assert_close(weight.grad, dweight)
    torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)))


# ------------------------------------------------------------------ attention


def test_the_attention_multiplier_is_exact_for_equal_logits() -> None:
    value = normal(4096, 1, 8, 4).detach()
    zeros = torch.zeros_like(value)
    for causal in (True, False):
        y = F.scaled_dot_product_attention(zeros, zeros, value, is_causal=causal)
        flat = attention_multiplier(8, 2**40, causal=causal)  # so wide that logits are equal
        # 131072 values; those of one sequence share inputs, 8 rows of them
        assert abs(rms(y) * flat - 1) < 0.01
    log = attention_multiplier(8, 2**40, causal=True, limit="log")
    exact = attention_multiplier(8, 2**40, causal=True)
    assert abs(log / exact - 1.143) < 0.001  # over-corrected by 14 %


@pytest.mark.parametrize("seq_len", [1, 2, 31, 32, 33, 1000])
def test_the_harmonic_number_is_exact_from_either_formula(seq_len: int) -> None:
    exact = (seq_len / math.fsum(1 / n for n in range(1, seq_len + 1))) ** 0.5
    assert attention_multiplier(seq_len, 2**60, causal=True) == pytest.approx(exact, rel=1e-11)


def test_a_decoding_step_over_a_cache_equals_the_last_position_of_training() -> None:
    q, k, v = (normal(2, 4, 16, 8, seed=i).detach() for i in range(3))
    whole = U.scaled_dot_product_attention(q, k, v, is_causal=True, seq_len=64)
    step = U.scaled_dot_product_attention(q[:, :, -1:], k, v, seq_len=64, trained_causal=True)
    torch.testing.assert_close(step, whole[:, :, -1:])
    prefix = U.scaled_dot_product_attention(
        q[:, :, :8], k[:, :, :8], v[:, :, :8], is_causal=True, seq_len=64
    )
    torch.testing.assert_close(prefix, whole[:, :, :8])


def test_attention_of_one_position_and_grouped_queries() -> None:
    q, kv = normal(1, 4, 1, 8), normal(1, 2, 1, 8, seed=1)
    y = U.scaled_dot_product_attention(q, kv, kv, is_causal=True, seq_len=1, enable_gqa=True)
    torch.testing.assert_close(y, kv.repeat_interleave(2, 1))


# ------------------------------------------------------------------ residuals


def test_one_multiplier_gives_the_outputs_and_gradient_directions_of_the_tau_rule() -> None:
    layers = 6
    weights = [normal(32, 32, seed=i).detach().double() for i in range(2 * layers)]
    copies = [[w.clone().requires_grad_() for w in weights] for _ in range(2)]
    x = normal(64, 32, seed=99).detach().double()

    def branch(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda h: U.linear(torch.tanh(U.rms_norm(h, (32,), eps=0.0)), weight)

    h = x
    for weight, tau in zip(copies[0], U.residual_taus(layers, 1.5, 0.5), strict=True):
        split, skip = U.residual_split(h, tau)
        h = U.residual_add(branch(weight)(split), skip, tau)
    by_tau = U.rms_norm(h, (32,), eps=0.0)
    h = x
    for index, weight in enumerate(copies[1]):
        h = U.residual(branch(weight), h, U.branch_multipliers(layers, 1.5, 0.5)[index % 2])
    by_one = U.rms_norm(h, (32,), eps=0.0)

    torch.testing.assert_close(by_one, by_tau, rtol=1e-12, atol=1e-12)
    dy = normal(64, 32, seed=98).detach().double()
    by_tau.backward(dy)
    by_one.backward(dy)
    for tau_weight, one_weight in zip(*copies, strict=True):
        assert tau_weight.grad is not None and one_weight.grad is not None
        cosine = F.cosine_similarity(tau_weight.grad.flatten(), one_weight.grad.flatten(), dim=0)
        assert cosine > 1 - 1e-12


def test_completep_divides_by_the_depth() -> None:
    assert U.branch_multipliers(16) == (0.25, 0.25)
    assert U.branch_multipliers(16, depth_rule="completep") == (1 / 16, 1 / 16)
    attention, mlp = U.branch_multipliers(1, attention_ratio=2.0)
    assert attention / mlp == pytest.approx(2) and attention**2 + mlp**2 == pytest.approx(2)


# ------------------------------------------------------------------ scale_fwd, scale_bwd


def test_every_constraint_makes_one_number_of_all() -> None:
    for name in CONSTRAINTS:
        found = constrain(name, 0.5, 2.0, 8.0) if name != "to_grad_input_scale" else (2.0,)  # type: ignore[arg-type]
        assert len(set(found)) == 1 and 0.5 <= found[0] <= 8
    assert constrain("gmean", 0.5, 2.0, 8.0)[0] == pytest.approx(2.0)
    assert constrain("hmean", 0.5, 2.0)[0] == pytest.approx(0.8)
    assert constrain("amean", 0.5, 2.0)[0] == pytest.approx(1.25)
    assert constrain(None, 0.5, 2.0) == (0.5, 2.0)


def test_scaling_in_one_direction_saves_nothing_and_shares_memory_backward() -> None:
    x = normal(8)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = umup.scale_bwd(umup.scale_fwd(x, 3.0), 5.0)
    assert saved == []
    assert umup.scale_bwd(x, 5.0).data_ptr() == x.data_ptr()
    y.sum().backward()
    assert x.grad is not None and x.grad.unique().tolist() == [5.0]
    assert umup.scale_fwd(x, 1.0) is x


def test_multipliers_are_not_rounded_to_16_bits() -> None:
    x = torch.full((1,), 3.0, dtype=torch.bfloat16, requires_grad=True)
    # 3^-1/2 in BF16 is 0.578125, and 3 * 0.578125 rounds to 1.734375; 3^1/2 rounds to 1.734375 too,
    # but 171 * 0.578125 = 98.86 rounds to 99 where 98.73 rounds to 98.5.
    y = umup.scale_bwd(x, 3**-0.5)
    y.backward(torch.full((1,), 171.0, dtype=torch.bfloat16))
    assert x.grad is not None and x.grad.item() == 98.5
    wide = torch.full((1,), 171.0, dtype=torch.bfloat16)
    assert umup.scale_fwd(wide, 3**-0.5).item() == 98.5
    row = torch.tensor([[171.0, 0.0, 0.0]], dtype=torch.bfloat16)
    assert U.linear(row, torch.eye(3, dtype=torch.bfloat16))[0, 0].item() == 98.5


# ------------------------------------------------------------------ compile, func


def a_layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    split, skip = U.residual_split(x, 0.5)
    h = U.linear(U.rms_norm(split, (16,)), w, b)
    h = U.dropout(U.gelu(U.silu_glu(h, U.silu(h))), 0.0)
    h = h.unflatten(-1, (2, 8)).transpose(-2, -3)
    h = U.scaled_dot_product_attention(h, h, h, is_causal=True, seq_len=32)
    h = U.residual_add(h.transpose(-2, -3).flatten(-2), skip, 0.5)
    h = U.residual(lambda x: U.linear_readout(x, w), h, 0.5)
    scores = U.softmax(U.matmul(h, h.mT))
    h = U.matmul(scores, h)
    return U.add(U.conv1d(h.mT, w[..., None], b, padding=0).mT, h, constraint=None)


# Dynamo makes an instance of torch.autograd.Function, which torch itself deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_any_length_compiles_to_at_most_two_graphs(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(a_layer, backend=counter, dynamic=dynamic, fullgraph=True)
    wide = torch.float64
    w, b = normal(16, 16, seed=1, dtype=wide), normal(16, seed=2, dtype=wide)
    for length in (5, 6, 7, 9, 12, 15, 31, 32, 8, 10):
        x, other = (normal(2, length, 16, dtype=wide) for _ in range(2))
        ours, eager = compiled(x, w, b), a_layer(other, w, b)
        torch.testing.assert_close(ours, eager)
        ours.sum().backward()
        eager.sum().backward()
        torch.testing.assert_close(x.grad, other.grad)
    assert counter.frame_count <= 2


def test_torch_func_agrees_with_autograd_by_sample() -> None:
    x, w, b = normal(3, 5, 16), normal(16, 16, seed=1), normal(16, seed=2)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        h = U.residual(lambda x: U.linear(x, w, b), x, 0.5)
        return U.matmul(h, h.mT).square().sum()

    grads: Any = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(x, w)
    for i in range(3):
        one = torch.autograd.grad(loss(x[i], w), (x, w))
        torch.testing.assert_close(grads[0][i], one[0][i])
        torch.testing.assert_close(grads[1][i], one[1])


def test_second_derivatives_are_those_of_the_scaled_gradient() -> None:
    x, weight = normal(4, 16, dtype=torch.float64), normal(8, 16, seed=1, dtype=torch.float64)
    y = U.linear(x, weight, constraint=None).square().sum()
    (dweight,) = torch.autograd.grad(y, weight, create_graph=True)
    dweight.square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


# ------------------------------------------------------------------ what is refused


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "integers": (lambda: umup.scale_fwd(torch.ones(1, dtype=torch.int64), 2.0), TypeError, "int64"),
    "an unknown constraint": (
        lambda: U.linear(normal(2, 2), normal(2, 2), constraint="mean"),  # type: ignore[arg-type]
        ValueError,
        "constraint='mean'; use one of 'to_output_scale'",
    ),
    "a constraint of another number of inputs": (
        lambda: U.linear(normal(2, 2), normal(2, 2), constraint="to_right_grad_scale"),
        ValueError,
        "for an operation with 2 inputs, and this one has 1",
    ),
    "a fan of zero": (
        lambda: U.linear(normal(2, 0), normal(3, 0)),
        ValueError,
        r"weight is \[3, 0\]: a fan of zero",
    ),
    "a convolution with a fan of zero": (
        lambda: U.conv1d(normal(2, 0, 4), normal(3, 0, 2)),
        ValueError,
        r"weight is \[3, 0, 2\]: a fan of zero",
    ),
    "widths that disagree": (
        lambda: U.linear(normal(2, 3), normal(4, 5)),
        ValueError,
        r"x is \[2, 3\] but weight is \[4, 5\]",
    ),
    "a product of vectors": (
        lambda: U.matmul(normal(3), normal(3, 2)),
        ValueError,
        "both need two axes or more",
    ),
    "an empty product": (lambda: U.matmul(normal(3, 0), normal(0, 2)), ValueError, "0 inner size"),
    "no classes": (lambda: U.softmax(torch.zeros(2, 0)), ValueError, "softmax over 0 classes"),
    "a multiplier of 0": (
        lambda: U.gelu(normal(2), multiplier=0.0),
        ValueError,
        "must be positive",
    ),
    "no positions": (
        lambda: attention_multiplier(0, 8, causal=True),
        ValueError,
        "seq_len=0, head_dim=8",
    ),
    "the logarithm of 1": (
        lambda: attention_multiplier(1, 8, causal=True, limit="log"),
        ValueError,
        "use 'harmonic', or 'log' from 2 positions on",
    ),
    "no layers": (lambda: U.branch_multipliers(0), ValueError, "num_layers=0"),
    "an unknown depth rule": (
        lambda: U.branch_multipliers(1, depth_rule="linear"),  # type: ignore[arg-type]
        ValueError,
        "depth_rule='linear'; use 'sqrt' or 'completep'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_what_was_seen(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(
    not isinstance(vars(torch.autograd.Function)["apply"], classmethod),
    reason="this torch matches signatures in its own C code, which nobody can pass by",
)
def test_no_signature_is_matched_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("25 us, several times a small product")

    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3, requires_grad=True)
    U.linear(x, weight)  # what torch does once
    monkeypatch.setattr(inspect, "signature", refuse)
    y = U.matmul(U.linear(umup.scale_bwd(x, 2.0), weight), torch.ones(4, 1))
    y.sum().backward()
    assert x.grad is not None and weight.grad is not None
