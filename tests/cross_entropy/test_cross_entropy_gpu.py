"""What only a CUDA device can show of the loss: products, memory, a host that never waits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from losses import (
    BF16,
    FP16,
    FP32,
    FP64,
    OPTIONS,
    PADDING,
    case,
    error,
    filled,
    fp32_gradients,
    fp64_twins,
    full_logits,
    gradient_of,
    reference,
    trained_model,
)
from torch import Tensor, nn
from waiting import no_waiting

from mixprec.cross_entropy import linear_cross_entropy
from mixprec.cross_entropy.chunks import default_chunk_size
from mixprec.cross_entropy.softmax import twin
from mixprec.loss_scaling import StaticLossScaler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]


def test_rows_have_a_kernel_here() -> None:
    assert twin(torch.device("cuda"), BF16).__name__.endswith("by_kernels"), (
        "no Triton: all else would test plain torch"
    )


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(BF16, None), (BF16, FP32), (FP16, None), (FP16, FP32), (FP32, None), (FP64, None)],
)
@pytest.mark.parametrize("name", OPTIONS)
def test_gpu_agrees_with_the_cpu_and_never_makes_the_host_wait(
    name: str, dtype: torch.dtype, logits_dtype: torch.dtype | None
) -> None:
    hidden, weight, targets = case(300, 64, 1001, dtype)
    options = filled(OPTIONS[name], 300, 1001, dtype)
    placed = {k: v.detach().cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    there = on_gpu(hidden, weight)
    leaves, moved = [hidden, weight], list(there)
    if "bias" in options:
        placed["bias"].requires_grad_()
        leaves.append(options["bias"])
        moved.append(placed["bias"])
    fp32_gradients(*leaves[1:], *moved[1:])
    how: dict[str, Any] = {"chunk_size": 128, "logits_dtype": logits_dtype}
    if logits_dtype is None and dtype.itemsize == 2:
        how["logits_dtype"] = dtype
    expected, _ = linear_cross_entropy(hidden, weight, targets, **options, **how)
    (expected / 7021).backward()

    labels, count = targets.cuda(), int((targets != PADDING).sum())
    linear_cross_entropy(there[0], there[1], labels, **placed, **how)  # compiles
    with no_waiting():
        loss, _ = linear_cross_entropy(
            there[0], there[1], labels, num_tokens=count, **placed, **how
        )
        (loss / 7021).backward()
    # FP32 sums in another order; 16-bit logits near a tie may round the other way.
    loose = logits_dtype is None and dtype.itemsize == 2
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4 if loose else 1e-5, atol=0)
    bound = {BF16: 3e-3, FP16: 6e-4, FP32: 2e-3, FP64: 1e-10}[dtype]  # FP32: TF32 may be allowed
    for ours, right in zip(moved, leaves, strict=True):
        assert error(gradient_of(ours).cpu(), right.grad) < bound


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"), [(BF16, None), (BF16, FP32), (FP32, None), (FP64, None)]
)
@pytest.mark.parametrize("name", ["plain", "class weight", "softcap", "everything"])
def test_details_are_those_of_full_logits_and_wait_for_nothing(
    name: str, dtype: torch.dtype, logits_dtype: torch.dtype | None
) -> None:
    hidden, weight, targets = case(300, 64, 1001, dtype)
    options = filled(OPTIONS[name], 300, 1001, dtype)
    placed = {k: v.detach().cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
    exact: dict[str, Any] = {
        k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()
    }
    logits = full_logits(hidden.double(), weight.double(), **exact).detach()
    states, head = on_gpu(hidden, weight)
    labels = targets.cuda()
    kept = targets != PADDING
    given: dict[str, Any] = {"logits_dtype": logits_dtype, "num_tokens": int(kept.sum()), **placed}
    linear_cross_entropy(states, head, labels, return_details=True, **given)  # compiles
    with no_waiting():
        details = linear_cross_entropy(states, head, labels, return_details=True, **given)[2]
    # A logit rounds by up to 2^-9 of the product that it is of; TF32, which may be allowed for
    # FP32, by 2^-10 for its operands.
    products = (hidden.double() @ weight.double().T).abs().max().item()
    bound = 1e-9 if dtype == FP64 else 2.0**-8 * products * options.get("logit_multiplier", 1.0)
    found, argmax = details.logsumexp.cpu().double(), details.argmax.cpu()
    assert (found - logits.logsumexp(1).where(kept, 0.0)).abs().max() <= bound
    at = logits.gather(1, argmax.clamp(min=0)[:, None]).squeeze(1)
    assert (logits.amax(1) - at)[kept].max() <= bound
    assert (argmax[~kept] == -1).all()
    assert torch.equal(details.correct.cpu(), (argmax == targets) & kept)
    ones = torch.ones(1001, dtype=FP64), torch.ones(300, dtype=FP64)
    weights = exact.get("class_weight", ones[0])[targets.clamp(min=0)]
    weights = weights * exact.get("token_weight", ones[1])
    torch.testing.assert_close(
        details.weight_sum.cpu().double(), weights[kept].sum(), rtol=1e-5, atol=0
    )


GRID = list(
    itertools.product(
        [(252, 507, 123), (512, 64, 2048), (33, 17, 1001), (1000, 256, 50_257)],
        [0.1, 1.0, 8.0],
        [0.0, 0.2],
    )
)


@pytest.mark.parametrize("logits_dtype", [None, FP32])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(("shape", "sharpness", "padding"), GRID)
def test_no_error_is_larger_than_that_of_full_16_bit_logits(
    shape: tuple[int, int, int],
    sharpness: float,
    padding: float,
    dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
) -> None:
    inputs = case(*shape, dtype, sharpness=sharpness, padding=padding)
    hidden, weight, targets = on_gpu(*inputs)
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    exact_loss = reference(exact[0], exact[1], targets).sum()
    exact_loss.backward()

    eager = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
    eager_loss = F.cross_entropy(F.linear(eager[0], eager[1]).float(), targets, reduction="sum")
    eager_loss.backward()

    loss, _ = linear_cross_entropy(
        hidden, weight, targets, chunk_size=256, logits_dtype=logits_dtype
    )
    loss.backward()
    truth = exact_loss.item()
    if logits_dtype == FP32:
        assert abs(loss.item() - truth) <= abs(eager_loss.item() - truth) + 1e-6 * truth
    # Rounded logits err at random, and by luck their sum may come out small for one of the two. Of
    # single tokens both round the same logits, or nearly, and ours that of the target less.
    each, _ = linear_cross_entropy(
        hidden, weight, targets, chunk_size=256, logits_dtype=logits_dtype, reduction="none"
    )
    assert abs(each.double().sum().item() - loss.item()) <= 1e-6 * truth
    exact_each = reference(exact[0], exact[1], targets)
    eager_logits = F.linear(eager[0], eager[1]).float()
    eager_each = F.cross_entropy(eager_logits, targets, reduction="none")
    mine, theirs = error(each, exact_each), error(eager_each, exact_each)
    assert mine <= 1.02 * theirs + 1e-7, f"losses: {mine:.2e} against {theirs:.2e} of full logits"
    for name, ours, plain, right in zip("hw", (hidden, weight), eager, exact, strict=True):
        mine, theirs = error(ours.grad, right.grad), error(plain.grad, right.grad)
        assert mine <= 1.02 * theirs, f"{name}: {mine:.2e} against {theirs:.2e} of full logits"


# Hidden states' gradients of these widths have fewer and more elements than a wave of tiles.
@pytest.mark.parametrize("width", [64, 2048])
@pytest.mark.parametrize("learnt", [4.5, 12.0])
@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_errors_stay_within_their_bounds_on_a_model_that_has_learnt(
    logits_dtype: torch.dtype, learnt: float, width: int
) -> None:
    hidden, weight, targets = trained_model(learnt, "cuda", width)
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    exact_loss = reference(exact[0], exact[1], targets).sum()
    exact_loss.backward()
    loss, _ = linear_cross_entropy(hidden, weight, targets, logits_dtype=logits_dtype)
    loss.backward()
    found = error(hidden.grad, exact[0].grad), error(weight.grad, exact[1].grad)
    # A tensor core adds 16 products at a time and cuts the sum off, by up to a spacing, 2^-19 for
    # logits beyond 16: at random, sqrt(width / 16) spacings a logit, which a loss near 0 shows.
    spacings = (width / 16) ** 0.5
    allowed = 3e-6 + len(targets) * spacings * 2.0**-19 / exact_loss.item()
    assert abs(loss.item() / exact_loss.item() - 1) < (allowed if logits_dtype == FP32 else 1e-4)
    # Rounding the hidden states' gradient to BF16 is 1.66e-3 of it, and there is hardly more, until
    # few classes have all of a token's gradient, whose own rounding to BF16 then counts: 2^-9 at
    # most, some 1.5e-3 at random, 2.24e-3 in all (2.27e-3 seen; full logits 8.8e-3).
    peaked = learnt == 12.0
    assert found[0] <= (2.5e-3 if peaked else 2.2e-3), found
    assert found[1] <= (1.5e-3 if peaked and logits_dtype == BF16 else 3e-4), found


@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_loss_and_weight_gradient_do_not_depend_on_the_number_of_chunks(
    logits_dtype: torch.dtype,
) -> None:
    hidden, weight, targets = on_gpu(*case(1024, 64, 2048, BF16, padding=0.0))
    fp32_gradients(weight)
    exact = fp64_twins(hidden, weight)
    reference(exact[0], exact[1], targets).sum().backward()
    losses: list[float] = []
    errors: list[float] = []
    for chunks in (1, 4, 64, 1024):
        hidden.grad = weight.grad = None
        loss, _ = linear_cross_entropy(
            hidden, weight, targets, chunk_size=1024 // chunks, logits_dtype=logits_dtype
        )
        loss.backward()
        losses.append(loss.item())
        errors.append(error(weight.grad, exact[1].grad))
    assert max(losses) - min(losses) <= 1e-6 * losses[0], losses
    assert max(errors) - min(errors) <= 5e-3 * errors[0], errors


@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_row_sums_of_logit_gradients_have_no_bias(logits_dtype: torch.dtype) -> None:
    tokens = 253  # 1/253 is 0.37 % below its BF16 rounding
    hidden, weight, targets = on_gpu(*case(tokens, 8, 20_000, BF16, padding=0.0))
    with torch.no_grad():
        weight[:, 0] = 1.0
    F.cross_entropy(F.linear(hidden, weight).float(), targets).backward()
    assert -4.5e-3 < gradient_of(hidden)[:, 0].float().mean() * tokens < -3e-3
    hidden.grad = None
    linear_cross_entropy(hidden, weight, targets, logits_dtype=logits_dtype)[0].backward()
    assert abs(gradient_of(hidden)[:, 0].float().mean()) < 1e-4


def test_two_runs_give_the_same_bits() -> None:
    hidden, weight, targets = on_gpu(*case(2000, 256, 5000, BF16))
    targets[:500] = 7  # many atomic additions would meet in its row
    fp32_gradients(weight)
    runs = [
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], [hidden, weight])
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_incoming_gradient_multiplies_in_fp32() -> None:
    hidden, weight, targets = on_gpu(*case(dtype=BF16))
    fp32_gradients(weight)
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    plain = gradient_of(hidden).clone(), gradient_of(weight).clone()
    hidden.grad = weight.grad = None
    (linear_cross_entropy(hidden, weight, targets)[0] * (1 / 7021)).backward()
    root = torch.tensor(1 / 7021, device="cuda")
    assert torch.equal(gradient_of(hidden), (plain[0].float() * root).bfloat16())
    assert torch.equal(gradient_of(weight), plain[1] * root)


def test_fp16_keeps_every_row_under_a_large_loss_scale() -> None:
    hidden, weight, targets = on_gpu(*case(48, 8, 32_000, FP16, sharpness=0.5, padding=0.0))
    exact = fp64_twins(hidden, weight)
    reference(exact[0], exact[1], targets).sum().backward()
    fp32_gradients(weight)
    loss, _ = linear_cross_entropy(hidden, weight, targets)
    StaticLossScaler(2.0**16).multiply(loss / 8192).backward()
    factor = 2.0**16 / 8192
    assert (gradient_of(weight) != 0).any(1).all()
    assert error(gradient_of(weight) / factor, exact[1].grad) < 1e-3
    assert error(gradient_of(hidden).double() / factor, exact[0].grad) < 1e-3


@pytest.mark.parametrize("padding", [0.0, 1 / 7])
@pytest.mark.parametrize("logits_dtype", [BF16, FP32])
def test_peak_memory_is_that_of_the_formula(logits_dtype: torch.dtype, padding: float) -> None:
    tokens, width, vocab = 6000, 512, 40_000
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=g).bfloat16().cuda().requires_grad_()
    weight = (torch.randn(vocab, width, generator=g) / 16).bfloat16().cuda().requires_grad_()
    targets = torch.randint(vocab, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < padding] = PADDING
    targets = targets.cuda()
    fp32_gradients(weight)
    before = 0
    for _ in range(2):  # the first run fills caches of the products
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, targets, logits_dtype=logits_dtype)[0].backward()
    chunk = min(default_chunk_size(vocab, logits_dtype), tokens)
    formula = chunk * vocab * logits_dtype.itemsize + 4 * vocab * width + 2 * tokens * width
    if padding:
        formula += 2 * chunk * width
    if chunk * width <= 2**22:
        formula += 4 * chunk * width
    assert torch.cuda.max_memory_allocated() - before <= formula + 2**22
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, targets, logits_dtype=logits_dtype)
    formula -= 4 * vocab * width + 2 * tokens * width
    assert torch.cuda.max_memory_allocated() - before <= formula + 2**22


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"reduction": "none"}])
def test_padding_and_odd_memory_layouts_change_nothing(how: dict[str, Any]) -> None:
    hidden, weight, targets = on_gpu(*case(200, 40, 333, BF16))
    kept = targets != PADDING
    short = linear_cross_entropy(hidden[kept], weight, targets[kept])[0]
    expected = torch.autograd.grad(short, [hidden, weight])
    layouts = (
        (hidden.detach().t().contiguous().t(), weight.detach().t().contiguous().t()),
        (torch.stack([hidden, hidden], 1).detach()[:, 0], weight.detach()),
    )
    for rows, table in layouts:
        rows, table = rows.requires_grad_(), table.requires_grad_()
        labels = torch.stack([targets, targets], 1)[:, 0]
        losses, _ = linear_cross_entropy(rows, table, labels, **how)
        found = torch.autograd.grad(losses.sum(), [rows, table])
        torch.testing.assert_close(losses.sum(), short, rtol=1e-5, atol=0)
        assert (found[0][~kept] == 0).all()
        for ours, right in zip(found, expected, strict=True):
            assert error(ours, right) < 5e-3  # a chunk of another size may sum in another order


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch itself
def test_compiled_model_has_no_graph_break_and_the_same_gradients() -> None:
    hidden, weight, targets = on_gpu(*case(dtype=BF16))

    def model(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        loss, count = linear_cross_entropy(hidden * 2, weight, targets, num_tokens=None)
        return loss * 3, count

    expected, expected_count = model(hidden, weight, targets)
    grads = torch.autograd.grad(expected, [hidden, weight])
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True)
    loss, count = compiled(hidden, weight, targets)
    assert torch.equal(loss, expected)
    assert torch.equal(count, expected_count)
    for ours, right in zip(torch.autograd.grad(loss, [hidden, weight]), grads, strict=True):
        assert error(ours, right) < 3e-3


def test_autocast_rounds_operands_and_no_weight_gradient() -> None:
    hidden, weight, targets = on_gpu(*case(dtype=BF16))
    fp32_gradients(hidden, weight)
    expected, _ = linear_cross_entropy(hidden, weight, targets)
    expected.backward()
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    with torch.autocast("cuda", BF16):
        loss, _ = linear_cross_entropy(wide[0], wide[1], targets)
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(gradient_of(wide[1]), gradient_of(weight))
    assert torch.equal(gradient_of(wide[0]), gradient_of(hidden))


def test_nothing_but_padding_has_zero_loss_and_zero_gradients() -> None:
    for tokens in (0, 5):
        hidden, weight, targets = on_gpu(*case(tokens, dtype=BF16))
        targets.fill_(PADDING)
        loss, count = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
        assert loss == 0 and count == 0
        assert (gradient_of(hidden) == 0).all() and (gradient_of(weight) == 0).all()


WRONG = """
import torch, mixprec
hidden, weight = torch.zeros(6, 8, device="cuda"), torch.zeros(4, 8, device="cuda")
targets = torch.tensor({targets}, device="cuda")
mixprec.linear_cross_entropy(hidden, weight, targets, num_tokens={count})
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("targets", "count", "said"),
    [
        ([0, 1, 2, 3, 4, 0], None, r"a target is neither in [0, 4) nor ignore_index"),
        ([0, 1, 2, 3, -1, 0], 6, r"a target is neither in [0, 4) nor ignore_index"),
        ([0, 1, 2, 3, -100, 0], 6, "num_tokens=6 is not the number of targets"),
    ],
)
def test_wrong_targets_are_asserted_on_the_device(
    targets: list[int], count: int | None, said: str
) -> None:
    """In a process of its own: after a device assertion nothing runs any more."""
    code = WRONG.format(targets=targets, count=count)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert said in done.stderr + done.stdout


def test_second_device_is_used_where_the_tensors_are() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    hidden, weight, targets = (t.detach().to("cuda:1") for t in case(dtype=BF16))
    head = nn.Parameter(weight)
    loss, _ = linear_cross_entropy(hidden, head, targets)
    loss.backward()
    assert loss.device == gradient_of(head).device == torch.device("cuda:1")
