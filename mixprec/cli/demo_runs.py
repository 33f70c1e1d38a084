"""Seven ways to train one model: what is stored in which format, what helps, and one loop for all.

Each run differs from a sound one in a single thing. The same for all: initial weights, the order of
the text, AdamW with its schedule, and the sentences held out to measure the loss. So runs compare
to the fourth digit although each is short.

A step of a real run has some 2^18 tokens, and a loss averaged over them, in however many
micro-batches, gives each of them 2^-18 of the gradient. Steps are 750 tokens here. The accumulator
divides by the 2^18 of the run that they stand for on the way back, and makes up for it in FP32 at
the step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mixprec.accumulation import GradientAccumulator
from mixprec.cli.demo_model import LanguageModel
from mixprec.cli.demo_text import PADDING, Corpus, model_input
from mixprec.float8.products import ALIGNMENT, has_units
from mixprec.formats import BF16, E4M3, FP16, FP32, Format
from mixprec.loss_scaling import DynamicLossScaler
from mixprec.optimizer import MixedPrecision
from mixprec.precision import Precision

__all__ = ["RUNS", "Outcome", "Run", "Settings", "emulated", "train"]


@dataclass(frozen=True)
class Settings:
    """Size of the model, of a step and of the whole."""

    steps: int = 250
    seed: int = 0
    width: int = 64
    depth: int = 2
    num_heads: int = 2
    context: int = 192
    micro_batches: int = 4
    sentences: int = 2
    held_out: int = 24
    """Sentences that are never trained on."""
    measurements: int = 40
    """How often a run measures the held-out loss, about."""
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: int = 20
    presumed_tokens: int = 2**18
    """Of the real step that a step stands for. GPT-3's smallest model had 2^19 (Brown et al. 2020,
    arXiv:2005.14165, table 2.1)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Of one step: micro-batches, sentences in each."""
        return self.micro_batches, self.sentences


@dataclass(frozen=True)
class Run:
    """What is stored in which format, and what helps."""

    name: str
    format: Format
    masters: bool = False
    loss_scaling: bool = False
    recipe: str | None = None
    """Of the hidden layers' products in FP8."""

    @property
    def sound(self) -> bool:
        """Nothing that the format needs is missing."""
        scaled = self.loss_scaling or (self.format != FP16 and self.recipe != "static")
        return self.format == FP32 or (self.masters and scaled)

    @property
    def bare(self) -> bool:
        """16-bit weights, moments and gradient sums: a cast model in a loop of torch alone."""
        return self.format != FP32 and not self.masters


RUNS = (
    Run("fp32", FP32),
    Run("bf16 with masters", BF16, masters=True),
    Run("bf16 without masters", BF16),
    Run("fp16 with a loss scale", FP16, masters=True, loss_scaling=True),
    Run("fp16 without a loss scale", FP16, masters=True),
    Run("fp8 with exponents", BF16, masters=True, recipe="adaptive"),
    Run("fp8 without exponents", BF16, masters=True, recipe="static"),
)


