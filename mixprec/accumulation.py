"""Gradient accumulation that divides once, by the tokens of the whole step.

The gradient of a step is that of the mean over all its tokens,

    g = (sum over micro-batches i of grad loss_sum_i) / T,    T = sum of num_tokens_i

and a mean of micro-batch means is something else as soon as the counts differ: sums 2 and 90 over 1
and 9 tokens have mean 9.2, but their means 2 and 10 average to 6. So micro-batches are added up as
sums, and T divides when it is known, at the step:

    micro-batch   backward from loss_sum * S / P
    step          gradients * A * P / (S * T)

P is a fixed power of two near T, so that gradients have the size that a mean would give them and
FP16 keeps its range; S is the loss scale. S/P is a power of two as well, and the roots of all
backward passes are exact in 16 bits, where 1/T would be off by up to 0.4 % the same way everywhere.
A is what the ranks' reducer divided by. The one division is part of the optimizer's unscaling pass,
and nothing here waits for the device.

Groups of a unit-scaled model ask for T^-1/2 in place of 1/T, by `token_power`: a sum of T gradients
of RMS 1 has RMS T^1/2. Each of the T is where 16 and 8 bits want it, and P is 1.

16-bit parameters would add up their micro-batches in 16 bits, where BF16 stands still after 256
equal ones. So a window of several micro-batches has FP32 gradients, for 2 more bytes a parameter
until the step; a window of one does not.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.plain_step import check_plain, is_mixed_precision, refuse_closure_rule, step_plain

__all__ = ["GradientAccumulator"]


class _LossScaler(Protocol):
    """What is needed of `DynamicLossScaler` and `StaticLossScaler`."""

    moves: int

    def multiply(self, loss: Tensor) -> Tensor: ...
    def step(self, optimizer: Optimizer, *, grad_factor: Tensor) -> Any: ...


class _MixedPrecision(Protocol):
    """What is needed of `MixedPrecision`; see `plain_step.is_mixed_precision`."""

    loss_scaler: _LossScaler | None

    def step(self, *, grad_factor: Tensor) -> Any: ...


@dataclass
class _Window:
    """Micro-batches since the last step."""

    declared: int | Tensor | None = None
    counts: list[int | Tensor] = field(default_factory=list[int | Tensor])
    losses: list[Tensor] = field(default_factory=list[Tensor])
    complete: bool = False
    scaler_moves: int = 0
    grad_dtypes: list[tuple[Tensor, torch.dtype | None]] | None = None
    """What the parameters' `grad_dtype` was before this window made it FP32; None if it has not."""


