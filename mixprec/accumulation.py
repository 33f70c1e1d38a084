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

import copy
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.parameters import listed, names_of
from mixprec.plain_optimizer import check_plain, is_mixed_precision, refuse_closure_rule, step_plain
from mixprec.user_warnings import Said
from mixprec.window.late_sums import LateSums
from mixprec.window.losses import loss_of, sum_of
from mixprec.window.same_tokens import RankTwins, refuse_meshes
from mixprec.window.token_counts import add_up, check_declared, count_of, sum_over_ranks
from mixprec.window.window import Window
from mixprec.wrapped import inside_of

__all__ = ["GradientAccumulator"]


class _LossScaler(Protocol):
    """What is needed of `DynamicLossScaler` and `StaticLossScaler`."""

    moves: int

    def multiply(self, loss: Tensor) -> Tensor: ...
    def step(self, optimizer: Optimizer, *, grad_factor: Tensor) -> Any: ...


class _MixedPrecision(Protocol):
    """What is needed of `MixedPrecision`; see `plain_optimizer.is_mixed_precision`."""

    loss_scaler: _LossScaler | None

    def step(self, *, grad_factor: Tensor) -> Any: ...


_WINDOWS_IN_A_ROW = 10
"""So many windows in a row without a token are said: one or two happen, ten are a mistake."""

_LARGEST_PRESUMED = 2**40

