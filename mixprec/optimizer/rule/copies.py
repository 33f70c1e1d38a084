"""Copies of what a rule keeps beside its tensors, made anew for each step and compared after it.

A probe that runs a rule's code must see every option as it is now, and change none. So it is given
a copy of all that its code can reach: numbers and functions as they are, containers, small tensors
and objects item by item. After the step the copy is compared with the original, which nobody has
touched: what differs, the rule has changed.

Some objects can be neither copied nor compared, because part of them is hidden from Python (a file,
a random generator, an iterator). They raise `Opaque`: nothing is known of a rule that uses one.
"""

from __future__ import annotations

import enum
import functools
import logging
import re
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["LARGEST", "Copier", "IdOfParameter", "Opaque", "by_value"]

LARGEST = 2**12
"""Elements of a tensor or an array, beyond which it is no option but data."""

_SIMPLE = frozenset({int, float, str, bool, type(None), complex, bytes, torch.dtype, torch.device})

_FIXED = (
    *(range, slice, enum.Enum, re.Pattern, Decimal, Fraction, date, timedelta, logging.Logger),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, type(...)),
    *(type(NotImplemented), types.ModuleType, weakref.ReferenceType, types.GenericAlias),
    *(types.BuiltinFunctionType, types.MethodWrapperType, types.MethodDescriptorType),
    *(types.WrapperDescriptorType, types.NoneType),
)
"""Kinds that cannot change, or whose changes are no part of a step."""

_NUMBERS = (int, float, str, complex, bytes)

_CODE = (types.FunctionType, type)

_SOLID = (dict, OrderedDict, defaultdict, list, tuple, set, frozenset, deque, types.SimpleNamespace)

_UNSIZED = (object, types.SimpleNamespace)


class Opaque(Exception):
    """What can be neither copied nor compared, as the end of "it holds ..."."""


class IdOfParameter(Opaque):
    """The `id` of a parameter, by which a rule finds something of its own."""

    def __init__(self) -> None:
        super().__init__("the id of one of the parameters")


