"""Is a step all or nothing? Steps that are stopped at every point, and what is left of them.

For every point of a step: the process forks, the child takes the step with a fault at that point,
looks at everything that a user can see, and goes on. What may come out:

    nothing   all is as before the step; the same step, taken again, and one more are those of an
              undisturbed run, bit by bit
    all       all is as after the step, and so is one more
    said      the next step raises RuntimeError and speaks of an unfinished one; `state_dict()`,
              pickle and deepcopy raise as well, so nothing is saved as if it were whole. Where
              gradients alone were changed, the next step refuses those until there are others
    silent    anything else: a fault to mend

`python tests/helpers/interrupted_steps.py` prints the counts by case, and each silent line; see
`--help`.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import inspect
import os
import pickle
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from faults import KINDS, Kind, points, strike
from observed import Observed, difference, observe
from torch import Tensor, nn
from torch.optim import Optimizer

from mixprec import DynamicLossScaler, MixedPrecision

T = TypeVar("T")
Weights = Literal["split bf16", "full bf16", "full fp16", "fp32", "mixed"]
Tier = Literal["rule", "fused", "fused 8bit"]
Operation = Literal["step", "overflow", "train", "eval"]
Verdict = Literal["nothing", "all", "said", "silent"]

SHAPES = (((4, 6), (3, 5)), ((6, 4),))
"""Of two groups; matrices, because Muon takes no other."""
UNFINISHED = re.compile("unfinished|interrupted|stopped")
CHILD_SECONDS = 60

BUILD: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    "Lion": lambda groups: _third_party("lion_pytorch", "Lion")(groups, lr=1e-2),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-2),
    "Muon": lambda groups: torch.optim.Muon(groups, lr=1e-2),
    "ScheduleFree": lambda groups: _third_party("schedulefree", "AdamWScheduleFree")(
        groups, lr=1e-2, warmup_steps=3
    ),
}
NEEDS = {"Lion": "lion_pytorch", "ScheduleFree": "schedulefree"}
FUSES = ("SGD", "AdamW", "Lion")


def _third_party(package: str, name: str) -> Any:
    return getattr(importlib.import_module(package), name)


@dataclass(frozen=True)
class Case:
    """An optimizer, and which of its steps is stopped."""

    rule: str
    weights: Weights = "split bf16"
    tier: Tier = "rule"
    before: int = 2
    """Steps taken before, undisturbed; 0 stops the first one, which has trials."""
    buckets: bool = True
    scaler: bool = False
    operation: Operation = "step"

    def __str__(self) -> str:
        extra = [", several buckets"] if self.buckets and self.tier == "rule" else []
        extra += [", scaler"] if self.scaler else []
        step = f"{self.operation} after {self.before}"
        return f"{self.rule}, {self.weights}, {self.tier}{''.join(extra)}: {step}"


@dataclass(frozen=True)
class Outcome:
    """What one fault came to."""

    verdict: Verdict
    kind: Kind
    where: str
    detail: str = ""


class Run:
    """A case up to the point where it will be stopped."""

    def __init__(self, case: Case) -> None:
        self.case = case
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        self.params: list[nn.Parameter] = []
        groups = [{"params": [self._param(shape) for shape in shapes]} for shapes in SHAPES]
        inner = BUILD[case.rule](groups)
        self.rule_file = inspect.getfile(inspect.unwrap(type(inner).step))
        self.scaler = DynamicLossScaler(2.0**10, growth_interval=3) if case.scaler else None
        self.optimizer = MixedPrecision(
            inner,
            masters="full" if case.weights == "full bf16" else "auto",
            loss_scaler=self.scaler,
            max_grad_norm=0.5 if case.weights in ("fp32", "mixed") else None,
            bucket_numel=32 if case.buckets else "auto",
            fused=case.tier != "rule",
            state_formats="8bit" if case.tier == "fused 8bit" else None,
        )
        self.grads: list[Tensor | None] = [None] * len(self.params)
        self._turn, self._loss_scale = 0, 1.0
        self.optimizer.train()
        for _ in range(case.before):
            self._set_grads()
            self.optimizer.step()
        if case.operation in ("step", "overflow"):
            self._set_grads(overflow=case.operation == "overflow")
        elif case.operation == "train":
            self.optimizer.eval()

    def operate(self) -> None:
        """What will be stopped."""
        if self.case.operation == "train":
            self.optimizer.train()
        elif self.case.operation == "eval":
            self.optimizer.eval()
        else:
            self.optimizer.step()

    def go_on(self) -> None:
        """The step after it."""
        if self.case.operation == "eval":
            self.optimizer.train()
        self._set_grads()
        self.optimizer.step()

    def observe(self) -> Observed:
        return observe(self.optimizer, self.params, self.grads)

    def _param(self, shape: tuple[int, ...]) -> nn.Parameter:
        place, weights = len(self.params), self.case.weights
        dtype = torch.bfloat16
        if weights == "full fp16":
            dtype = torch.float16
        if weights == "fp32" or (weights == "mixed" and place % 2):
            dtype = torch.float32
        generator = torch.Generator().manual_seed(place)
        param = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        self.params.append(param)
        return param

    def set_grads_again(self) -> None:
        """What the same backward pass would give; the loss is scaled as it was."""
        self._turn -= 1
        self._set_grads(overflow=self.case.operation == "overflow", scaled=True)

    def _set_grads(self, *, overflow: bool = False, scaled: bool = False) -> None:
        self._turn += 1
        if not scaled and self.scaler is not None:
            self._loss_scale = float(self.scaler.multiply(torch.ones(())))
        scale = self._loss_scale
        generator = torch.Generator().manual_seed(100 + self._turn)
        for place, param in enumerate(self.params):
            grad = torch.randn(param.shape, generator=generator) * 0.5 * scale
            if overflow and place == 1:
                grad[0, 0] = float("inf")
            param.grad = self.grads[place] = grad.to(param.dtype)


def stop(
    case: Case, kinds: Iterable[Kind] = KINDS, most: int = sys.maxsize, offset: int = 0
) -> Iterator[Outcome]:
    """Stop a case at its points of these kinds, evenly spread if there are more than `most`."""
    with _prepared(case) as run:
        right, again = (forked(lambda: _undisturbed(run)) for _ in range(2))
        for one, other in zip(right, again, strict=True):
            assert not difference(one, other), "two undisturbed runs differ"
        for kind in kinds:
            if kind == "interrupt in trial" and case.before:
                continue
            where = forked(lambda kind=kind: points(kind, run.rule_file, run.operate))
            stride = -(-len(where) // most) or 1
            for number in range(offset % stride, len(where), stride):
                yield _stopped(run, right, kind, number, where[number])


@contextmanager
def _prepared(case: Case) -> Generator[Run]:
    """The case's run; uninitialised memory is NaN inside, so that reading it shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of skipped steps; and of forks, in later Pythons
            yield Run(case)
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _undisturbed(run: Run) -> tuple[Observed, Observed, Observed]:
    before = run.observe()
    run.operate()
    after = run.observe()
    run.go_on()
    return before, after, _in_the_end(run)