_LOW = (torch.bfloat16, torch.float16)


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
        optimizer = inside_of(optimizer)
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
        self._window = Window()
        self._twins = RankTwins()
        self._tokens_lately = LateSums(_WINDOWS_IN_A_ROW)
        self._skips_lately = LateSums(_WINDOWS_IN_A_ROW)
        self._said = Said()
        _say_narrow_grads(optimizer, self._said)

    @property
    def loss_scaler(self) -> _LossScaler | None:
        """The scaler in use, MixedPrecision's or the one given; None without loss scaling."""
        return getattr(self.optimizer, "loss_scaler", self._loss_scaler)

    def start(self, num_tokens: Tensor | float) -> None:
        """Begin a window whose T is known: each micro-batch is divided by it on the spot.

        For losses with denominators of their own, `loss_sum + other_sum * (T / other_T)`, and for
        hooks that need the mean's gradient during the backward. Elsewhere leave it out: 1/T rounds
        in 16 bits. Over several ranks T is that of all, the same number on each. The window has to
        hold T tokens; where only the device knows, it is the device that raises.
        """
        window = self._usable_window()
        if window.counts:
            raise RuntimeError(
                f"start() after {len(window.counts)} micro-batches that were not divided by "
                f"this count; call it first in a window, or reset() to drop them"
            )
        window.declared = count_of(num_tokens)

    def backward(
        self,
        loss_sum: Tensor,
        num_tokens: Tensor | float,
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
                without padding. A whole number, or a tensor of one, which is not read back.
            last: False if more micro-batches follow in this window. FP32 sums then start with this
                one; `step` refuses until one came without it.
            aux_loss: scalar that is a mean already, such as a router's balance loss. It is weighted
                by `num_tokens`: the window's is the mean over tokens.

        Raises:
            RuntimeError: if the loss depends on none of the optimizer's parameters; if gradients
                of the window were cleared, or added to by another backward pass; if an earlier
                backward failed half-way, or a scaler has multiplied the loss already.
        """
        self._check_ranks()
        window = self._usable_window()
        count = count_of(num_tokens)
        loss = loss_of(loss_sum, count, aux_loss)
        if window.is_open:
            window.check(self._said)
        scaled = self._scaled(loss)
        if not window.is_open:
            window.open(self, self.optimizer, self._said)
        window.failed = (
            f"the backward of micro-batch {len(window.counts) + 1} did not get to its end"
        )
        if self._fp32_sums and window.grad_dtypes is None and (window.counts or not last):
            window.widen()
        scaled.backward()
        reached, frozen = window.take_in()
        if not reached:
            self._raise_unreached()
        window.losses.append(loss.detach())
        window.counts.append(count)
        window.complete = last
        window.failed = ""
        if frozen:
            self._said.warn("frozen", frozen)

    def step(self) -> Tensor:
        """Step the optimizer on the window's gradients; clear them; return the window's mean loss.

        The mean is 0-d FP64 on the loss's device (FP32 where it has no FP64) and includes auxiliary
        losses: what was optimised. A window without tokens changes nothing, the loss scale neither,
        and its mean is NaN: there was no loss, and a 0 would look like one. A window with
        non-finite gradients is skipped. The next window starts empty in every case, also after an
        error raised here or by the optimizer.
        """
        window = self._usable_window()
        if not window.complete:
            raise RuntimeError(
                f"step() after {len(window.counts)} micro-batches, the latest with last=False: "
                f"more were to come. Give last=True to the final one."
                if window.counts
                else "step() before any micro-batch; call backward(loss_sum, num_tokens) first"
            )
        try:
            window.check(self._said, at_step=True)
            self._check_scale(self.loss_scaler)
            total = sum_of(window.losses)
            tokens, total = self._over_ranks(add_up(window.counts, total.device), total)
            check_declared(tokens, window.declared)
            self.num_tokens = tokens
            self.loss = torch.where(tokens > 0, total / tokens, torch.nan)
            factor = self._factor(tokens, total.dtype)
            window.spent = True
            window.unguard()
            self._step_optimizer(factor)
            self._say_empty(tokens)
        finally:
            self.reset()
        return self.loss

    def reset(self) -> None:
        """Drop the window: gradients, counts and losses. For a backward that failed half-way.

        If it is interrupted itself, the next call of any method goes through with it.
        """
        self._window.spent = True
        try:
            self.optimizer.zero_grad(set_to_none=True)
        finally:
            self._window.close()
            self._window = Window()

    def _usable_window(self) -> Window:
        if self._window.spent:
            self.reset()
        if self._window.failed:
            raise RuntimeError(
                f"{self._window.failed}, so a part of its gradients, unknown which, is in the "
                f"window's sums. Call accumulator.reset(), which drops the window, and begin it "
                f"anew."
            )
        return self._window

    def _raise_unreached(self) -> None:
        message = self._window.unreached()
        if self._window.counts:
            self._window.failed = ""  # nothing was added
        else:
            self.reset()
        raise RuntimeError(message)

    def _scaled(self, loss: Tensor) -> Tensor:
        declared = self._window.declared
        if declared is None:
            root = loss * (1 / self.presumed_tokens)
        elif isinstance(declared, int):
            root = loss / max(declared, 1)
        else:
            root = loss / declared.clamp(min=1)
        scaler = self.loss_scaler
        scaled = root if scaler is None else scaler.multiply(root)
        if not self._window.counts:
            self._window.scaler = scaler
            self._window.scaler_moves = 0 if scaler is None else scaler.moves
        self._check_scale(scaler)
        return scaled

    def _check_scale(self, scaler: _LossScaler | None) -> None:
        """All micro-batches of a window, and the step, have one loss scale."""
        window = self._window
        if scaler is not window.scaler:
            raise RuntimeError(
                "the loss scaler was replaced in the middle of a window, whose gradients carry the "
                "scale of the old one. Replace it between windows; call reset() to drop this one."
            )
        if scaler is not None and window.scaler_moves != scaler.moves:
            raise RuntimeError(
                "another optimizer stepped with this loss scaler since the window's first "
                "micro-batch, or its state was loaded, so the loss scale may have moved, and "
                "gradients that carry different ones cannot be added up. Step it before or after "
                "the window, or give it a loss scaler of its own."
            )

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
        if ranks < 1:
            raise RuntimeError(
                "this rank is not in process_group, so its tokens would never be counted. Give it "
                "the group of ranks that it belongs to and that hold different tokens."
            )
        if ranks == 1:
            return
        if self._grad_reduction is None:
            raise RuntimeError(
                f"this is one of {ranks} ranks, and grad_reduction is None: each would divide by "
                f"its own count, and their weights would drift apart. Give grad_reduction='mean' "
                f"under DistributedDataParallel, or 'sum' if gradients are added up over the ranks."
            )
        if self._process_group is None and not self._window.counts:
            refuse_meshes(self.optimizer)

    def _over_ranks(self, tokens: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and loss of all ranks."""
        if self._ranks() == 1:
            return tokens, total
        twins = self._twins.look(tokens, total, self._process_group)
        both = sum_over_ranks(tokens, total, self._window.declared, self._process_group)
        if twins:
            self._said.warn("twins", twins)
        return both

    def _step_optimizer(self, factor: Tensor) -> None:
        if is_mixed_precision(self.optimizer):
            cast(_MixedPrecision, self.optimizer).step(grad_factor=factor)
        elif self._loss_scaler is not None:
            self._loss_scaler.step(self.optimizer, grad_factor=factor)
        else:
            outcome = step_plain(self.optimizer, factor)
            if self._said.knows("skip"):
                return
            skipped = outcome.counted & ~outcome.grads_finite
            if outcome.stepped is None:
                skips = self._skips_lately.add(skipped)  # only the device knows
            else:
                skips = not outcome.stepped and bool(skipped)
            if skips:
                self._said.warn(
                    "skip",
                    "non-finite gradients: this step was skipped; the next ones will be skipped "
                    "without a word. Give loss_scaler=mixprec.StaticLossScaler(1.0) to make 50 in "
                    "a row an error that names them.",
                )

    def _say_empty(self, tokens: Tensor) -> None:
        counts = [count for count in self._window.counts if isinstance(count, int)]
        known = len(counts) == len(self._window.counts) and self._ranks() == 1
        if self._tokens_lately.add(sum(counts) if known else tokens) == 0:
            self._said.warn(
                "empty",
                f"{_WINDOWS_IN_A_ROW} windows in a row had no token in them: each was dropped, and "
                f"nothing is learned from them. Look at the targets: are all of them padding "
                f"(ignore_index), after truncation or shifting?",
            )

    # ---------------------------------------- copies

    def __getstate__(self) -> dict[str, Any]:
        if self._process_group is not None:
            raise TypeError(
                "an accumulator with a process_group cannot be pickled, because a process group "
                "belongs to its process. Between windows it has nothing to save: save model and "
                "optimizer, and make a new accumulator."
            )
        return self._state()

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientAccumulator:
        if self._process_group is not None:
            memo[id(self._process_group)] = self._process_group
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(self._state(), memo))
        return twin

    def _state(self) -> dict[str, Any]:
        window = self._window
        if (window.counts or window.failed) and not window.spent:
            raise RuntimeError(
                f"the accumulator is copied or pickled in the middle of a window of "
                f"{len(window.counts)} micro-batches: parameters are copied without their "
                f"gradients, so the copy would count tokens of which it has nothing. Copy it after "
                f"step(), or call reset() first."
            )
        return {**vars(self), "_window": Window(declared=window.declared)}


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
    if presumed_tokens > _LARGEST_PRESUMED:
        raise ValueError(
            f"presumed_tokens is {presumed_tokens}; no step holds more than 2^40 tokens, and "
            f"gradients divided by so many would vanish. Give a power of two near the tokens of a "
            f"step."
        )


def _say_narrow_grads(optimizer: Optimizer, said: Said) -> None:
    """A parameter keeps its `grad_dtype` when its model is cast, once anybody has set it."""
    narrow = [
        name
        for param, name in names_of(optimizer.param_groups)
        if param.dtype in (torch.float32, torch.float64) and param.grad_dtype in _LOW
    ]
    if narrow:
        said.warn(
            "narrow",
            f"the gradients of {listed(narrow)} are rounded to 16 bits, because grad_dtype is, as "
            f"it was before the model was cast. Set param.grad_dtype = param.dtype.",
        )
