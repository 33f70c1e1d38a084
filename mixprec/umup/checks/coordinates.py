"""Whether one step moves every layer's output by as much at any width.

The promise behind learning rate transfer is about single parameters: after a step, the output of a
parameter's own layer, on the input that it had, has changed by an amount that does not depend on
the width. Looking at activations alone hides a parameter whose changes vanish, such as a bias
inside the multiplier, behind the others. So each parameter is put in alone:

    change(p) = RMS of  layer(x; p after the step) - layer(x; p before)

and the slope of its binary logarithm over that of the width is to be 0. Initial values are random,
so it is measured for several seeds, and a slope is said with its standard error (`certainty`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec.umup.checks.certainty import fit, quantile
from mixprec.umup.checks.picture import Line, draw

__all__ = ["CoordinateReport", "Slope", "check_coordinates"]

Loss = Callable[[nn.Module], Tensor | tuple[Tensor, Tensor | int]]


@dataclass(frozen=True)
class Slope:
    """A size at each width, and how it grows: size ~ width^slope."""

    sizes: tuple[float, ...]
    """Geometric means over the seeds."""
    slope: float
    wanted: float
    tolerance: float
    error: float = 0.0
    """Standard error of the slope."""
    seeds: int = 1
    compared: int = 1
    """Slopes that are judged at once, of which none may be called wrong by chance."""

    @property
    def verdict(self) -> Literal["ok", "NOT ok", "uncertain"]:
        """See `certainty`; "NOT ok" for a NaN, where something did not change at all."""
        off = abs(self.slope - self.wanted)
        if math.isnan(off) or off - self._interval(0.01 / self.compared) > self.tolerance:
            return "NOT ok"
        known = self._interval(0.05) <= self.tolerance
        return "ok" if off <= self.tolerance and known else "uncertain"

    @property
    def ok(self) -> bool:
        """Whether the slope is as wanted, and certainly so."""
        return self.verdict == "ok"

    @property
    def seeds_wanted(self) -> int:
        """About how many seeds would settle what is uncertain, at most 1000."""
        beyond = abs(self.slope - self.wanted) - self.tolerance
        outside = 0.05 if beyond <= 0 else 0.01 / self.compared
        target = self.tolerance if beyond <= 0 else beyond
        seeds = self.seeds
        while seeds < 1000 and self._interval(outside, seeds) > target:
            seeds += 1 + seeds // 8
        return min(max(seeds, self.seeds + 1), 1000)

    def _interval(self, outside: float, seeds: int | None = None) -> float:
        """Half of the interval that leaves so much outside; errors fall as the root of `seeds`."""
        if self.error == 0:
            return 0.0
        seeds = self.seeds if seeds is None else seeds
        error = self.error * math.sqrt(self.seeds / seeds) if math.isfinite(self.error) else 0.1
        if math.isinf(self.error) and seeds == self.seeds:
            return math.inf
        return error * quantile(outside, seeds * len(self.sizes) - 2)


@dataclass(frozen=True)
class CoordinateReport:
    """What `check_coordinates` found."""

    widths: tuple[int, ...]
    parameters: Mapping[str, Slope]
    """By parameter: change of its own layer's output in the first step."""
    activations: Mapping[str, Slope]
    """By module: change of its output since before training, after the last step."""
    not_called: tuple[str, ...] = ()
    """Parameters whose module was not called, so that nothing is known about them."""

    @property
    def ok(self) -> bool:
        """Whether every parameter's slope is as wanted, and certainly so.

        Activations are for looking at.
        """
        return self.verdict == "ok"

    @property
    def verdict(self) -> Literal["ok", "NOT ok", "uncertain"]:
        """The worst of all parameters'; for "uncertain", give `seeds_wanted` seeds."""
        found = {slope.verdict for slope in self.parameters.values()}
        if "NOT ok" in found:
            return "NOT ok"
        return "uncertain" if "uncertain" in found else "ok"

    @property
    def seeds_wanted(self) -> int:
        """About how many seeds would settle every slope."""
        open = (s for s in self.parameters.values() if s.verdict == "uncertain")
        return max((s.seeds_wanted for s in open), default=0)

    def failures(self) -> dict[str, Slope]:
        """The parameters whose slope is certainly not as wanted."""
        return {name: s for name, s in self.parameters.items() if s.verdict == "NOT ok"}

    def __str__(self) -> str:
        lines = [f"{'':10}{'slope':>14}{'wanted':>8}   change at widths {self.widths}"]
        for title, slopes in (("own layer", self.parameters), ("activation", self.activations)):
            lines.append(title)
            for name, s in slopes.items():
                sizes = " ".join(f"{size:.3g}" for size in s.sizes)
                verdict = "" if title == "activation" else s.verdict
                found = f"{s.slope:+.2f} ± {s.error:.2f}"
                lines.append(f"{verdict:10}{found:>14}{s.wanted:+8.2f}   {name}: {sizes}")
        if self.verdict == "uncertain":
            lines.append(
                f"uncertain: initial values move these slopes by as much as the tolerance; give "
                f"about {self.seeds_wanted} seeds"
            )
        if self.not_called:
            lines.append(f"not called: {', '.join(self.not_called)}")
        return "\n".join(lines)

    def svg(self) -> str:
        """The changes of all parameters over the width."""
        lines = [
            Line(f"{name} {s.slope:+.2f}", self.widths, s.sizes)
            for name, s in self.parameters.items()
        ]
        return draw(
            lines,
            title="Change of each parameter's own layer in one step",
            x_label="width",
            y_label="RMS of the change",
            log_y=True,
            caption="Flat lines transfer learning rates. Names end in their slopes.",
        )


