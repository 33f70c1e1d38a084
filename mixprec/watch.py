"""Where the values of a model lie, layer by layer, against the range of every format.

    with mixprec.watch(model) as report:
        loss(model(batch)).backward()
    report.save("report.html")

For each module that owns parameters: its inputs and outputs, the gradients of its outputs, its
parameters and their gradients, each as a histogram over binades (`mixprec.binades`). Hooks count on
the device and wait for nothing; the host waits once, when the report is read. The price is about
six passes over each tensor that is counted; `every=` thins it out.

Hooks are what torch.compile leaves out of compiled code, so there a watch neither counts nor slows
anything down, nor breaks a graph.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from mixprec.binades import BINS, Binades, count
from mixprec.conversion import matches
from mixprec.gradients import local
from mixprec.watch_page import page
from mixprec.watch_rows import Row, advice, judge, table

__all__ = ["Watch", "watch"]


def watch(
    model: nn.Module,
    *,
    every: int = 1,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
) -> Watch:
    """A running `Watch` of `model`: a report that fills while the model is used.

    A context manager; or call `stop()` when enough was seen. `print(report)` shows a table,
    `save("x.html")` draws it, `warnings()` says what to do, `rows()` has the numbers. The model's
    results do not change by a bit. Several inputs, outputs or calls of a module count together.
    Integer, complex and empty tensors are skipped; of a DTensor this rank's part counts.

    Args:
        model: watched in each module that owns floating-point parameters itself.
        every: count in every n-th call of each module, and every n-th gradient of a parameter.
        include: patterns of the layers to watch; all by default. One without a dot is compared with
            the last part of a layer's name and with its class, one with a dot with the whole name.
        exclude: patterns of layers to leave out.

    Raises:
        TypeError: if `model` is no module, or patterns are given as one string.
        ValueError: if no layer is left to watch, a pattern matches none, `every` is below 1, or a
            lazy module has no parameters yet.

    >>> import mixprec
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    >>> with mixprec.watch(model) as report:
    ...     model(1000 * torch.randn(256, 64)).sum().backward()
    >>> print(report.warnings()[0])
    0 input: 66 % of values are above E4M3's 448; use exponent -10 (-15 to -4 fit), or \
overrides={'0': 'adaptive'}
    """
    _check(model, every, include, exclude)
    return Watch(_layers(model, include, exclude), every)


class Watch:
    """Counts while it runs, and is the report. `watch` makes one."""

    def __init__(self, layers: Sequence[_Layer], every: int) -> None:
        self.every = every
        self.running = True
        self._layers = layers
        self._rows: tuple[Row, ...] | None = None
        self._handles = [handle for layer in layers for handle in self._hook(layer)]

    def stop(self) -> Self:
        """Remove the hooks and count the parameters as they are now; a second call does nothing.

        Gradients that arrive later, from a backward pass begun after, are not counted.
        """
        if self.running:
            self._count_parameters()
            self.running = False
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            for layer in self._layers:
                layer.module = None  # so that a report that is kept keeps no model
        return self

    def rows(self) -> tuple[Row, ...]:
        """A row for each tensor that had values: the worst first, the rest in the model's order.

        Waits for the device. While it runs, parameters count as they are at this moment.
        """
        if self._rows is not None:
            return self._rows
        if self.running:
            self._count_parameters()
        rows = tuple(sorted(_read(self._layers), key=lambda row: -row.badness))
        if not self.running:
            self._rows = rows
        return rows

    def uncalled(self) -> list[str]:
        """Names of the layers that no forward pass has been through."""
        return [layer.name for layer in self._layers if not layer.calls]

    def warnings(self) -> list[str]:
        """Sentences on the tensors that their formats would not hold, worst first.

        Layers that differ only in a number of their names share a sentence.
        """
        return [*advice(self.rows()), *self._remarks()]

    def html(self) -> str:
        """The report as one HTML document that refers to no other file."""
        return page(self.rows(), self.warnings())

    def save(self, path: str | PathLike[str]) -> None:
        """Write `html()` to the file `path`."""
        Path(path).write_text(self.html(), encoding="utf-8")

    def __str__(self) -> str:
        sentences = self.warnings()
        return "\n".join([table(self.rows()), *([""] if sentences else []), *sentences])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _remarks(self) -> list[str]:
        missing = self.uncalled()
        if not missing:
            return []
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return [
            f"{len(missing)} of {len(self._layers)} layers were not called ({shown}): no step ran, "
            f"or another module uses their parameters, or they ran under torch.compile, which "
            f"leaves hooks out. For the last, run the watched steps in `with "
            f'torch.compiler.set_stance("force_eager"):`'
        ]

    def _hook(self, layer: _Layer) -> Iterator[RemovableHandle]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            layer.sampled = layer.calls % self.every == 0
            layer.calls += 1
            if layer.sampled:
                layer.add("input", _tensors((args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or not layer.sampled:
                return
            for tensor in _tensors(output):
                layer.add("output", [tensor])
                # On a leaf the hook would stay, and be there again after the next call.
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(self._counter(layer, "grad_output"))

        module = layer.module
        assert module is not None
        yield module.register_forward_pre_hook(_Hook(before), with_kwargs=True)
        yield module.register_forward_hook(_Hook(after))
        for name, parameter in layer.parameters().items():
            if parameter.requires_grad:
                yield parameter.register_hook(self._counter(layer, f"grad_{name}", self.every))

    def _counter(self, layer: _Layer, role: str, every: int = 1) -> Callable[[Tensor], None]:
        calls = 0

        def note(grad: Tensor) -> None:
            nonlocal calls
            if self.running and calls % every == 0:
                layer.add(role, [grad])
            calls += 1

        return note

    def _count_parameters(self) -> None:
        for layer in self._layers:
            for name, parameter in layer.parameters().items():
                layer.tallies.pop(name, None)
                layer.add(name, [parameter])


@dataclass(eq=False)
class _Layer:
    """A watched module and what was counted of it."""

    name: str
    kind: str
    linear: bool
    module: nn.Module | None
    """None once the watch has stopped."""
    also: Mapping[str, tuple[str, ...]]
    """The parameters that count here, by name, each with the other layers that own it."""
    calls: int = 0
    sampled: bool = False
    tallies: dict[str, _Tally] = field(default_factory=dict[str, "_Tally"])

    def parameters(self) -> dict[str, nn.Parameter]:
        owned = _parameters(self.module) if self.module is not None else {}
        return {name: parameter for name, parameter in owned.items() if name in self.also}

    def add(self, role: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.tallies.setdefault(role, _Tally()).add(tensor)


class _Tally:
    """Counts of one tensor, on each device that it was seen on."""

    def __init__(self) -> None:
        self.counts: dict[torch.device, Tensor] = {}
        self.dtypes: dict[torch.dtype, None] = {}

    @torch.inference_mode(False)  # counts made in inference mode could not be changed outside it
    @torch.no_grad()
    def add(self, tensor: Tensor) -> None:
        values = _values(tensor.detach())
        if values is None or not values.numel():
            return
        self.dtypes[values.dtype] = None
        if values.device not in self.counts:
            self.counts[values.device] = torch.zeros(BINS, dtype=torch.int64, device=values.device)
        count(values, self.counts[values.device])


class _Hook:
    """A hook of one module: a deep copy or a pickle of the module gets one that does nothing."""

    def __init__(self, act: Callable[..., None]) -> None:
        self.act = act

    def __call__(self, *args: Any) -> None:
        self.act(*args)

    def __reduce__(self) -> tuple[Callable[[], _Hook], tuple[()]]:
        return _idle, ()


def _idle() -> _Hook:
    return _Hook(lambda *args: None)


def _check(
    model: object, every: object, include: Sequence[str] | None, exclude: Sequence[str]
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch got a {type(model).__name__}; give it the model, an nn.Module")
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}; 1 counts in each call, n in every n-th")
    for argument, patterns in (("include", include), ("exclude", exclude)):
        if isinstance(patterns, str):
            raise TypeError(
                f"{argument} is a sequence of patterns; write {argument}=({patterns!r},)"
            )


def _layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> list[_Layer]:
    owning = {_clean(name): m for name, m in model.named_modules() if _parameters(m)}
    owners: dict[int, list[str]] = {}
    for name, module in owning.items():
        _check_parameters(name, module)
        for parameter in _parameters(module).values():
            owners.setdefault(id(parameter), []).append(name)
    chosen = _chosen(owning, include, exclude)
    layers: list[_Layer] = []
    counted: set[int] = set()
    for name, module in chosen.items():
        own = {n: p for n, p in _parameters(module).items() if id(p) not in counted}
        counted.update(map(id, own.values()))
        also = {n: tuple(o for o in owners[id(p)] if o != name) for n, p in own.items()}
        kind, linear = type(module).__name__, isinstance(module, nn.Linear)
        layers.append(_Layer(name, kind, linear, module, also))
    return layers


def _chosen(
    owning: Mapping[str, nn.Module], include: Sequence[str] | None, exclude: Sequence[str]
) -> dict[str, nn.Module]:
    if not owning:
        raise ValueError("the model owns no floating-point parameters, so no layer can be watched")
    for pattern in (*(include or ()), *exclude):
        if not any(matches(pattern, name, module) for name, module in owning.items()):
            near = difflib.get_close_matches(pattern, owning, n=3, cutoff=0)
            raise ValueError(
                f"pattern {pattern!r} matches no layer that owns parameters. Layers with similar "
                f"names: {', '.join(near)}"
            )

    def is_chosen(name: str, module: nn.Module) -> bool:
        wanted = include is None or any(matches(p, name, module) for p in include)
        return wanted and not any(matches(p, name, module) for p in exclude)

    chosen = {name: module for name, module in owning.items() if is_chosen(name, module)}
    if not chosen:
        raise ValueError(
            f"include={include!r} and exclude={exclude!r} leave none of {len(owning)} layers"
        )
    return chosen


def _check_parameters(name: str, module: nn.Module) -> None:
    for local_name, parameter in _parameters(module).items():
        if is_lazy(parameter):
            raise ValueError(
                f"{name}.{local_name} has no shape yet; run a batch through the model first"
            )


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Floating-point parameters that the module owns itself, or that its weights are made of."""
    if isinstance(module, ParametrizationList):
        return {}  # counted at the module whose weights it makes
    owned = dict(module.named_parameters(recurse=False))
    if "parametrizations" in module._modules:
        owned.update(module.get_submodule("parametrizations").named_parameters())
    return {name: p for name, p in owned.items() if p.is_floating_point()}


