"""The modules that a watch counts in: which they are, how they are hooked, how they are read.

Counting happens in hooks, on the device of what is counted, and waits for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.hooks import RemovableHandle

from mixprec.binades import BINS, Binades, count
from mixprec.casting.model import matches, nearest
from mixprec.devices import to_host
from mixprec.float8.exponents import exponents_of
from mixprec.gradients import local
from mixprec.ranges.rows import Row, judge

__all__ = ["Layer", "choose_layers", "read"]


@dataclass(eq=False)
class Layer:
    """A watched module and what was counted of it."""

    name: str
    module: nn.Module | None
    """None once the watch has stopped."""
    also: Mapping[str, tuple[str, ...]]
    """The parameters that count here, by name, each with the other layers that own it."""
    kind: str = ""
    linear: bool = False
    calls: int = 0
    sampled: bool = False
    tallies: dict[str, _Tally] = field(default_factory=dict[str, "_Tally"])
    casts: dict[str, tuple[Any, Tensor]] = field(default_factory=dict[str, tuple[Any, Tensor]])
    """How a layer that is in FP8 already casts each operand, and its multiplier now."""

    def hook(self, every: int) -> list[RemovableHandle]:
        """Count from now on, in every n-th call and every n-th gradient."""
        assert self.module is not None

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if torch.compiler.is_compiling():
                return
            self.sampled = self.calls % every == 0
            self.calls += 1
            if self.sampled:
                self.add("input", _tensors((args, kwargs)))

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if torch.compiler.is_compiling() or not self.sampled:
                return
            for tensor in _tensors(output):
                self.add("output", [tensor])
                # On a leaf the hook would stay, and be there again after the next call.
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(self._counter("grad_output"))

        handles = [
            self.module.register_forward_pre_hook(_Hook(before), with_kwargs=True),
            self.module.register_forward_hook(_Hook(after)),
        ]
        for name, parameter in self.parameters().items():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(self._counter(f"grad_{name}", every)))
        return handles

    def parameters(self) -> dict[str, nn.Parameter]:
        owned = _parameters(self.module) if self.module is not None else {}
        return {name: parameter for name, parameter in owned.items() if name in self.also}

    def add(self, role: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.tallies.setdefault(role, _Tally()).add(tensor)

    def look(self) -> None:
        """Count the parameters as they are, and note how the layer casts its operands."""
        self.kind, self.linear = type(self.module).__name__, isinstance(self.module, nn.Linear)
        for name, parameter in self.parameters().items():
            self.tallies.pop(name, None)
            self.add(name, [parameter])
        state = getattr(self.module, "_float8", None)
        if state is not None:
            operands = state.operands().items()
            self.casts = {role: (each.cast, each.scale.clone()) for role, each in operands}

    def _counter(self, role: str, every: int = 1) -> Callable[[Tensor], None]:
        calls = 0

        def note(grad: Tensor) -> None:
            nonlocal calls
            # Hooks on a graph outlive the watch.
            if self.module is not None and calls % every == 0:
                self.add(role, [grad])
            calls += 1

        return note


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


def choose_layers(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> list[Layer]:
    """The modules of `model` that own floating-point parameters and that the patterns leave.

    Raises:
        ValueError: if none is left, a pattern matches none, or a parameter has no shape yet.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # whose names people know
    owning = {_clean(name): m for name, m in model.named_modules() if _parameters(m)}
    owners: dict[int, list[str]] = {}
    for name, module in owning.items():
        _check_parameters(name, module)
        for parameter in _parameters(module).values():
            owners.setdefault(id(parameter), []).append(name)
    chosen = _chosen(owning, include, exclude)
    layers: list[Layer] = []
    counted: set[int] = set()
    for name, module in chosen.items():
        own = {n: p for n, p in _parameters(module).items() if id(p) not in counted}
        counted.update(map(id, own.values()))
        also = {n: tuple(o for o in owners[id(p)] if o != name) for n, p in own.items()}
        layers.append(Layer(name, module, also))
    return layers


def _chosen(
    owning: Mapping[str, nn.Module], include: Sequence[str] | None, exclude: Sequence[str]
) -> dict[str, nn.Module]:
    if not owning:
        raise ValueError("the model owns no floating-point parameters, so no layer can be watched")
    for pattern in (*(include or ()), *exclude):
        if not any(matches(pattern, name, module) for name, module in owning.items()):
            raise ValueError(
                f"pattern {pattern!r} matches no layer that owns parameters. Layers with similar "
                f"names: {nearest(pattern, owning)}"
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


def read(layers: Sequence[Layer]) -> Iterator[Row]:
    """A row for each tensor, in the model's order. The host waits once for each device."""
    numbers = iter(to_host(chain.from_iterable(map(_kept, layers))))
    for layer in layers:
        yield from _rows(layer, numbers)


def _kept(layer: Layer) -> Iterator[Tensor]:
    """All that is read of a layer, int64: counts, then multipliers as bits."""
    for tally in layer.tallies.values():
        yield from tally.counts.values()
    for _, scale in layer.casts.values():
        yield scale.view(torch.int64)


def _rows(layer: Layer, numbers: Iterator[Tensor]) -> Iterator[Row]:
    """The next rows: `numbers` go on with what `_kept` gave of this layer."""
    read = {r: [next(numbers) for _ in tally.counts] for r, tally in layer.tallies.items()}
    scales = {r: next(numbers).view(torch.float32) for r in layer.casts}
    grads = [f"grad_{name}" for name in layer.also]
    for role in ("input", "output", *layer.also, "grad_output", *grads):
        if not read.get(role):
            continue
        dtypes = list(layer.tallies[role].dtypes)
        binades = Binades(torch.stack(read[role]).sum(0).tolist())
        cast = layer.casts[role][0] if role in layer.casts else None
        exponent = int(exponents_of(scales[role])) if cast is not None else 0
        yield Row(
            layer=layer.name,
            kind=layer.kind,
            role=role,
            dtypes=tuple(str(dtype).removeprefix("torch.") for dtype in dtypes),
            judge=judge(role, dtypes, binades, linear=layer.linear, cast=cast, exponent=exponent),
            binades=binades,
            also=layer.also.get(role, ()),
        )