def check_coordinates(
    make_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    loss: Loss,
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    steps: int = 1,
    seeds: Sequence[int] = range(4),
    wanted: Mapping[str, float] | None = None,
    tolerance: float = 0.1,
) -> CoordinateReport:
    """Measure how the change of every layer in a step depends on the width.

    Works on any model whose parameters are used by the modules that hold them.

    Args:
        make_model: a fresh model of a width, whose initial values torch's global generator draws.
        widths: two or more, best three at a factor of 8 or more.
        loss: runs a model on a fixed batch, and is to call the modules. It returns the loss, or
            its sum and the number of tokens, which gradients are then divided by as the groups say.
            Take no more rows than the least width: what N other rows change falls with the width,
            as (N / width)^1/2 beside what a row changes for itself. At widths 64 to 1024 that made
            slopes of -0.04 with 32 rows, and of -0.06 with 256.
        make_optimizer: an optimizer of a model, such as one over `param_groups`.
        steps: of training, before activations are compared. Slopes of parameters are those of the
            first.
        seeds: of initial values, each for a model of every width. One seed moves a slope by about
            0.1 (SGD, 32 rows), so several are needed for a verdict.
        wanted: slope by pattern of parameter names, where it is not 0: an embedding under the
            "umup" rule has -0.5 by design.
        tolerance: how far off a slope may be, and how well it has to be known.

    Raises:
        ValueError: for fewer than two widths, no seed, and models of different parameters.

    >>> import torch
    >>> from mixprec import umup
    >>> def model(width):
    ...     return torch.nn.Sequential(
    ...         umup.layers.Linear(8, width, role="input"), umup.layers.LinearReadout(width, 4)
    ...     )
    >>> x, y = torch.randn(256, 8), torch.randint(4, (256,))
    >>> report = umup.check_coordinates(
    ...     model,
    ...     [64, 256, 1024],
    ...     lambda model: (umup.losses.cross_entropy(model(x), y, reduction="sum"), 256),
    ...     lambda model: torch.optim.SGD(umup.param_groups(model, 1.0, torch.optim.SGD)),
    ... )
    >>> report.verdict
    'ok'
    """
    if len(set(widths)) < 2:
        raise ValueError(f"widths={list(widths)}; a slope needs two different widths or more")
    if not len(seeds):
        raise ValueError("seeds is empty; give one or more, such as range(4)")
    found = {
        width: [_run(make_model, width, loss, make_optimizer, steps, seed) for seed in seeds]
        for width in widths
    }
    first = found[widths[0]][0]
    for width, runs in found.items():
        odd = runs[0].parameters.keys() ^ first.parameters.keys()
        if odd:
            raise ValueError(
                f"the models of widths {widths[0]} and {width} differ in {sorted(odd)[:3]}; sizes "
                f"are compared by name, so all widths need the same layers"
            )

    def slopes(kind: str, wants: Mapping[str, float]) -> dict[str, Slope]:
        return {
            name: _slope(
                widths,
                [[getattr(run, kind)[name] for run in found[width]] for width in widths],
                next((w for pattern, w in wants.items() if fnmatchcase(name, pattern)), 0.0),
                tolerance,
                len(getattr(first, kind)),
            )
            for name in getattr(first, kind)
        }

    return CoordinateReport(
        tuple(widths),
        slopes("parameters", wanted or {}),
        slopes("activations", {}),
        tuple(first.not_called),
    )