class GradientAccumulator:
    """Sums micro-batches and steps `optimizer` with the gradient of the mean over all tokens.

    Any loss function that returns its sum and its token count will do:

        for i, (x, y) in enumerate(micro_batches):
            accumulator.backward(*loss_fn(model(x), y), last=i == len(micro_batches) - 1)
        loss = accumulator.step()

    With several ranks, say how their gradients are reduced: tokens and losses are then added up
    over the ranks, once a step. Parameters that are sharded (FSDP2) are refused by the optimizers.

    Args:
        optimizer: a `mixprec.MixedPrecision`, whose loss scaler is used; or any other with FP32 or
            FP64 parameters, which is then stepped only if all gradients are finite.
        presumed_tokens: P, a power of two, fixed for the run. It moves gradients in the range of
            FP16 and FP8 and changes nothing else. 2^18 by default, near the tokens of a large step;
            1 for groups of `umup.param_groups`, whose gradients are made to need no division.
        loss_scaler: for an optimizer that is not a MixedPrecision.
        fp32_sums: whether 16-bit parameters get FP32 gradients in windows of several micro-batches.
            Turn it off where gradients must stay in 16 bits to fit, or where something else holds
            them: DistributedDataParallel raises "Expected BFloat16, got Float".
        grad_reduction: "mean" if something averages gradients over the ranks before `step`, as
            DistributedDataParallel does; "sum" if it adds them up. None is for one rank.
        process_group: the ranks that hold different tokens; all by default.

    Attributes:
        loss: mean loss of the last window, 0-d, as returned by `step`; None before.
        num_tokens: its tokens, 0-d int64; None before.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(()))
    >>> accumulator = GradientAccumulator(torch.optim.SGD([weight], lr=1.0))
    >>> accumulator.backward((weight + 2) * 1, 1, last=False)
    >>> accumulator.backward((weight + 10) * 9, 9)
    >>> accumulator.step()
    tensor(9.2000, dtype=torch.float64)
    >>> weight.data
    tensor(-1.)
    """

    loss: Tensor | None
    num_tokens: Tensor | None

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        presumed_tokens: int | None = None,
        loss_scaler: _LossScaler | None = None,
        fp32_sums: bool = True,
        grad_reduction: Literal["mean", "sum"] | None = None,
        process_group: Any = None,
    ) -> None:
        if presumed_tokens is None:
            presumed_tokens = 1 if _is_unit_scaled(optimizer) else 2**18
        _check_presumed(presumed_tokens)
        if grad_reduction not in (None, "mean", "sum"):
            raise ValueError(f"grad_reduction={grad_reduction!r}; use 'mean', 'sum' or None")
        refuse_closure_rule(getattr(optimizer, "inner", optimizer))
        if not is_mixed_precision(optimizer):
            check_plain(optimizer)
        elif loss_scaler is not None:
            raise ValueError(
                "MixedPrecision takes the loss scale off, so it has to hold the scaler: give "
                "loss_scaler to mixprec.MixedPrecision and not to GradientAccumulator"
            )
        self.optimizer = optimizer
        self.presumed_tokens = presumed_tokens
        self.loss = self.num_tokens = None
        self._loss_scaler = loss_scaler
        self._fp32_sums = fp32_sums
        self._grad_reduction = grad_reduction
        self._process_group = process_group
        self._window = _Window()
        self._warned = False

    @property
    def loss_scaler(self) -> _LossScaler | None:
        """The scaler in use, MixedPrecision's or the one given; None without loss scaling."""
        return getattr(self.optimizer, "loss_scaler", self._loss_scaler)

    def start(self, num_tokens: Tensor | int) -> None:
        """Begin a window whose T is known: each micro-batch is divided by it on the spot.

        For losses with denominators of their own, `loss_sum + other_sum * (T / other_T)`, and for
        hooks that need the mean's gradient during the backward. Elsewhere leave it out: 1/T rounds
        in 16 bits. Micro-batch counts that the host knows must add up to T.
        """
        if self._window.counts:
            raise RuntimeError(
                f"start() after {len(self._window.counts)} micro-batches that were not divided by "
                f"this count; call it first in a window, or reset() to drop them"
            )
        self._window.declared = _count(num_tokens)

    def backward(
        self,
        loss_sum: Tensor,
        num_tokens: Tensor | int,
        *,
        last: bool = True,
        aux_loss: Tensor | None = None,
    ) -> None:
        """Add the gradients of one micro-batch to the window.

        Args:
            loss_sum: loss summed over the micro-batch's tokens, scalar; cast up to FP32 from 16
                bits. Without tokens a sum is 0 and adds nothing; the mean of no tokens is NaN, and
                stays one in the window's loss.
            num_tokens: targets in that sum, counted as the loss counts them: after shifting, and
                without padding. An int, or an integer tensor, which is not read back.
            last: False if more micro-batches follow in this window. FP32 sums then start with this
                one; `step` refuses until one came without it.
            aux_loss: scalar that is a mean already, such as a router's balance loss. It is weighted
                by `num_tokens`: the window's is the mean over tokens.
        """
        self._check_ranks()
        count = _count(num_tokens)
        loss = _scalar("loss_sum", loss_sum)
        if aux_loss is not None:
            loss = loss + _scalar("aux_loss", aux_loss) * count
        if not loss.requires_grad:
            raise RuntimeError(
                "loss_sum has no graph, so nothing would be learned from this micro-batch; compute "
                "it from the model's output outside of torch.no_grad() and do not detach it"
            )
        scaled = self._scaled(loss)
        self._widen_grads(last)
        scaled.backward()
        window = self._window
        window.losses.append(loss.detach())
        window.counts.append(count)
        window.complete = last

    def step(self) -> Tensor:
        """Step the optimizer on the window's gradients; clear them; return the window's mean loss.

        The mean is 0-d FP64 on the loss's device (FP32 where it has no FP64) and includes auxiliary
        losses: what was optimised. A window without tokens changes nothing, the loss scale neither,
        and its mean is NaN: there was no loss, and a 0 would look like one. A window with
        non-finite gradients is skipped. The next window starts empty in every case, also after an
        error raised by the optimizer.
        """
        window = self._window
        if not window.complete:
            raise RuntimeError(
                f"step() after {len(window.counts)} micro-batches, the latest with last=False: "
                f"more were to come. Give last=True to the final one."
                if window.counts
                else "step() before any micro-batch; call backward(loss_sum, num_tokens) first"
            )
        try:
            _check_declared(window)
            tokens, total = self._over_ranks(_token_sum(window), _loss_sum(window))
            self.num_tokens = tokens
            self.loss = torch.where(tokens > 0, total / tokens, torch.nan)
            self._step_optimizer(self._factor(tokens, total.dtype))
        finally:
            self.reset()
        return self.loss

    def reset(self) -> None:
        """Drop the window: gradients, counts and losses. For a backward that failed half-way."""
        self.optimizer.zero_grad(set_to_none=True)
        for param, grad_dtype in self._window.grad_dtypes or ():
            param.grad = None
            param.grad_dtype = grad_dtype
        self._window = _Window()

    def _scaled(self, loss: Tensor) -> Tensor:
        declared = self._window.declared
        if declared is None:
            root = loss * (1 / self.presumed_tokens)
        elif isinstance(declared, int):
            root = loss / max(declared, 1)
        else:
            root = loss / declared.clamp(min=1)
        return root if self.loss_scaler is None else self._multiplied(root, self.loss_scaler)

    def _multiplied(self, root: Tensor, loss_scaler: _LossScaler) -> Tensor:
        scaled = loss_scaler.multiply(root)
        if not self._window.counts:
            self._window.scaler_moves = loss_scaler.moves
        elif self._window.scaler_moves != loss_scaler.moves:
            raise RuntimeError(
                "another optimizer stepped with this loss scaler since the window's first "
                "micro-batch, so the loss scale may have moved, and gradients that carry different "
                "ones cannot be added up. Step it before or after the window, or give it a loss "
                "scaler of its own."
            )
        return scaled

    def _factor(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """`A * P / T`, 0-d; 0 without tokens. The 1/S is multiplied in where the scaler is."""
        divided = self._ranks() if self._grad_reduction == "mean" else 1
        power = self._token_power()
        wide = tokens.to(dtype)
        if self._window.declared is not None:
            factor = divided * wide ** (power + 1)
        elif power == -1:
            factor = divided * self.presumed_tokens / wide
        else:
            factor = divided * self.presumed_tokens * wide**power
        return torch.where(tokens > 0, factor, 0.0)

    def _token_power(self) -> float:
        """-1 divides by the tokens; groups of `umup.param_groups` have -1/2."""
        powers = [float(g.get("token_power", -1.0)) for g in self.optimizer.param_groups]
        if len(set(powers)) > 1:
            other = next(i for i, power in enumerate(powers) if power != powers[0])
            raise ValueError(
                f"param_groups[0] has token_power {powers[0]} and param_groups[{other}] "
                f"{powers[other]} (-1.0 where there is none), but one factor multiplies the "
                f"gradients of all. Make all groups with umup.param_groups, or give each the same."
            )
        return powers[0]

    # ---------------------------------------- ranks

    def _ranks(self) -> int:
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self._process_group)

    def _check_ranks(self) -> None:
        ranks = self._ranks()
        if ranks > 1 and self._grad_reduction is None:
            raise RuntimeError(
                f"this is one of {ranks} ranks, and grad_reduction is None: each would divide by "
                f"its own count, and their weights would drift apart. Give grad_reduction='mean' "
                f"under DistributedDataParallel, or 'sum' if gradients are added up over the ranks."
            )

    def _over_ranks(self, tokens: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and loss, added up over the ranks by one reduction."""
        if self._ranks() == 1:
            return tokens, total
        both = torch.stack((tokens.to(total.dtype), total))  # counts below 2^53 are exact in FP64
        torch.distributed.all_reduce(both, group=self._process_group)
        return both[0].to(torch.int64), both[1]

    def _step_optimizer(self, factor: Tensor) -> None:
        if is_mixed_precision(self.optimizer):
            cast(_MixedPrecision, self.optimizer).step(grad_factor=factor)
        elif self._loss_scaler is not None:
            self._loss_scaler.step(self.optimizer, grad_factor=factor)
        else:
            outcome = step_plain(self.optimizer, factor)
            if outcome.stepped is False and not self._warned and bool(outcome.counted):
                self._warned = True
                warnings.warn(
                    "non-finite gradients: this step was skipped; the next ones will be skipped "
                    "without a word. Give loss_scaler=mixprec.StaticLossScaler(1.0) to make 50 in "
                    "a row an error that names them.",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _widen_grads(self, last: bool) -> None:
        """Make gradients FP32 once a second micro-batch is certain; values that are there stay."""
        window = self._window
        alone = last and not window.counts
        if alone or not self._fp32_sums or window.grad_dtypes is not None:
            return
        window.grad_dtypes = []
        params = (p for group in self.optimizer.param_groups for p in group["params"])
        for param in params:
            if param.dtype in (torch.bfloat16, torch.float16):
                window.grad_dtypes.append((param, param.grad_dtype))
                grad, param.grad = param.grad, None
                param.grad_dtype = torch.float32
                param.grad = None if grad is None else grad.float()


def _is_unit_scaled(optimizer: Optimizer) -> bool:
    """Whether sums over T tokens are made to be divided by less than T, see `umup.param_groups`."""
    return all(group.get("token_power", -1.0) > -1.0 for group in optimizer.param_groups)


def _check_presumed(presumed_tokens: Any) -> None:
    positive = isinstance(presumed_tokens, int) and presumed_tokens > 0
    if not positive or presumed_tokens.bit_count() != 1:
        raise ValueError(
            f"presumed_tokens is {presumed_tokens!r}; it must be an int and a power of two, such "
            f"as 2**18, because dividing by any other number rounds every gradient in 16 bits"
        )


def _count(num_tokens: Tensor | int) -> int | Tensor:
    """The count as an int where the host can read it for free, else as 0-d int64."""
    if not isinstance(num_tokens, Tensor):
        return _host_count(num_tokens)
    if num_tokens.numel() != 1 or num_tokens.dtype.is_floating_point:
        raise TypeError(
            f"num_tokens is {num_tokens.dtype} of shape {list(num_tokens.shape)}; it must be one "
            f"integer, such as (targets != ignore_index).sum()"
        )
    if num_tokens.device.type == "cpu":
        return _host_count(num_tokens.item())
    count = num_tokens.detach().reshape(()).to(torch.int64)
    torch._assert_async(count >= 0, "num_tokens is negative")  # raised by the device, later
    return count


def _host_count(num_tokens: Any) -> int:
    try:
        count = operator.index(num_tokens)
    except TypeError:
        count = None
    if count is None or isinstance(num_tokens, bool):
        raise TypeError(
            f"num_tokens is {num_tokens!r}; it must be the integer count of targets in loss_sum, "
            f"such as (targets != ignore_index).sum()"
        )
    if count < 0:
        raise ValueError(f"num_tokens is {count}; a micro-batch has 0 tokens or more")
    return count


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


def _check_declared(window: _Window) -> None:
    counts = [count for count in window.counts if isinstance(count, int)]
    known = len(counts) == len(window.counts) and isinstance(window.declared, int)
    if known and sum(counts) != window.declared:
        raise ValueError(
            f"start() was given {window.declared} tokens, but the window's micro-batches hold "
            f"{sum(counts)}; all were divided by the former. The step was not taken."
        )


def _token_sum(window: _Window) -> Tensor:
    """T, 0-d int64 beside the losses."""
    device = window.losses[0].device
    counts = window.counts if window.declared is None else [window.declared]
    on_host = sum(count for count in counts if isinstance(count, int))
    on_device = [count.to(device) for count in counts if isinstance(count, Tensor)]
    if on_device:
        return torch.stack(on_device).sum() + on_host
    return torch.full((), on_host, dtype=torch.int64, device=device)


def _loss_sum(window: _Window) -> Tensor:
    """Sum of the losses, 0-d. One reduction, not a chain of additions, for devices without FP64."""
    device = window.losses[0].device
    wide = _widest_dtype(device)
    return torch.stack([loss.to(device=device, dtype=wide) for loss in window.losses]).sum()


@cache
def _widest_dtype(device: torch.device) -> torch.dtype:
    """FP64, or FP32 on a device that has no FP64 (Apple's)."""
    try:
        torch.empty((), dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64
