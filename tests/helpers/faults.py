"""Faults that strike a piece of code at a point of one's choice.

A fault has a kind and a number: the n-th point of that kind which the code passes. The points are
found by a dry run (`points`), in which nothing is raised; then `strike` runs the code again and
raises at one of them. What a kind counts:

    interrupt              Python lines of mixprec, of torch's optimizers and of the rule; Ctrl-C
    interrupt in trial     the same inside of an admission, tens of thousands in a first step
    interrupt after call   returns of calls: Ctrl-C is delivered there too, and a value is lost
    out of memory          torch operations, instead of which there is an error
    error after operation  torch operations, after which there is an error
    error of rule          Python lines of the rule's own file
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mixprec
from mixprec.optimizer.fused.self_check import admit_fused
from mixprec.optimizer.rule.admission import accepts_sparse, admit

Kind = Literal[
    "interrupt",
    "interrupt in trial",
    "interrupt after call",
    "out of memory",
    "error after operation",
    "error of rule",
]
KINDS: tuple[Kind, ...] = get_args(Kind)

_TRIALS = {function.__code__ for function in (admit, admit_fused, accepts_sparse)}
_OURS = str(Path(mixprec.__file__).parent)
_TORCH = str(Path(torch.optim.__file__).parent)


class RuleError(Exception):
    """Raised in the middle of a rule."""


def points(kind: Kind, rule_file: str, work: Callable[[], object]) -> list[str]:
    """Where the points of a kind lie, `file:line function`, in the order in which they pass."""
    watch = _watch(kind, rule_file, None)
    with watch:
        work()
    return watch.places


def strike(kind: Kind, number: int, rule_file: str, work: Callable[[], object]) -> str:
    """Run `work` with a fault at its point `number`. Returns what it raised, "" for nothing.

    Raises:
        RuntimeError: if the point was never passed.
    """
    watch = _watch(kind, rule_file, number)
    raised = ""
    try:
        with watch:
            work()
    except BaseException as error:
        raised = type(error).__name__
    if not watch.struck:
        raise RuntimeError(f"point {number} of kind {kind!r} was never passed: {raised}")
    return raised


def _watch(kind: Kind, rule_file: str, number: int | None) -> _Lines | _Operations:
    if kind in ("out of memory", "error after operation"):
        return _Operations(number, after=kind == "error after operation")
    files = (rule_file,) if kind == "error of rule" else (_OURS, _TORCH, rule_file)
    error = RuleError if kind == "error of rule" else KeyboardInterrupt
    return _Lines(number, files, error, kind)


class _Lines(AbstractContextManager[Any]):
    """Counts lines, or returns of calls, and raises at one of them."""

    def __init__(
        self, number: int | None, files: tuple[str, ...], error: type[BaseException], kind: Kind
    ) -> None:
        self.places: list[str] = []
        self.struck = False
        self._number, self._files, self._error = number, files, error
        self._in_trial = kind == "interrupt in trial"
        self._calls = kind == "interrupt after call"
        self._trial: FrameType | None = None
        self._before: dict[FrameType, int] = {}
        self._seen: dict[CodeType, bool] = {}
        self._passed = 0

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, _: object) -> Any:
        code = frame.f_code
        if self._trial is None and code in _TRIALS:
            self._trial = frame  # whatever is counted: its return has to be seen
            return self._local
        if (self._trial is not None) is not self._in_trial:
            return None
        if code not in self._seen:
            self._seen[code] = code.co_filename.startswith(self._files)
        if not self._seen[code]:
            return None
        frame.f_trace_opcodes = self._calls
        return self._local

    def _local(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "return" and frame is self._trial:
            self._trial = None
        elif (self._trial is not None) is not self._in_trial:
            pass
        elif event == ("opcode" if self._calls else "line") and self._counts(frame):
            self._pass(frame)
        return self._local

    def _counts(self, frame: FrameType) -> bool:
        if not self._calls:
            return True
        before = self._before.get(frame, -1)
        self._before[frame] = frame.f_lasti
        return before >= 0 and dis.opname[frame.f_code.co_code[before]].startswith("CALL")

    def _pass(self, frame: FrameType) -> None:
        if self._number is None:
            self.places.append(_place(frame))
        elif self._passed == self._number:
            self.struck = True
            sys.settrace(None)
            raise self._error(_place(frame))
        self._passed += 1


class _Operations(TorchDispatchMode):
    """Counts torch's operations and raises at one of them."""

    def __init__(self, number: int | None, *, after: bool) -> None:
        super().__init__()
        self.places: list[str] = []
        self.struck = False
        self._number, self._after, self._passed = number, after, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        here = self._passed == self._number
        self._passed += 1
        if self._number is None:
            self.places.append(f"{_caller()} {func}")
        result = None if here and not self._after else func(*args, **(kwargs or {}))
        if here:
            self.struck = True
            if self._after:
                _count_writes(func, args)
            raise torch.OutOfMemoryError("out of memory")
        return result


def _count_writes(func: Any, args: Any) -> None:
    """Torch counts what an operation wrote when this mode has returned, which it never does here.

    An error of a real operation that has run comes after the count.
    """
    for argument, value in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            tensors = value if isinstance(value, (list, tuple)) else [value]
            torch.autograd.graph.increment_version(tensors)


def _caller() -> str:
    """The innermost frame of mixprec or of torch's optimizers."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith((_OURS, _TORCH)):
        frame = frame.f_back
    return "elsewhere" if frame is None else _place(frame)


def _place(frame: FrameType) -> str:
    return _text(frame.f_code, frame.f_lineno)


@cache
def _text(code: CodeType, line: int) -> str:
    path = Path(code.co_filename)
    ours = path.is_relative_to(_OURS)
    name = path.relative_to(Path(_OURS).parent) if ours else Path(path.parent.name, path.name)
    return f"{name}:{line} {code.co_name}"
