"""Whether a rule's recording is right, decided by trying it.

A recording shows what the rule did with a probe. It cannot show where a number came from: the
probe's shape, a value seen at construction, Python's random state. So before a group's first fused
step, the rule runs on small random tensors of other shapes, as its user set it up, and beside it
run its programs, from the same values:

    eager     the optimizer's own step, on the device and with the implementation it will use
    program   `Probe.step` at the same group values, `Program.run` on copies

After every step masters, states, numbers in the state and counters in the group must agree. The
learning rate changes on the way, one parameter rests now and then, and the trial is long enough
for warm-up branches. What disagrees is not fused, and the reason names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mixprec.admission import Manner, quote, twin_of, undisturbed
from mixprec.fused.dispatch import NotFusible
from mixprec.fused.program import Program
from mixprec.fused.record import Probe, Recording, RuleState, kind_of
from mixprec.inner import rule_of, same

GRADIENT_SIZES = (1.0, 1e-3, 30.0, 1.0, 1.0, 0.1, 3.0, 1.0, 1e-2, 1.0, 10.0, 1.0)
"""Gradient size of each trial step. RAdam leaves its warm-up at the sixth."""

TOLERANCE = 2e-6
"""How far from the eager rule, relative to the largest update (or state) in a tensor.

An operation in FP32 errs by 2^-24 = 6e-8 of its result. An update is a chain of some 16 operations
whose errors add up to at most 16 * 6e-8 = 1e-6 in the program, and as much in an eager rule that
orders them differently (`foreach`, `fused`); together 2e-6. The master itself is a rounded sum of
old value and update: one spacing of the master, 2^-23 of it, comes on top.
"""

SPACING = 2.0**-23


@dataclass(frozen=True)
class FusedAdmission:
    """Whether a group's rule may run as programs.

    Attributes:
        fusible: whether every trial step agreed.
        reason: what was shown, or what differed.
        exact: whether every trial step agreed in every bit.
        programs: those that the trial went through, in order of first appearance. Nothing is shown
            of any other: when a recording brings one, admit the group again as it is then.
    """

    fusible: bool
    reason: str
    exact: bool = False
    programs: tuple[Program, ...] = ()


class _Differs(Exception):
    """What the program does otherwise than the eager rule."""


def admit_fused(inner: Optimizer, index: int) -> FusedAdmission:
    """Whether the rule of `inner.param_groups[index]` may run as programs, tried before its use.

    Leaves the optimizer, its groups, its state and the random state alone. Takes some tens of
    milliseconds. Parameters of no dimensions are left out, and so is a closure: steps that are
    given one are for the rule itself, which may use the loss.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(4, 4))
    >>> admit_fused(torch.optim.Adam([weight]), 0).fusible
    True
    >>> admit_fused(torch.optim.Adafactor([weight]), 0).reason
    'torch.linalg_vector_norm is not element-wise'
    """
    try:
        with undisturbed(inner):
            trials = _trials(inner, index)
            _check_sizes(trials[0].twin, inner.param_groups[index]["params"])
    except NotFusible as error:
        return FusedAdmission(False, str(error))
    except _Differs as error:
        return FusedAdmission(False, f"its recording differs from the rule itself: {error}")
    except Exception as error:
        return FusedAdmission(False, f"tried on small tensors it raised {quote(error)}")
    programs = dict.fromkeys(program for trial in trials for program in trial.programs)
    exact = all(trial.exact for trial in trials)
    how = "bit by bit" if exact else f"within {TOLERANCE:g} of each update"
    steps = len(GRADIENT_SIZES)
    return FusedAdmission(
        True, f"its recording equals the rule {how}, in {steps} trial steps", exact, tuple(programs)
    )


def _trials(inner: Optimizer, index: int) -> list[_Trial]:
    """Trials from a fresh state and, if the rule has one, from the state that it has."""
    stepped = any(inner.state.get(param) for param in inner.param_groups[index]["params"])
    trials: list[_Trial] = []
    for with_state in (False, True)[: 1 + stepped]:
        afresh = stepped and not with_state
        trial = _Trial(inner, index, with_state=with_state, counters=not afresh)
        try:
            trial.run(resting=True)
        except (NotFusible, _Differs):
            raise
        except Exception:
            # Torch's fused SGD fails where only some momentum buffers exist, and a rule may want
            # numbers in its group that are no options.
            trial = _Trial(inner, index, with_state=with_state, counters=True)
            trial.run(resting=False)
        trials.append(trial)
    return trials


def _check_sizes(twin: Optimizer, params: list[Tensor]) -> None:
    """Whether the group's own parameters, of whatever sizes, are stepped like small ones.

    The twin's learning rate is not 0, as the group's may be for now: 0 would hide a factor on it.
    """
    probes: dict[Any, Probe] = {}
    for param in {(p.shape, kind_of(p)): p for p in params if p.ndim}.values():
        if kind_of(param) not in probes:
            probes[kind_of(param)] = Probe(twin, 0, param)
        probes[kind_of(param)].check_size(param.shape)


class _Trial:
    """An eager twin of the optimizer, with one group, and the programs beside it."""

    def __init__(self, inner: Optimizer, index: int, *, with_state: bool, counters: bool) -> None:
        manner = Manner("steady", with_state=with_state, counters=counters)
        self.twin, params = twin_of(inner, manner)
        self.group: dict[str, Any] = self.twin.param_groups[index]
        self.twin.param_groups = [self.group]
        if callable(train := getattr(self.twin, "train", None)):
            train()  # schedule-free rules step in no other mode
        self.params = [param for param in params[index] if param.ndim]
        self.group["params"][:] = self.params
        if not self.params:
            raise NotFusible("a parameter of no dimensions looks like the numbers of the rule")
        if any(param.dtype != torch.float32 for param in self.params):
            raise NotFusible("a parameter is float64, and kernels compute in FP32")
        self.probes = {param: Probe(self.twin, 0, param) for param in self.params}
        self.exact = True

    @property
    def programs(self) -> Iterator[Program]:
        return (program for probe in self.probes.values() for program in probe.programs)

    def run(self, *, resting: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        for turn, size in enumerate(GRADIENT_SIZES):
            for place, param in enumerate(self.params):
                grad = torch.randn(param.shape, generator=generator).to(param) * size
                rests = resting and len(self.params) > 1 and (turn + place) % 5 == 4
                param.grad = None if rests else grad
            self._compare(turn)
            if turn in (3, 7):
                _slow_down(self.group)

    def _compare(self, turn: int) -> None:
        moving = [param for param in self.params if param.grad is not None]
        before = {k: v for k, v in self.group.items() if k != "params"}
        predicted = [self._predict(param) for param in moving]
        old = [param.detach().clone() for param in moving]
        with torch.enable_grad():
            rule_of(self.twin)(self.twin)
        where = f"after trial step {turn + 1}"
        for param, begin, (recording, master, states) in zip(moving, old, predicted, strict=True):
            self._compare_shared({**before, **recording.group}, recording.shared, where)
            self._compare_state(recording, states, self.twin.state.get(param) or {}, param, where)
            update = (param.detach() - begin).abs().max()
            allowed = TOLERANCE * update + SPACING * param.detach().abs().max()
            self._compare_tensor(master, param.detach(), allowed, f"the parameter {where}")

    def _predict(self, param: Tensor) -> tuple[Recording, Tensor, dict[str, Tensor]]:
        entry: dict[str, Any] = self.twin.state.get(param) or {}
        recording = self.probes[param].step(RuleState.of(entry, param))
        grad = param.grad
        assert grad is not None
        states = {k: v.detach() for k, v in entry.items() if isinstance(v, Tensor)}
        master, made = recording.program.run(
            param.detach().clone(), grad.clone(), states, recording.scalars
        )
        kept = {k: states[k].clone() for k in recording.state.elements if k not in made}
        return recording, master, {**kept, **made}

    def _compare_shared(
        self, group: Mapping[str, Any], shared: Mapping[Any, Any], where: str
    ) -> None:
        state = cast(dict[Any, Any], self.twin.state)
        for key, value in group.items():
            if not _same_number(value, self.group.get(key)):
                raise _Differs(f"param_groups[...][{key!r}] {where}")
        for key, value in shared.items():
            if not _same_number(value, state.get(key)):
                raise _Differs(f"optimizer.state[{key!r}] {where}")

    def _compare_state(
        self,
        recording: Recording,
        states: dict[str, Tensor],
        entry: Mapping[str, Any],
        param: Tensor,
        where: str,
    ) -> None:
        after = RuleState.of(entry, param)
        if set(after.elements) != set(states):
            raise _Differs(f"it keeps {sorted(after.elements)}, not {sorted(states)}, {where}")
        for key, value in {**after.numbers, **recording.state.numbers}.items():
            pair = after.numbers.get(key, _Differs), recording.state.numbers.get(key, _Differs)
            if not _same_number(*pair):
                raise _Differs(f"state[{key!r}] {where} is {pair[0]!r}, not {value!r}")
        for name, value in states.items():
            right = entry[name].detach()
            allowed = TOLERANCE * right.abs().max()
            self._compare_tensor(value, right, allowed, f"state[{name!r}] {where}")

    def _compare_tensor(self, found: Tensor, right: Tensor, allowed: Tensor, what: str) -> None:
        if same(found, right):
            return
        self.exact = False
        distance = (found - right).abs().max()
        if not bool(distance <= allowed):
            raise _Differs(f"{what} is off by {float(distance):.2g}")


def _same_number(left: Any, right: Any) -> bool:
    """Equality wherever a tensor lies and however many digits a 0-d tensor has."""
    if (
        isinstance(left, Tensor)
        and isinstance(right, Tensor)
        and left.numel() == right.numel() == 1
    ):
        return abs(float(left) - float(right)) <= TOLERANCE * abs(float(right))
    return same(left, right)


def _slow_down(group: dict[str, Any]) -> None:
    """What a scheduler does."""
    lr = group.get("lr")
    if isinstance(lr, Tensor):
        lr.mul_(0.5)
    elif isinstance(lr, float):
        group["lr"] = lr * 0.5