@dataclass
class Outcome:
    """What a run came to. Losses are means over tokens, in nats per byte."""

    run: Run
    emulated: bool
    num_parameters: int = 0
    measured_at: list[int] = field(default_factory=list[int])
    """Steps after which the held-out loss was measured, from 0 to the last."""
    held_out_losses: list[float] = field(default_factory=list[float])
    train_losses: list[float] = field(default_factory=list[float])
    unmoved: float = 0.0
    """Share of hidden layers' values, masters if there are any, that the middle step left alone."""
    subnormal_grads: float = 0.0
    """Share below the format's smallest normal number, zeros included, of hidden layers' gradients
    from one more micro-batch after the last step."""
    loss_scale: float | None = None
    skipped_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps alone."""

    @property
    def held_out_loss(self) -> float:
        """The loss after the last step."""
        return self.held_out_losses[-1]

    @property
    def tokens_per_second(self) -> float:
        """Bytes trained on, without padding."""
        return self.num_tokens / self.seconds


def emulated(device: torch.device, format: Format) -> bool:
    """Whether products in `format` are widened to FP32 on `device`.

    Always on a CPU: most have no 16-bit units, where torch is some eight times slower than in FP32,
    and those that have them gain nothing with matrices this small. So all draw the same picture.
    """
    if format == E4M3:
        return not has_units(device)
    if device.type == "cpu":
        return format != FP32
    return format == BF16 and not torch.cuda.is_bf16_supported(including_emulation=False)


def train(
    run: Run, settings: Settings, corpus: Corpus, report: Callable[[Outcome, int], None]
) -> Outcome:
    """One run from its first step to its last; `report(outcome, num_tokens)` after each."""
    training = _Training(run, settings, corpus.training.device)
    outcome, shape = training.outcome, settings.shape
    every = max(1, settings.steps // settings.measurements)
    training.measure(corpus.held_out)
    for step in range(1, settings.steps + 1):
        micro_batches = corpus.micro_batches(step, shape)
        before = training.hidden_values() if step == (settings.steps + 1) // 2 else []
        training.step(micro_batches)
        if before:
            pairs = zip(before, training.hidden_values(), strict=True)
            outcome.unmoved = _share(old == new for old, new in pairs)
        report(outcome, _num_tokens(micro_batches))
        if step % every == 0 or step == settings.steps:
            training.measure(corpus.held_out)
    training.count_subnormal_grads(corpus.micro_batches(settings.steps + 1, shape)[0])
    return outcome


class _Training:
    """Model and optimizer of one run; what is done with them is noted in `outcome`."""

    def __init__(self, run: Run, settings: Settings, device: torch.device) -> None:
        self.outcome = Outcome(run, emulated(device, E4M3 if run.recipe else run.format))
        self.presumed_tokens = settings.presumed_tokens
        model = LanguageModel(
            width=settings.width,
            depth=settings.depth,
            num_heads=settings.num_heads,
            emulate=emulated(device, run.format),
            float8=run.recipe is not None,
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self.model = model.to(device, run.format.dtype)
        if run.recipe is not None:
            precision = Precision("fp8", recipe=run.recipe)
            precision.convert(self.model, keep_fp32=(), min_dim=ALIGNMENT)
        rule = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=settings.betas)
        self.outcome.num_parameters = sum(weight.numel() for weight in model.parameters())
        self.schedule = LambdaLR(rule, lambda done: _warmup_then_cosine(done, settings))
        self.optimizer: Optimizer = rule
        if run.masters:
            loss_scaler = DynamicLossScaler() if run.loss_scaling else None
            self.optimizer = MixedPrecision(rule, loss_scaler=loss_scaler)
        self.accumulator = None
        if not run.bare:
            self.accumulator = GradientAccumulator(
                self.optimizer, presumed_tokens=settings.presumed_tokens
            )

    def step(self, micro_batches: Tensor) -> None:
        """Train on the targets of one step."""
        began = time.perf_counter()
        one_step = self._bare_step if self.accumulator is None else self._accumulated_step
        self.outcome.train_losses.append(one_step(micro_batches))
        self.schedule.step()
        self.outcome.seconds += time.perf_counter() - began
        self.outcome.num_tokens += _num_tokens(micro_batches)
        if isinstance(self.optimizer, MixedPrecision):
            metrics = self.optimizer.metrics()
            self.outcome.skipped_steps = int(metrics["skipped_steps"])
            self.outcome.loss_scale = metrics.get("loss_scale")

    def _accumulated_step(self, micro_batches: Tensor) -> float:
        assert self.accumulator is not None
        for i, targets in enumerate(micro_batches, start=1):
            num_tokens = _num_tokens(targets)
            last = i == len(micro_batches)
            self.accumulator.backward(self._loss_sum(targets), num_tokens, last=last)
        return self.accumulator.step().item()

    def _bare_step(self, micro_batches: Tensor) -> float:
        num_tokens = _num_tokens(micro_batches)
        mean = 0.0
        for targets in micro_batches:
            loss = self._loss_sum(targets) / num_tokens
            loss.backward()
            mean += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return mean

    def _loss_sum(self, targets: Tensor) -> Tensor:
        logits = self.model(model_input(targets)).float()
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum"
        )

    @torch.no_grad()
    def measure(self, held_out: Tensor) -> None:
        """Note the held-out loss."""
        loss = self._loss_sum(held_out).item() / _num_tokens(held_out)
        self.outcome.measured_at.append(len(self.outcome.train_losses))
        self.outcome.held_out_losses.append(loss)

    @torch.no_grad()
    def hidden_values(self) -> list[Tensor]:
        """Copies of what the rule trains in the hidden layers: masters, or the weights."""
        optimizer = self.optimizer
        trained: dict[Tensor, Tensor] = {}
        if isinstance(optimizer, MixedPrecision):
            trained = dict(optimizer.masters())
        return [trained.get(weight, weight).clone() for weight in self._hidden_weights()]

    def count_subnormal_grads(self, targets: Tensor) -> None:
        """Note how many gradients are too small for the format, divided and scaled as in a step."""
        loss_sum = self._loss_sum(targets)
        if self.accumulator is None:
            loss = loss_sum / _num_tokens(targets)
        else:
            loss = loss_sum / self.presumed_tokens * (self.outcome.loss_scale or 1.0)
        grads = torch.autograd.grad(loss, self._hidden_weights())
        smallest_normal = self.outcome.run.format.smallest_normal
        self.outcome.subnormal_grads = _share(grad.abs() < smallest_normal for grad in grads)

    def _hidden_weights(self) -> list[Tensor]:
        return [weight for weight in self.model.blocks.parameters() if weight.ndim == 2]


def _warmup_then_cosine(done: int, settings: Settings) -> float:
    """Share of the learning rate after `done` steps: linear up, then a half cosine down to 0."""
    rise = min(1.0, (done + 1) / settings.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * done / settings.steps))


def _num_tokens(targets: Tensor) -> int:
    return int((targets != PADDING).sum())


def _share(masks: Iterable[Tensor]) -> float:
    """Share of true elements."""
    true = total = 0
    for mask in masks:
        true += int(mask.sum())
        total += mask.numel()
    return true / total