class Copier:
    """Copies the values of one step, each object once, and compares them afterwards.

    Args:
        known: what stands for some objects, by their `id`.
        params: the ids of all parameters; what holds one, or its id, has no copy.

    Attributes:
        code: functions and classes that were met.

    >>> options = {"betas": [0.9, 0.99]}
    >>> copier = Copier({})
    >>> copy = copier.copy(options)
    >>> copier.same(options, copy)
    True
    >>> copy["betas"][0] = 0.5
    >>> copier.same(options, copy), options
    (False, {'betas': [0.9, 0.99]})
    """

    def __init__(self, known: Mapping[int, Any], params: frozenset[int] = frozenset()) -> None:
        self._known, self._params = known, params
        self._made: dict[int, Any] = {}
        self.code: list[Any] = []

    def copy(self, value: Any) -> Any:
        """A copy that shares nothing which could change.

        Raises:
            Opaque: if there is none.
        """
        kind = type(value)
        if kind in _SIMPLE or (kind is tuple and _is_simple(value)):
            return value
        key = id(value)
        if key in self._known:
            return self._known[key]
        if key in self._made:
            return self._made[key]
        if key in self._params:
            raise Opaque("one of the parameters")
        if isinstance(value, _CODE):
            self.code.append(value)
            return value
        if isinstance(value, _FIXED):
            return value
        if isinstance(value, _NUMBERS) and not getattr(value, "__dict__", None):
            return value
        return self._copy(value, key)

    def _copy(self, value: Any, key: int) -> Any:
        if type(value) in (dict, list) and len(value) <= LARGEST and _is_simple(value):
            made = self._made[key] = value.copy()  # as are most; this is asked in every step
            if self._params and not self._params.isdisjoint(made):
                raise IdOfParameter
            return made
        if isinstance(value, types.MethodType):
            self.code.append(value.__func__)
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if isinstance(value, functools.partial):
            part = cast("functools.partial[Any]", value)
            items = self.copy(part.func), self.copy(part.args), self.copy(part.keywords)
            made: Any = functools.partial(items[0], *items[1], **items[2])
        elif isinstance(value, types.MappingProxyType):
            made = types.MappingProxyType(self.copy(dict(cast("Mapping[Any, Any]", value))))
        elif isinstance(value, Tensor):
            made = _copied_tensor(value)
        elif (array := _array(value)) is not None:
            made = array.copy()
        else:
            return self._object(value, key)
        self._made[key] = made
        return made

    def _object(self, value: Any, key: int) -> Any:
        """Item by item and attribute by attribute."""
        kind = type(value)
        solid = _solid(kind)
        if solid is None:
            raise Opaque(f"a {kind.__module__}.{kind.__qualname__}")
        if solid not in _UNSIZED and len(value) > LARGEST:
            raise Opaque(f"a {kind.__name__} of {len(value):,} items")
        if solid in (tuple, frozenset):
            made: Any = solid.__new__(kind, [self.copy(item) for item in value])
            self._made[key] = made
        else:
            made = self._made[key] = solid.__new__(kind)
            if solid is deque:
                deque.__init__(made, (), value.maxlen)
            if solid is defaultdict:
                made.default_factory = value.default_factory
        if issubclass(solid, dict):
            for name, item in dict.items(value):
                dict.__setitem__(made, self._name(name), self.copy(item))
        elif solid in (list, deque):
            solid.extend(made, [self.copy(item) for item in value])
        elif solid is set:
            set.update(made, [self._name(item) for item in value])
        if kind is not solid:
            self.code.append(kind)
        for name, item in _attributes(value):
            _set(made, name, self.copy(item))
        return made

    def _name(self, key: Any) -> Any:
        """A key of a dict."""
        if isinstance(key, int) and key in self._params:
            raise IdOfParameter
        return self.copy(key) if isinstance(key, (*_NUMBERS, tuple, Tensor)) else key

    def same(self, value: Any, copy: Any) -> bool:
        """Whether a copy still is what `value` is, whatever has been done to it."""
        return self._same(value, copy, set())

    def _same(self, value: Any, copy: Any, seen: set[tuple[int, int]]) -> bool:
        if value is copy or (id(value), id(copy)) in seen:
            return True
        if id(value) in self._known:
            return self._known[id(value)] is copy
        kind = type(value)
        if kind is not type(copy):
            return False
        if kind in (dict, list, tuple) and _has_same_items(value, copy):
            return True
        if isinstance(value, float):
            return repr(value) == repr(copy)
        if isinstance(value, (*_CODE, *_FIXED, *_NUMBERS, set, frozenset)):
            return bool(value == copy)
        seen.add((id(value), id(copy)))
        left, right = _parts(value), _parts(copy)
        if left is None or right is None:
            return False
        return len(left) == len(right) and all(
            name == other and self._same(item, copied, seen)
            for (name, item), (other, copied) in zip(left, right, strict=True)
        )


def _is_simple(value: Any) -> bool:
    """Whether the keys and items of a container are plain values, or tuples of such."""
    if type(value) is dict:
        return _SIMPLE.issuperset(map(type, value)) and _is_simple(value.values())
    kinds = set(map(type, value)) - _SIMPLE
    if not kinds:
        return True
    return kinds == {tuple} and all(
        _SIMPLE.issuperset(map(type, item)) for item in value if type(item) is tuple
    )


def _has_same_items(left: Any, right: Any) -> bool:
    """Whether two containers hold the same objects; as plain values are, unless one was changed."""
    if len(left) != len(right):
        return False
    if type(left) is dict:
        return left.keys() == right.keys() and all(map(is_, left.values(), right.values()))
    return all(map(is_, left, right))


def by_value(value: Any) -> Any:
    """Something hashable that is equal for two values if they are of one kind and equal.

    >>> by_value([1.0, torch.ones(2)]) == by_value([1.0, torch.ones(2)])
    True
    >>> by_value(1) == by_value(1.0)
    False
    """
    return _by_value(value, ())


