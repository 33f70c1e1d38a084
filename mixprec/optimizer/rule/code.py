"""What a rule's code can name, read off its functions and without running them.

A rule sees more than it is given: attributes of the optimizer, marks on parameters, globals of its
modules. Which of them it could look at says its code, in which every attribute and every global
stands by its name. So from `step` on, whatever a name may be found to mean (a method, a helper of
its module, a function that somebody put on the optimizer) is read as well, until nothing new is
found. Torch, NumPy and the standard library are not followed, but for `torch.optim`.

Names say what a rule could do, never what it does. Where code makes up names as it runs (`vars`,
`getattr` with a variable), they say nothing, and `RuleCode.everything` says so.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from mixprec.optimizer.rule.copies import Copier, Opaque
from mixprec.optimizer.rule.stand_ins import rule_of

__all__ = ["RuleCode", "code_of"]

_NOT_FOLLOWED = {"torch", "numpy", "triton", "builtins", "mixprec", *sys.stdlib_module_names}

_APART = ("state", "param_groups", "step")

_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}

_ANY_NAME = {
    *("vars", "dir", "eval", "exec", "locals", "attrgetter", "methodcaller", "inspect"),
    *("__dict__", "__getattribute__", "__getattr__", "__getstate__"),
}


Scope = Mapping[str, Any]
"""Where a name may be found: globals of a module, or a class."""


@dataclass(frozen=True, eq=False)
class RuleCode:
    """What the functions of a rule name.

    Attributes:
        functions: all that were found.
        names: of attributes and globals, and all strings, which are keys or may be such names.
        marks: names that a parameter may be asked for, if somebody has put them there.
        words: names that are asked of objects and of modules; `len` where a length is more than
            compared with 0. Torch itself asks lists for their length, and no parameter for marks.
        sees_groups: whether code does more with `param_groups` than go through them one by one.
        everything: whether code may look at what it does not name.
    """

    functions: tuple[FunctionType, ...]
    names: frozenset[str]
    marks: frozenset[str]
    words: frozenset[str]
    sees_groups: bool
    everything: bool
    _met: frozenset[int]
    _meanings: tuple[tuple[Scope, str, Any], ...]
    _plain: tuple[tuple[Scope, str], ...]
    _scopes: tuple[tuple[Scope, int], ...]
    _own: Scope
    _owned: Scope
    _classes: Mapping[int, type]

    def names_any(self, names: Iterable[str]) -> bool:
        """Whether it may look at an attribute or a key that is called so."""
        return self.everything or not self.names.isdisjoint(names)

    def looks_at(self, name: str) -> bool:
        """Whether a step may look at the optimizer's attribute of this name.

        Schedulers put a `step` of their own on the instance, and hooks are run by others.
        """
        own = name in _APART or name.endswith("_hooks")
        return not own and (self.everything or name in self.names)

    def knows(self, code: Iterable[Any]) -> bool:
        """Whether these functions and classes are among those that were read."""
        return all(id(value) in self._met or not _is_followed(value) for value in code)

    def holds(self) -> bool:
        """Whether every name still means the code that it meant, and no other means any."""
        return (
            all(scope.get(name) is value for scope, name, value in self._meanings)
            and not any(_holds_code(scope.get(name)) for scope, name in self._plain)
            and all(len(scope) == size for scope, size in self._scopes)
            and all(
                _is_plain(value) or not self.looks_at(name) or self._owned.get(name) is value
                for name, value in self._own.items()
            )
        )

    def variables(self) -> Iterator[tuple[str, Any, str]]:
        """Where its code could keep numbers outside of an optimizer: names that mean no code.

        Yields what to call each, the dict or the object that has it, and its key or attribute.
        """
        for scope, name in self._plain:
            holder = self._classes.get(id(scope))
            if holder is None:
                yield f"the global {name!r}", scope, name
            else:
                yield f"the attribute {name!r} of the class {holder.__name__}", holder, name
        for function in self.functions:
            called = function.__qualname__
            cells = function.__closure__ or ()
            for name, cell in zip(function.__code__.co_freevars, cells, strict=True):
                yield f"the variable {name!r} around {called}", cell, "cell_contents"
            for name in ("__defaults__", "__kwdefaults__", "__dict__"):
                if getattr(function, name):
                    yield f"{called}.{name}", function, name


def code_of(inner: Optimizer) -> RuleCode:
    """The code that `inner`'s step may run.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> code = code_of(torch.optim.SGD([weight], lr=0.1))
    >>> code.names_any(["momentum"]), code.names_any(["lr_scale"]), code.everything
    (True, False, False)
    """
    reader = _Reader(inner)
    for function in (rule_of(inner), *(getattr(type(inner), name, None) for name in _MODES)):
        reader.read(function)
    reader.follow()
    return reader.result()


_MODES = ("train", "eval")
"""Of schedule-free rules, whose steps are tried in one of them."""


class _Reader:
    """Reads functions and follows the names in them."""

    def __init__(self, inner: Optimizer) -> None:
        self._functions: dict[int, FunctionType] = {}
        self._met: dict[int, Any] = {}
        self._names: set[str] = set()
        self._marks: set[str] = set()
        self._words: set[str] = set()
        self._sees_groups = self._everything = False
        self._inner, self._own = inner, vars(inner)
        self._scopes: list[Scope] = [self._own]
        self._owned: dict[str, Any] = {}
        self._classes: dict[int, type] = {}
        self._given: set[tuple[int, str]] = set()
        self._meanings: list[tuple[Scope, str, Any]] = []
        self._plain: list[tuple[Scope, str]] = []
        self._names.add("step")
        self.read(type(inner))
        for group in inner.param_groups:
            for name, value in group.items():
                if name != "params":
                    self._read_inside(value)

    def _read_inside(self, value: Any) -> None:
        """Read what is in a value of the optimizer's own."""
        copier = Copier({id(self._inner): self._inner})
        with suppress(Opaque):
            copier.copy(value)
        for code in copier.code:
            self.read(code)

    def result(self) -> RuleCode:
        return RuleCode(
            tuple(self._functions.values()),
            frozenset(self._names),
            frozenset(self._marks - _KNOWN),
            frozenset(self._words),
            self._sees_groups or self._everything,
            self._everything,
            frozenset(self._met),
            tuple(self._meanings),
            tuple(self._plain),
            tuple((scope, len(scope)) for scope in self._scopes if scope is not self._own),
            self._own,
            {name: value for name, value in self._owned.items() if not _is_plain(value)},
            self._classes,
        )

    def follow(self) -> None:
        """Give every name every meaning that it may have, until none is new."""
        known = (-1, -1)
        while known != (known := (len(self._names), len(self._scopes))):
            for place, scope in enumerate(list(self._scopes)):
                for name in self._names & scope.keys():
                    self._mean(place, scope, name)

    def _mean(self, key: int, scope: Scope, name: str) -> None:
        """Read what a name stands for; `key` is one of the scope's own."""
        if (key, name) in self._given:
            return
        self._given.add((key, name))
        value = scope[name]
        if scope is self._own:
            if name not in _APART and not name.endswith("_hooks"):
                self._read_inside(value)
                self._owned[name] = value
        elif self.read(value):
            self._meanings.append((scope, name, value))
        elif _holds_code(value):
            self._everything = True  # in a collection, whose items nobody asks for
        else:
            self._plain.append((scope, name))

    def read(self, value: Any) -> bool:
        """Read the functions that a value is or has; whether it is more than a plain value."""
        value, parts = _unwrapped(value)
        for part in parts:
            self.read(part)
        if isinstance(value, FunctionType):
            self._read_function(value)
            return True
        is_scope = isinstance(value, (ModuleType, type))
        kind: Any = value if is_scope else type(value)
        if not _is_followed(kind):
            return is_scope or bool(parts) or callable(value)
        if id(kind) not in self._met:
            self._met[id(kind)] = kind
            for part in kind.__mro__ if isinstance(kind, type) else (kind,):
                if _is_followed(part):
                    self._met[id(part)] = part
                    self._scopes.append(vars(part))
                    if isinstance(part, type):
                        self._classes[id(self._scopes[-1])] = part
        return True

    def _read_function(self, function: FunctionType) -> None:
        if id(function) in self._met:
            return
        self._met[id(function)] = function
        for cell in function.__closure__ or ():
            try:
                self.read(cell.cell_contents)
            except ValueError:  # it is still empty
                continue
        if not _is_followed(function):
            return
        self._functions[id(function)] = function
        for code in _codes(function.__code__):
            self._read_code(code, function.__globals__, of_options=_is_of_options(function))
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.read(value)

    def _read_code(self, code: CodeType, scope: Scope, *, of_options: bool) -> None:
        home = str(scope.get("__name__"))
        of_torch = home.startswith("torch.")
        if of_torch and not home.startswith("torch.optim"):
            return  # a decorator that bears the name of what it decorates
        self._names.update(code.co_names)
        self._names.update(_strings(code.co_consts))
        asked, of_modules = _attributes(code, scope)
        if not of_options:
            self._words.update(asked, of_modules)
        if not of_torch:
            named = _names_asked_for(code)
            self._marks.update(asked, named)
            self._words.update(named, ["len"] if _counts(code) else [])
            self._sees_groups = self._sees_groups or _sees_groups(code)
            unnamed = None in named or not _ANY_NAME.isdisjoint(code.co_names)
            self._everything = self._everything or unnamed
        for name in code.co_names:
            if name in scope:
                self._mean(id(scope), scope, name)