def _clean(name: str) -> str:
    """The name without what torch's own wrappers put into it."""
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Each floating-point tensor in nested tuples, lists, mappings and dataclasses, once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            if item.is_floating_point() and id(item) not in seen:
                seen.add(id(item))
                yield item
        elif isinstance(item, Mapping):
            waiting.extend(item.values())
        elif isinstance(item, (tuple, list)):
            waiting.extend(item)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            waiting.extend(vars(item).values())


def _values(tensor: Tensor) -> Tensor | None:
    """What this process holds of `tensor`, strided; None for what cannot be counted."""
    shard = local(tensor)
    if shard.layout == torch.sparse_coo:
        return shard._values()
    if shard.layout == torch.jagged:
        return shard.values()
    return shard if shard.layout == torch.strided and not shard.is_meta else None


def _read(layers: Sequence[_Layer]) -> Iterator[Row]:
    """A row for each tensor, in the model's order. The host waits once for each device."""
    asked: dict[torch.device, list[Tensor]] = {}
    for layer in layers:
        for tally in layer.tallies.values():
            for device, counts in tally.counts.items():
                asked.setdefault(device, []).append(counts)
    copied = {device: torch.stack(counts).cpu() for device, counts in asked.items()}
    answers = {device: iter(counts.unbind()) for device, counts in copied.items()}
    for layer in layers:
        read = {
            role: [next(answers[device]) for device in tally.counts]
            for role, tally in layer.tallies.items()
        }
        grads = [f"grad_{name}" for name in layer.also]
        for role in ("input", "output", *layer.also, "grad_output", *grads):
            if not read.get(role):
                continue
            dtypes = list(layer.tallies[role].dtypes)
            yield Row(
                layer=layer.name,
                kind=layer.kind,
                role=role,
                dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
                format=judge(role, dtypes, linear=layer.linear),
                binades=Binades(torch.stack(read[role]).sum(0).tolist()),
                also=layer.also.get(role, ()),
            )