def _in_the_end(run: Run) -> Observed:
    """With the way in which the rule runs, which a fault in a trial must not have changed."""
    return {**run.observe(), "explain()": run.optimizer.explain()}


def _stopped(
    run: Run, right: tuple[Observed, Observed, Observed], kind: Kind, number: int, where: str
) -> Outcome:
    try:
        verdict, detail = forked(lambda: _outcome(run, right, kind, number))
    except ChildProcessError as error:
        verdict, detail = "silent", str(error)
    return Outcome(verdict, kind, where, detail)


def _outcome(
    run: Run, right: tuple[Observed, Observed, Observed], kind: Kind, number: int
) -> tuple[Verdict, str]:
    before, after, _ = right
    raised = strike(kind, number, run.rule_file, run.operate)
    now = run.observe()
    if not raised and kind.startswith("interrupt"):
        return "silent", "the interrupt was swallowed"
    if not raised or now == after:
        wrong = difference(after, now) or _goes_on(run, right)
        swallowed = "" if raised else "the error was swallowed; "
        return ("silent", f"{swallowed}{wrong}") if wrong else ("all", "")
    wrong = difference(before, now)
    if not wrong:
        wrong = _again(run, right)
        if not wrong:
            return "nothing", ""
    scaled = "grads[" in wrong or "scaled in place" in wrong
    if scaled and not difference(_but_gradients(before), _but_gradients(now)):
        unsaid = _is_said(run) and (_is_refused(run) or _again(run, right))
        return ("silent", f"{wrong}; {unsaid}") if unsaid else ("said", "gradients were scaled")
    unsaid = _is_said(run)
    return ("silent", f"{wrong}; {unsaid}") if unsaid else ("said", wrong)


