"""Seeing every tensor operation of a step and writing down those on elements.

A dispatch mode stands below autograd and above the kernels: each operation of torch passes through
it with its tensors and numbers, whatever Python code called it. What touches the parameter, its
gradient or its states becomes an operation of `OPERATIONS`, with the numbers lifted into a
list; the rest (step counts, bias corrections, learning rates held in tensors) just runs. Operations
on lists of tensors (`torch._foreach_*`) are written down tensor by tensor, in-place ones as new
values, so a rule reads the same however it was coded.

A sum, mean, norm or largest value over all elements of one tensor is written down as an operation
too. Its result, and what is computed of such results alone, is one number of the tensor, `per
tensor` below. Nothing may read it: a rule whose Python code looks at a norm (`if norm > 1`) takes a
way that no number known in advance decides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec.machine_errors import is_of_the_machine
from mixprec.optimizer.fused.program.operations import BOOLEAN, REDUCTIONS
from mixprec.optimizer.fused.program.program import NUMEL, NotFusible
from mixprec.optimizer.fused.recording.calls import Call, Lifted
from mixprec.optimizer.fused.recording.translations import OVER_ALL, TRANSLATIONS, decomposition_of

RawOp = tuple[str, tuple[str, ...], str]
"""Name, inputs, output. `%3` is the value of the operation 3, `#3` the scalar 3."""


class Recorder(TorchDispatchMode):
    """Sees every operation; keeps those on tensors that come from the roots.

    A tensor is known by the memory it lies in, so views and in-place operations need no care: an
    in-place operation gives its memory a new value. The recorder keeps every such tensor alive, so
    no memory is used twice.

    Attributes:
        ops, scalars: what is written down.
        calls: torch's calls that it was written down for, for a `tape.Tape`.
        plain: functions that were called on numbers alone; whether each may make elements.
        named: every tensor that came to hold a value, and its memory at that time.
    """

    def __init__(self, roots: Mapping[str, Tensor], reduced: Mapping[str, Tensor]) -> None:
        """Begin with values of elements in `roots` and with one-element tensors in `reduced`."""
        super().__init__()
        self.ops: list[RawOp] = []
        self.scalars: list[float] = []
        master = next(iter(roots.values()))
        self.numel, self._shape = master.numel(), master.shape
        tensors = {**roots, **reduced}
        self._values = {memory_of(tensor): name for name, tensor in tensors.items()}
        self.booleans: set[str] = set()
        self.reduced = tuple(reduced)
        self.per_tensor: set[str] = {NUMEL, *reduced}
        self._storages = [tensor.detach() for tensor in tensors.values()]
        self.named = [(tensor, memory_of(tensor)) for tensor in tensors.values()]
        self.calls: list[Call] = []
        self.plain: dict[Any, bool] = {}
        self._call = Call()
        self._repeats = True

    @property
    def repeats(self) -> bool:
        """Whether `calls` say all there is to say of the recording, but for values of numbers."""
        unmoved = all(memory_of(tensor) == memory for tensor, memory in self.named)
        return self._repeats and unmoved and not self._call.sources

    def value_of(self, value: Any) -> str | None:
        """The value that lies in a tensor now, if it comes of elements."""
        return self._values.get(memory_of(value)) if isinstance(value, Tensor) else None

    def holds(self, value: Any) -> bool:
        """Whether tensors with such values are anywhere inside."""
        return any(self.value_of(tensor) is not None for tensor in tensors_in(value))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotFusible(f"it draws random numbers ({_called(func)})")
        name = _name(func)
        if name.startswith("_foreach_"):
            return self._foreach(func, name, args, kwargs)
        if not self.sees(args, kwargs):
            result = self.call(func, args, kwargs, seen=False)
            if name in _FACTORIES and self.makes_elements(args, result):
                self._record(func, name, args, kwargs, result)
                self._log(func, args, kwargs, result)
            else:
                self.plain[func] = name in _FACTORIES
            return result
        if name in _READS:
            raise NotFusible(_what_it_reads(func, name))
        before = self._before(name, args)
        if "out" in kwargs and self.value_of(kwargs["out"]) is None:
            self._repeats = False
        result = self.call(func, args, kwargs, seen=True)
        self._record(func, name, before, kwargs, args[0] if _is_in_place(name) else result)
        self._log(func, args, kwargs, result)
        return result

    def call(self, func: Any, args: Any, kwargs: dict[str, Any], *, seen: bool) -> Any:
        """Run an operation; `seen` if it touches elements."""
        return func(*args, **kwargs)

    def sees(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether an operation on these touches elements."""
        values = self._values
        for arg in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(arg, Tensor):
                if memory_of(arg) in values:
                    return True
            elif isinstance(arg, (list, tuple)) and self.holds(arg):
                return True
        return False

    def _foreach(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Record what happens to each tensor of the lists."""
        before = self._before(name, [_shallow(arg) for arg in args])
        targets = args[0]
        results = self.call(func, args, kwargs, seen=self.sees(args, kwargs))
        if not _is_in_place(name):
            targets = results
        seen: set[bool] = set()
        for place in range(next(len(arg) for arg in args if isinstance(arg, (list, tuple)))):
            single = [arg[place] if isinstance(arg, (list, tuple)) else arg for arg in before]
            named = {k: v[place] if isinstance(v, (list, tuple)) else v for k, v in kwargs.items()}
            seen.add(self.sees(single, named))
            if self.sees(single, named):
                short = name.removeprefix("_foreach_")
                self._record(func, short, single, named, targets[place], place)
        if seen == {False}:
            self.plain[func] = False
        else:
            self._repeats = self._repeats and seen == {True}
            self._log(func, args, kwargs, results)
        return results

    def _log(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        """Keep a call for a tape, with what `_record` noted of it."""
        call, self._call = self._call, Call()
        call.func, call.args, call.kwargs, call.result = func, args, kwargs, result
        call.is_view = _base(func) in _VIEWS
        self.calls.append(call)
        reshapes = call.is_view and _is_in_place(_name(func))
        traced = any(
            tensor.requires_grad and tensor is not args[0] for tensor in tensors_in(result)
        )
        self._repeats = self._repeats and not reshapes and not traced

    def _before(self, name: str, args: Any) -> Any:
        """The operands of an operation, which are encoded after it ran, as it finds them."""
        if not _is_in_place(name):
            return args
        own = [self._own_number(tensor) for tensor in _listed(args[0])]
        if self.sees(args, {}) and not all(map(self.value_of, _listed(args[0]))):
            self._repeats = False  # a number becomes one of the data
        return [own if isinstance(args[0], list) else own[0], *args[1:]]

    def _own_number(self, tensor: Tensor) -> Tensor:
        is_number = tensor.numel() == 1 and self.value_of(tensor) is None
        return tensor.clone() if is_number else tensor

    def _record(
        self,
        func: Any,
        name: str,
        args: Any,
        kwargs: dict[str, Any],
        result: Any,
        place: int | None = None,
    ) -> None:
        """Write down that an operation on `args` made `result`, which may be its first argument."""
        base = name[:-1] if _is_in_place(name) else name
        if base in _VIEWS:
            self._check_view(func, args[0], result)
            return
        if base in MAKERS and not self.makes_elements(args, result):
            return  # of another size: refused where it meets an element
        if base in OVER_ALL:
            self._check_reduction(func, args, result)
        translate = TRANSLATIONS.get(base)
        if translate is None:
            self._decompose(func, base, args, kwargs, result)
            return
        target: Tensor = kwargs.get("out", result)
        skip = int(base in _OVERWRITES)
        operands = [self._operand(func, a, i, place) for i, a in enumerate(args) if i >= skip]
        given = {k: v for k, v in kwargs.items() if k not in _IGNORED}
        named = {k: self._operand(func, v, k, place) for k, v in given.items()}
        if base in _OVERWRITES and self._is_reset(target, operands):
            value = self.emit("float", operands[0] if operands else 0.0)
        else:
            value = translate(self, *operands, **named)
        self._bind(func, target, value)

    def _decompose(
        self, func: Any, base: str, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Write down what torch itself takes an operation for, in terms of simpler ones."""
        decomposition = decomposition_of(func, base)
        if decomposition is None:
            raise NotFusible(_why_not(func))
        call, calls, plain, repeats = self._call, self.calls, self.plain, self._repeats
        self._call, self.calls, self.plain = Call(), [], {}
        begin = len(self.scalars)
        try:
            with self:
                made = decomposition(*args, **{k: v for k, v in kwargs.items() if k != "out"})
        except Exception as error:
            if is_of_the_machine(error):
                raise
            raise NotFusible(_why_not(func)) from error
        self._call, self.calls, self.plain = call, calls, plain
        # A replay compares the numbers that the operation is given, and has no tensors of them.
        self._repeats = repeats and all(map(self.value_of, tensors_in([args, kwargs])))
        call.sources += self.scalars[begin:]
        targets = kwargs.get("out", result)
        for target, value in zip(tensors_in(targets), tensors_in(made), strict=True):
            name = self.value_of(value)
            if name is None:
                raise NotFusible(_why_not(func))
            self._bind(func, target, name)

    def _operand(self, func: Any, arg: Any, key: int | str, place: int | None) -> Any:
        """A value's name, a number, or what else an operation takes, unchanged."""
        if isinstance(arg, (list, tuple)):
            return [self._value(func, item) for item in arg]
        value = self._value(func, arg, nested=False)
        if type(value) in (float, int):
            return self._call.lift(value, key, place)
        if isinstance(arg, Tensor) and not isinstance(value, str):
            self._repeats = False  # a tensor of one truth value
        return value

    def _value(self, func: Any, arg: Any, *, nested: bool = True) -> Any:
        if isinstance(arg, (list, tuple)):
            return [self._value(func, item) for item in arg]
        if not isinstance(arg, Tensor):
            return arg
        value = self._values.get(memory_of(arg))
        if value is not None:
            return value
        if arg.numel() == 1:
            self._repeats = self._repeats and not nested
            return arg.item()
        raise NotFusible(
            f"{_called(func)} takes a tensor of {arg.numel()} elements that comes from neither "
            f"the parameter, nor its gradient, nor its state"
        )

    def makes_elements(self, args: Any, result: Tensor) -> bool:
        """Whether a tensor made of a kind or a shape is one of elements."""
        if args and self.value_of(args[0]) in self.per_tensor:
            return False
        # Of one element are numbers too, though mostly of no dimensions.
        return result.shape == self._shape if self.numel == 1 else result.numel() == self.numel

    def _check_reduction(self, func: Any, args: Any, result: Any) -> None:
        if not isinstance(result, Tensor) or result.numel() != 1:
            raise NotFusible(f"{_called(func)} reduces over some dimensions only")
        for arg in args:
            if self.value_of(arg) in self.per_tensor and arg.numel() != 1:
                raise NotFusible(_why_not(func))  # over copies of a number

    def _check_view(self, func: Any, viewed: Tensor, result: Any) -> None:
        if self.value_of(viewed) in self.per_tensor:
            for tensor in tensors_in(result):
                if tensor.numel() not in (1, self.numel):
                    raise NotFusible(_why_not(func))
                self._keep(tensor, self._values[memory_of(viewed)])
            return
        whole = isinstance(result, Tensor) and result.numel() == self.numel
        if not whole or not result.is_contiguous() or result.dtype != viewed.dtype:
            raise NotFusible(_why_not(func))

    def _is_reset(self, target: Tensor, operands: list[Any]) -> bool:
        """Whether a number known in advance is written over one of the data."""
        over = self.value_of(target) in self.per_tensor
        return over and not any(isinstance(operand, str) for operand in operands)

    def _bind(self, func: Any, target: Tensor, value: str) -> None:
        memory = memory_of(target)
        one = target.numel() == 1 and self._values.get(memory, value) in self.per_tensor
        if value in self.per_tensor and not one:
            value = self.emit("full", value)
        if not one and target.numel() != self.numel:
            raise NotFusible(
                f"{_called(func)} makes {target.numel()} values of {self.numel}: it mixes elements"
            )
        if target.dtype not in (torch.float32, torch.bool):
            kind = str(target.dtype).removeprefix("torch.")
            raise NotFusible(f"{_called(func)} computes in {kind}, and kernels compute in FP32")
        value = self._as_number(value) if target.dtype == torch.float32 else self._as_truth(value)
        self._keep(target, value)

    def _keep(self, tensor: Tensor, value: str) -> None:
        memory = memory_of(tensor)
        self._values[memory] = value
        self.named.append((tensor, memory))

    def emit(self, name: str, *inputs: Any) -> str:
        """Record an operation on values and numbers; returns the name of its value."""
        if name in _LOGIC:
            inputs = tuple(map(self._as_truth, inputs))
        elif name == "where":
            inputs = (inputs[0], *map(self._as_number, inputs[1:]))
        elif name != "float":
            inputs = tuple(map(self._as_number, inputs))
        named = tuple(map(self._named, inputs))
        output = f"%{len(self.ops)}"
        of_numbers = all(i in self.per_tensor or i[0] == "#" for i in named)
        if name in REDUCTIONS or (of_numbers and name not in _OF_ELEMENTS):
            self.per_tensor.add(output)
        self.ops.append((name, named, output))
        if name in BOOLEAN:
            self.booleans.add(output)
        return output

    def _as_number(self, operand: Any) -> Any:
        """A value that is no truth value, for arithmetic."""
        return self.emit("float", operand) if self._is_truth(operand) else operand

    def _as_truth(self, operand: Any) -> Any:
        """A truth value: whether a number is not 0."""
        return operand if self._is_truth(operand) else self.emit("ne", operand, 0.0)

    def _is_truth(self, operand: Any) -> bool:
        return isinstance(operand, str) and operand in self.booleans

    def _named(self, operand: Any) -> str:
        if isinstance(operand, str):
            return operand
        if not isinstance(operand, (int, float)):
            raise NotFusible(f"it computes with {operand!r}, which is no real number")
        self.scalars.append(float(operand))
        self._call.sources.append(operand if isinstance(operand, Lifted) else float(operand))
        return f"#{len(self.scalars) - 1}"


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, deque, dict)):
        items = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from tensors_in(item)


