"""Playing a step of a rule along the recording of an earlier one, for its scalars alone.

From one step to the next, little of a recording changes but its scalars. A `Replay` sees the rule's
calls and compares each with a `Tape` of the earlier ones: the same function, the very same tensors
of elements, the same options, while numbers that are nothing but scalars are read. Such a call is
not carried out: no value of an element matters, so the rule is handed the tensor that the recording
made. Calls on numbers alone (step counts, bias corrections) just run, and so do views, which torch
wants anew each time.

Anything else raises `Diverged`, and the step has to be recorded in full. What a tensor holds
follows from the calls before, so as long as all of them agree, it need not be looked up; a rule
that swaps two buffers shows itself in the next call, or in the state that it leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixprec.optimizer.fused.recording.recorder import memory_of, tensors_in
from mixprec.optimizer.fused.recording.tape import Diverged, NumberTensor, Step, Tape


class Replay(TorchDispatchMode):
    """Sees the operations of a step along a tape.

    Attributes:
        scalars: what they were done with, as a `Recorder` has them.
        agrees: whether nothing but numbers was other than on the tape. A rule may catch what is
            raised.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard costs as much as the rest of a call, and nothing is compiled here

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.scalars: list[float] = []
        self.agrees = True
        self.made, self.reduced = tape.made, tape.recorder.reduced
        self.per_tensor = tape.recorder.per_tensor
        self._recorder, self._steps = tape.recorder, tape.steps
        self._named, self._memories = tape.named, tape.memories
        self._at = 0
        self._views: dict[int, Tensor] = {}
        self._alive: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        """Whether the whole tape was played, and all of its tensors lie where they lay."""
        whole = self.agrees and self._at == len(self._steps) - 1
        return whole and all(memory_of(tensor) == memory for tensor, memory in self._memories)

    def value_of(self, value: Any) -> str | None:
        """The value that lies in a tensor at the end, if it comes of elements."""
        if not isinstance(value, Tensor):
            return None
        name = self._named.get(id(self._views.get(id(value), value)))
        return self._diverge() if name is None and self._recorder.holds(value) else name

    def holds(self, value: Any) -> bool:
        """Whether tensors with such values are anywhere inside."""
        return self._recorder.holds(value)

    def emit(self, name: str, *inputs: Any) -> NoReturn:
        """Diverges: a tape has nothing to add."""
        self._diverge()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        step = self._steps[self._at]
        if func is step.func and self._fits(step, args, kwargs):
            self._at += 1
            for source in step.sources:
                given = args[source] if type(source) is int else _read(source, args, kwargs)
                self.scalars.append(given if type(given) is float else float(given))
            if step.runs:
                return self._run(step, args, kwargs)
            if step.returns is None:
                return step.result
            return kwargs["out"] if step.returns == "out" else args[0]
        makes = self._recorder.plain.get(func)
        if makes is None or self._recorder.sees(args, kwargs):
            self._diverge()
        result = func(*args, **kwargs)
        if makes and self._recorder.makes_elements(args, result):
            self._diverge()
        return result

    def _run(self, step: Step, args: Any, kwargs: dict[str, Any]) -> Any:
        result = step.func(*args, **kwargs)
        if step.result is not None:
            for tensor, taped in zip(tensors_in(result), tensors_in(step.result), strict=True):
                self._views[id(tensor)] = taped
                self._alive.append(tensor)
        return result

    def _fits(self, step: Step, args: Any, kwargs: dict[str, Any]) -> bool:
        if len(args) != len(step.args) or len(kwargs) != len(step.kwargs):
            return False
        for given, taped in zip(args, step.args):  # noqa: B905
            if given is not taped and type(given) is not taped and not self._same(given, taped):
                return False
        return not kwargs or all(
            key in step.kwargs and self._same(value, step.kwargs[key])
            for key, value in kwargs.items()
        )

    def _same(self, given: Any, taped: Any) -> bool:
        if given is taped or type(given) is taped:
            return True
        if isinstance(taped, Tensor):
            return self._views.get(id(given)) is taped
        if isinstance(taped, NumberTensor):
            fits = isinstance(given, Tensor) and taped == (given.dtype, given.shape)
            return fits and not self._recorder.holds(given)
        if isinstance(taped, (list, tuple)):
            if not isinstance(given, (list, tuple)) or len(given) != len(taped):
                return False
            return all(map(self._same, given, taped))
        return type(given) is type(taped) and not isinstance(given, Tensor) and given == taped

    def _diverge(self) -> NoReturn:
        self.agrees = False
        raise Diverged


def _read(source: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    if type(source) is not tuple:
        return source
    key, place = source
    value = args[key] if isinstance(key, int) else kwargs[key]
    return value[place] if isinstance(value, (list, tuple)) else value