def _but_gradients(seen: Observed) -> Observed:
    return {key: value for key, value in seen.items() if not key.startswith("grads[")}


def _is_refused(run: Run) -> str:
    """What is wrong with a step on gradients that were scaled, until there are new ones."""
    for _ in range(2):
        try:
            run.optimizer.step()
        except RuntimeError as error:
            if UNFINISHED.search(str(error)):
                continue
        return "the next step does not refuse the gradients"
    run.optimizer.zero_grad()
    run.set_grads_again()
    return ""


def _again(run: Run, right: tuple[Observed, Observed, Observed]) -> str:
    """What is wrong with the same step taken again, or with the next."""
    try:
        run.operate()
    except Exception as error:
        return f"taken again, it raised {type(error).__name__}: {str(error)[:80]}"
    wrong = difference(right[1], run.observe())
    return f"taken again, {wrong}" if wrong else _goes_on(run, right)


def _goes_on(run: Run, right: tuple[Observed, Observed, Observed]) -> str:
    try:
        run.go_on()
    except Exception as error:
        return f"the next step raised {type(error).__name__}: {str(error)[:80]}"
    wrong = difference(right[2], _in_the_end(run))
    return f"one step later, {wrong}" if wrong else ""


def _is_said(run: Run) -> str:
    """What does not say that a step is unfinished; empty if all do."""
    optimizer = run.optimizer
    uses: dict[str, Callable[[], object]] = {
        "the next step": optimizer.step,
        "state_dict()": optimizer.state_dict,
        "pickle": lambda: pickle.dumps(optimizer),
        "deepcopy": lambda: copy.deepcopy(optimizer),
        "the step after": optimizer.step,
    }
    for name, use in uses.items():
        try:
            use()
        except RuntimeError as error:
            if UNFINISHED.search(str(error)):
                continue
            return f"{name} raised RuntimeError: {str(error)[:80]}"
        except Exception as error:
            return f"{name} raised {type(error).__name__}: {str(error)[:80]}"
        return f"{name} says nothing"
    return ""


def forked(work: Callable[[], T]) -> T:
    """The result of `work` in a child process, which leaves this one as it is.

    Raises:
        ChildProcessError: where the child died, with its signal or its error.
    """
    reading, writing = os.pipe()
    random_state = random.getstate()
    child = os.fork()
    if child == 0:
        random.setstate(random_state)  # Python seeds anew after a fork
        _answer(writing, work)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else status
        raise ChildProcessError(f"the process died of {name}")
    done, result = pickle.loads(answer)
    if not done:
        raise ChildProcessError(f"the harness failed: {result}")
    return cast(T, result)


def _answer(writing: int, work: Callable[[], object]) -> None:
    signal.alarm(CHILD_SECONDS)  # a lock that is never given back ends the child, not the run
    try:
        answer = (True, work())
    except BaseException as error:
        answer = (False, f"{type(error).__name__}: {error}")
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(pickle.dumps(answer))
    os._exit(0)


# ---------------------------------------- which cases


def core_cases() -> list[Case]:
    """A case of each tier, storage and way to step."""
    return [
        Case("SGD"),
        Case("SGD", "full bf16"),
        Case("SGD", "mixed"),
        Case("SGD", "fp32"),
        Case("SGD", "full fp16", scaler=True),
        Case("SGD", "split bf16", operation="overflow"),
        Case("SGD", "full fp16", scaler=True, operation="overflow"),
        Case("SGD", tier="fused"),
        Case("SGD", "mixed", "fused"),
        Case("AdamW"),
        Case("AdamW", before=1),
        Case("AdamW", "full fp16", "fused", scaler=True),
        Case("AdamW", tier="fused"),
        Case("AdamW", tier="fused 8bit"),
        Case("AdamW", tier="fused", operation="overflow"),
        Case("Lion"),
        Case("Lion", tier="fused 8bit"),
        Case("Adafactor", buckets=False),
        Case("Muon"),
        Case("ScheduleFree"),
        Case("ScheduleFree", operation="eval"),
        Case("ScheduleFree", operation="train"),
        *first_cases(),
    ]