def _by_value(value: Any, above: tuple[int, ...]) -> Any:
    kind = type(value)
    if isinstance(value, (*_NUMBERS, types.NoneType)):
        return kind, repr(value)
    if isinstance(value, (*_CODE, *_FIXED)):
        return kind, repr(value) if isinstance(value, slice) else value
    if id(value) in above:
        return kind, "above"
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(_by_value(item, above) for item in cast("set[Any]", value))
    try:
        parts = _parts(value)
    except Opaque:
        parts = None
    if parts is None:
        return kind, id(value)
    above = (*above, id(value))
    return kind, tuple((_by_value(k, above), _by_value(v, above)) for k, v in parts)


# ---------------------------------------- what values consist of


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """All that a value consists of, by a key or a place; None if that is hidden."""
    if isinstance(value, types.MethodType):
        return [("function", value.__func__), ("self", value.__self__)]
    if isinstance(value, functools.partial):
        part = cast("functools.partial[Any]", value)
        return [("function", part.func), ("args", part.args), ("keywords", part.keywords)]
    if isinstance(value, types.MappingProxyType):
        return list(cast("Mapping[Any, Any]", value).items())
    if isinstance(value, Tensor):
        plain = _copied_tensor(value)
        bits = plain.reshape(-1).contiguous().view(torch.uint8) if plain.numel() else plain
        return [("dtype", plain.dtype), ("shape", plain.shape), ("bits", bytes(bits.tolist()))]
    if (array := _array(value)) is not None:
        return [("dtype", str(array.dtype)), ("shape", array.shape), ("bits", array.tobytes())]
    kind = type(value)
    solid = _solid(kind)
    if solid is None:
        return None
    items: list[tuple[Any, Any]] = []
    if issubclass(solid, dict):
        items = list(dict.items(value))
    elif issubclass(solid, (list, tuple, deque)):
        items = list(enumerate(value))
    return items if kind is solid and kind not in _UNSIZED else [*items, *_attributes(value)]


def _copied_tensor(value: Tensor) -> Tensor:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    if not plain or value.is_meta:
        raise Opaque(f"a {type(value).__name__} on {value.device} ({value.layout})")
    if value.numel() > LARGEST:
        raise Opaque(f"a tensor of {value.numel():,} elements")
    return value.detach().to("cpu", copy=True)


def _array(value: Any) -> Any:
    """An array or a number of NumPy, if it is one."""
    if type(value).__module__ != "numpy" or not hasattr(value, "tobytes"):
        return None
    if value.dtype.hasobject or value.size > LARGEST:
        raise Opaque(f"an array of {value.size:,} elements of {value.dtype}")
    return value


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """What is in an object's dict and slots."""
    yield from sorted(getattr(value, "__dict__", {}).items())
    for cls in type(value).__mro__:
        for name, slot in list(vars(cls).items()):
            if isinstance(slot, types.MemberDescriptorType) and cls not in _SOLID:
                try:
                    yield name, slot.__get__(value)
                except AttributeError:  # it is not set
                    continue


def _set(made: Any, name: str, value: Any) -> None:
    held = getattr(made, "__dict__", None)
    if held is not None and not isinstance(
        getattr(type(made), name, None), types.MemberDescriptorType
    ):
        held[name] = value
    else:
        object.__setattr__(made, name, value)


@functools.cache
def _solid(kind: type) -> Any:
    """The class of Python's own whose objects these are, with attributes and slots; or None.

    A class adds to the size of its objects what it keeps in them. Of one that was written in
    Python these are pointers to its dict, its weak references and its slots.
    """
    while kind not in (object, *_SOLID):
        base = kind.__base__
        if base is None or base is type:
            return None
        mine = vars(kind)
        slots = sum(isinstance(item, types.MemberDescriptorType) for item in mine.values())
        known = slots + ("__dict__" in mine) + ("__weakref__" in mine)
        if kind.__basicsize__ - base.__basicsize__ > 8 * known or not kind.__flags__ & _HEAP:
            return None
        kind = base
    return kind


_HEAP = 1 << 9
"""Py_TPFLAGS_HEAPTYPE: the class was made by a statement, or could have been."""