_PLAIN_KINDS: tuple[type, ...] = (dict, list, str, set, tuple, float, int, complex, type)

_KNOWN = frozenset(
    name
    for names in (*map(dir, (Parameter, torch.dtype, *_PLAIN_KINDS)), ("param_groups", "state"))
    for name in names
)
"""What a parameter has without anybody's doing, and what is asked of plain values."""


def _unwrapped(value: Any) -> tuple[Any, list[Any]]:
    """A function inside of a decorator's object, and what else is called with it."""
    parts: list[Any] = []
    while True:
        if isinstance(value, (staticmethod, classmethod, MethodType)):
            bound = getattr(value, "__self__", None)
            parts += [] if bound is None else [type(bound)]
            value = cast(Any, value).__func__
        elif isinstance(value, functools.partial):
            parts += [*value.args, *value.keywords.values()]
            value = value.func
        elif isinstance(value, property):
            parts += [part for part in (value.fset, value.fdel) if part is not None]
            value = value.fget
        else:
            return value, parts


def _is_plain(value: Any) -> bool:
    """Whether a value of the optimizer's own is one whose parts are copied at each step."""
    return type(value) in _PLAIN or isinstance(value, (Tensor, dict, list, tuple, set, deque))


def _holds_code(value: Any) -> bool:
    """Whether a value is a function, an object with methods, or a collection of such."""
    kind = type(value)
    if kind in _PLAIN:
        return False
    if kind in (dict, list, tuple, set, frozenset, deque):
        items = value.values() if kind is dict else value
        return len(value) > _MANY or any(map(_holds_code, list(items)))
    if isinstance(value, (FunctionType, MethodType, type)):
        return _is_followed(value)
    return _is_followed(kind)