def memory_of(tensor: Tensor) -> int:
    """What two tensors have in common when they share memory from its beginning."""
    return tensor.data_ptr() or tensor.untyped_storage()._cdata  # without data on a meta device


def _shallow(arg: Any) -> Any:
    return list(arg) if isinstance(arg, (list, tuple)) else arg


def _listed(arg: Any) -> list[Tensor]:
    return arg if isinstance(arg, list) else [arg]


def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def _base(func: Any) -> str:
    name = _name(func)
    return name[:-1] if _is_in_place(name) else name


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _called(func: Any) -> str:
    return str(func._schema.name).replace("aten::", "torch.")


def _what_it_reads(func: Any, name: str) -> str:
    if name == "_local_scalar_dense":
        return "its Python code looks at a number of the data, by item() or in an if"
    return f"it reads values of elements ({_called(func)})"


def _why_not(func: Any) -> str:
    if torch.Tag.pointwise in func.tags:
        return f"{_called(func)} has no fused form"
    return f"{_called(func)} is not element-wise"


_READS = {"_local_scalar_dense", "equal", "is_nonzero", "allclose", "item", "is_same_size"}

_VIEWS = {
    *("view", "_unsafe_view", "_reshape_alias", "detach", "alias", "unsqueeze", "squeeze"),
    *("expand", "as_strided", "t", "transpose", "permute", "slice", "select", "unbind"),
    *("split", "split_with_sizes"),
}
"""What names memory anew: fine if it names all of it, in order."""

_FACTORIES = {"zeros", "ones", "full", "empty", "empty_strided"}

MAKERS = {
    *_FACTORIES,
    *(f"new_{name}" for name in ("zeros", "ones", "full", "empty")),
    *(f"{name}_like" for name in ("zeros", "ones", "full", "empty")),
}
"""What gives nothing of a tensor but its kind."""

_OVERWRITES = {"copy", "fill", "zero"}
"""What gives its first argument a value that does not depend on the old one."""

_OF_ELEMENTS = {"zeros", "ones", "full"}
"""Operations that make a value of elements of numbers."""

_LOGIC = {"logical_and", "logical_or", "logical_xor", "logical_not"}

_IGNORED = {"out", "dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"}