@dataclass
class _Changes:
    parameters: dict[str, float] = field(default_factory=dict[str, float])
    activations: dict[str, float] = field(default_factory=dict[str, float])
    not_called: list[str] = field(default_factory=list[str])


def _run(
    make_model: Callable[[int], nn.Module],
    width: int,
    loss: Loss,
    make_optimizer: Callable[[nn.Module], Optimizer],
    steps: int,
    seed: int,
) -> _Changes:
    """One model's changes; the caller's random state is left alone."""
    # Named, because torch warns on hosts with several devices otherwise.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        model = make_model(width)
        optimizer = make_optimizer(model)
        calls, outputs = _watched(model, lambda: step(model, optimizer, loss, backward_only=True))
        before = {name: param.detach().clone() for name, param in model.named_parameters()}
        optimizer.step()
        changes = _own_changes(model, calls, before)
        for _ in range(steps - 1):
            step(model, optimizer, loss)
        with torch.no_grad():
            _, later = _watched(model, lambda: loss(model))
        for name, output in outputs.items():
            changes.activations[name] = _rms(later[name] - output)
    return changes


def step(
    model: nn.Module, optimizer: Optimizer, loss: Loss, *, backward_only: bool = False
) -> float:
    """One step, its gradients divided by the power of the token count that the groups ask for."""
    optimizer.zero_grad()
    value = loss(model)
    total, tokens = value if isinstance(value, tuple) else (value, None)
    total.backward()
    if tokens is not None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad *= float(tokens) ** float(group.get("token_power", -1.0))
    if not backward_only:
        optimizer.step()
    return float(total.detach()) / (1 if tokens is None else max(float(tokens), 1.0))


def _watched(
    model: nn.Module, run: Callable[[], Any]
) -> tuple[dict[str, tuple[Any, Any]], dict[str, Tensor]]:
    """`run`, and what every module was first called with and returned, by name."""
    calls: dict[str, tuple[Any, Any]] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if name not in calls:
                calls[name] = _detached(args), _detached(kwargs)
                if isinstance(output, Tensor) and output.is_floating_point():
                    outputs[name] = output.detach().clone()

        return keep

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name
    ]
    if not any(True for _ in model.children()):
        handles.append(model.register_forward_hook(hook(""), with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls, outputs


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(v) for key, v in value.items()}
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value


@torch.no_grad()
def _own_changes(
    model: nn.Module, calls: Mapping[str, tuple[Any, Any]], before: Mapping[str, Tensor]
) -> _Changes:
    changes = _Changes()
    modules = dict(model.named_modules())
    for name, param in model.named_parameters():
        if param.grad is None:
            continue
        owner, _, local = name.rpartition(".")
        if owner not in calls:
            changes.not_called.append(name)
            continue
        module, (args, kwargs) = modules[owner], calls[owner]
        prefix = f"{owner}." if owner else ""
        old = {key: before[prefix + key] for key, _ in module.named_parameters()}
        base: Any = torch.func.functional_call(module, old, args, kwargs)
        moved: Any = torch.func.functional_call(module, {**old, local: param}, args, kwargs)
        if isinstance(base, Tensor):
            changes.parameters[name] = _rms(moved - base)
        else:
            changes.not_called.append(name)
    return changes


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _slope(
    widths: Sequence[int],
    sizes: Sequence[Sequence[float]],
    wanted: float,
    tolerance: float,
    compared: int,
) -> Slope:
    """Through the logarithms of all sizes; NaN where something did not change at all."""
    seeds = len(sizes[0])
    means = tuple(_geometric_mean(of_width) for of_width in sizes)
    if not all(0 < size < math.inf for of_width in sizes for size in of_width):
        return Slope(means, math.nan, wanted, tolerance, math.nan, seeds, compared)
    points = [(w, size) for w, of_width in zip(widths, sizes, strict=True) for size in of_width]
    slope, error = fit([math.log2(w) for w, _ in points], [math.log2(size) for _, size in points])
    return Slope(means, slope, wanted, tolerance, error, seeds, compared)


def _geometric_mean(sizes: Sequence[float]) -> float:
    if not all(0 < size < math.inf for size in sizes):
        return sum(sizes) / len(sizes)
    return 2.0 ** (sum(map(math.log2, sizes)) / len(sizes))