_PLAIN = frozenset({int, float, str, bool, type(None), bytes, complex})

_MANY = 1000
"""Items of a collection that nobody looks through."""


def _is_followed(value: Any) -> bool:
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    module = module if isinstance(module, str) else "builtins"
    return module.partition(".")[0] not in _NOT_FOLLOWED or module.startswith("torch.optim")


_OF_OPTIONS = {"_to_scalar", "_stack_if_compiling", "_make_sparse", "_multi_tensor_adam"}
"""Helpers of torch.optim that ask for sizes of options or of sparse gradients."""


def _is_of_options(function: FunctionType) -> bool:
    """Whether the attributes that a function asks for are none of a parameter's."""
    return function.__module__.startswith("torch.optim") and function.__name__ in _OF_OPTIONS


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _strings(constants: Iterable[Any]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(cast(Iterable[Any], constant))


def _attributes(code: CodeType, scope: Scope) -> tuple[set[str], set[str]]:
    """Names that are asked of objects other than `self`, and those that are asked of modules."""
    first = code.co_varnames[0] if code.co_argcount and code.co_varnames[0] == "self" else None
    asked: tuple[set[str], set[str]] = set(), set()
    found: Any = None
    is_self = False
    for step in dis.get_instructions(code):
        if "ATTR" in step.opname or step.opname == "LOAD_METHOD":
            of_module = isinstance(found, ModuleType)
            if not is_self:
                asked[of_module].add(str(step.argval))
            found = getattr(found, str(step.argval), None) if of_module else None
        else:
            is_global = step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
            found = scope.get(str(step.argval)) if is_global else None
        is_self = step.opname.startswith("LOAD_FAST") and _last(step.argval) == first is not None
    return asked


def _last(names: Any) -> Any:
    """Of two locals that one instruction loads."""
    return names[-1] if isinstance(names, tuple) and names else names


def _names_asked_for(code: CodeType) -> set[Any]:
    """Names that `getattr` and its like are given; None stands for one that is made up."""
    steps = list(dis.get_instructions(code))
    return {
        _second_value(steps[place + 1 :])
        for place, step in enumerate(steps)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in _BY_NAME
    }


def _sees_groups(code: CodeType) -> bool:
    """Whether it does anything with `param_groups` but begin a loop over them."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_OPERATION]
    return any(
        step.opname == "LOAD_ATTR" and step.argval == "param_groups" and after.opname != "GET_ITER"
        for step, after in pairwise(steps)
    )


def _counts(code: CodeType) -> bool:
    """Whether it asks for a length, other than to see whether something is empty."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in _NO_OPERATION]
    for place, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval == "len":
            calls = (i for i in range(place, len(steps)) if steps[i].opname.startswith("CALL"))
            after = steps[next(calls, place) + 1 :][:2]
            asks = len(after) == 2 and after[1].opname == "COMPARE_OP" and after[0].argval == 0
            if not asks and not (after and "JUMP_" in after[0].opname and "IF" in after[0].opname):
                return True
    return False


_NO_OPERATION = {"PRECALL", "CACHE", "TO_BOOL", "EXTENDED_ARG", "NOP"}


def _second_value(steps: Iterable[dis.Instruction]) -> str | None:
    """The second value that is put on the stack, if it is a string that stands in the code."""
    depth, found = 0, None
    for step in steps:
        before, depth = depth, depth + dis.stack_effect(step.opcode, step.arg, jump=False)
        if found is None and depth >= 2:
            plain = before == 1 and step.opname == "LOAD_CONST" and isinstance(step.argval, str)
            if not plain:
                return None
            found = step.argval
        elif found is not None and depth <= 2:
            return found if depth < 2 else None  # else it is part of another string
    return None