def first_cases() -> list[Case]:
    """First steps, which have trials and make states."""
    return [
        Case("SGD", before=0),
        Case("AdamW", "full bf16", before=0),
        Case("SGD", tier="fused", before=0),
        Case("AdamW", "full fp16", "fused", before=0, scaler=True),
        Case("AdamW", tier="fused 8bit", before=0),
        Case("Lion", tier="fused", before=0, operation="overflow"),
        Case("Adafactor", "mixed", before=0),
        Case("Muon", before=0),
        Case("ScheduleFree", before=0),
    ]


def all_cases() -> list[Case]:
    """Every rule with all weights, in all tiers that it has, at a first, second and later step."""
    every = product(BUILD, ("split bf16", "full bf16", "full fp16", "fp32", "mixed"), (0, 1, 3))
    cases: list[Case] = []
    for rule, weights, before in cast(Iterable[tuple[str, Weights, int]], every):
        scaler = weights == "full fp16"
        tiers: tuple[Tier, ...] = ("rule", "fused", "fused 8bit") if rule in FUSES else ("rule",)
        for tier in tiers:
            cases.append(Case(rule, weights, tier, before, scaler=scaler))
            if tier == "rule":
                cases.append(Case(rule, weights, tier, before, buckets=False, scaler=scaler))
            if before == 1:
                cases.append(Case(rule, weights, tier, 1, scaler=scaler, operation="overflow"))
        if rule == "ScheduleFree" and before:
            for operation in cast(tuple[Operation, ...], ("eval", "train")):
                cases.append(Case(rule, weights, "rule", before, operation=operation))
    return cases


def unable(case: Case) -> str:
    """Why a case cannot run here, or the empty string."""
    package = NEEDS.get(case.rule)
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "" if hasattr(os, "fork") else "this system cannot fork a process"


# ---------------------------------------- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--all", action="store_true", help="all cases instead of the core ones")
    parser.add_argument("--case", default="", help="cases whose name matches this expression")
    parser.add_argument("--kind", default="", help="kinds that match this expression")
    parser.add_argument("--most", type=int, default=40, help="points of a case and a kind")
    parser.add_argument("--offset", type=int, default=0, help="the first point")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cases = all_cases() if given.all else core_cases()
    cases = [case for case in cases if re.search(given.case, str(case))]
    kinds: list[Kind] = [kind for kind in KINDS if re.search(given.kind, kind)]
    total: Counter[str] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    begun = time.monotonic()
    print(f"{'tried':>6}{'nothing':>8}{'all':>6}{'said':>6}{'silent':>7}  case, fault", flush=True)
    for case in cases:
        if unable(case):
            print(f"{unable(case)}: {case}")
            continue
        counts: dict[Kind, Counter[str]] = {}
        for outcome in stop(case, kinds, given.most, given.offset):
            counts.setdefault(outcome.kind, Counter())[outcome.verdict] += 1
            if outcome.verdict == "silent":
                silent[outcome.where, _kind_of(outcome)] += 1
        for kind, found in counts.items():
            total.update(found)
            print(f"{_row(found)}  {case}, {kind}", flush=True)
    print(f"{_row(total)}  in all, {time.monotonic() - begun:.0f} s")
    for (where, detail), count in sorted(silent.items()):
        print(f"{count:5d}  {where}: {detail}")
    sys.exit(1 if silent else 0)


def _row(counts: Counter[Any]) -> str:
    numbers = [counts.total(), *(counts[v] for v in ("nothing", "all", "said", "silent"))]
    return "".join(f"{n:{w}d}" for n, w in zip(numbers, (6, 8, 6, 6, 7), strict=True))


def _kind_of(outcome: Outcome) -> str:
    """The detail without its values, so that equal ones are counted together."""
    return re.sub(r"\[\d+\]", "[]", re.sub(r" is .*?(;|$)", r" differs\1", outcome.detail))[:140]


if __name__ == "__main__":
    main()
