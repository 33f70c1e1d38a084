"""A step is all or nothing, whatever stops it; see `interrupted_steps`."""

from __future__ import annotations

import os
import signal
import sys

import pytest
import torch
from faults import KINDS, Kind
from interrupted_steps import (
    Case,
    Outcome,
    Run,
    all_cases,
    core_cases,
    forked,
    stop,
    unable,
)
from torch import Tensor

from mixprec import MixedPrecision

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

SAMPLED: list[tuple[Case, tuple[Kind, ...]]] = [
    (Case("SGD"), KINDS),
    (Case("SGD", "mixed", buckets=False), KINDS),
    (Case("AdamW", "full fp16", scaler=True), KINDS),
    (Case("AdamW", tier="fused 8bit"), KINDS),
    (Case("SGD", before=0), ("interrupt", "out of memory")),
    (Case("SGD", tier="fused", before=0), ("interrupt",)),
]

AT_EVERY_LINE = [
    Case("SGD"),
    Case("SGD", "mixed"),
    Case("SGD", "full fp16", scaler=True),
    Case("AdamW", "full bf16", before=1),
    Case("AdamW", tier="fused"),
    Case("AdamW", tier="fused 8bit"),
    Case("ScheduleFree", operation="eval"),
]


def silent(
    case: Case, kinds: tuple[Kind, ...] = KINDS, most: int = sys.maxsize, offset: int = 0
) -> str:
    if unable(case):
        pytest.skip(unable(case))
    found = [o for o in stop(case, kinds, most, offset) if o.verdict == "silent"]
    return "\n".join(f"{o.kind} at {o.where}: {o.detail}" for o in found)


@pytest.mark.parametrize(("case", "kinds"), SAMPLED, ids=[str(case) for case, _ in SAMPLED])
def test_a_stopped_step_leaves_all_or_nothing_at_some_points(
    case: Case, kinds: tuple[Kind, ...]
) -> None:
    assert not silent(case, kinds, most=2, offset=61)


@pytest.mark.slow
@pytest.mark.parametrize("case", AT_EVERY_LINE, ids=str)
def test_a_step_stopped_at_any_line_leaves_all_or_nothing(case: Case) -> None:
    assert not silent(case, ("interrupt",))


@pytest.mark.slow
@pytest.mark.parametrize("case", core_cases(), ids=str)
def test_a_step_stopped_in_any_way_leaves_all_or_nothing(case: Case) -> None:
    assert not silent(case, most=60 if case.before else 5)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "case"), list(enumerate(all_cases())), ids=str)
def test_a_stopped_step_of_any_rule_leaves_all_or_nothing(place: int, case: Case) -> None:
    kinds: list[Kind] = [kind for kind in KINDS if kind != "interrupt in trial"]

    assert not silent(case, (kinds[place % len(kinds)],), most=3, offset=101 * place)


# ---------------------------------------- the harness itself


def outcomes_of(monkeypatch: pytest.MonkeyPatch, change: object) -> set[str]:
    """What comes out for an optimizer of our own making, stopped at each operation."""
    monkeypatch.setattr(Run, "operate", change)
    found = list(stop(Case("SGD", "fp32"), ("out of memory",)))
    return {_short(outcome) for outcome in found}


def _short(outcome: Outcome) -> str:
    return f"{outcome.verdict}: {outcome.detail.partition(' is ')[0]}"


def test_a_half_written_weight_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def halves(run: Run) -> None:
        for param in run.params:
            param.add_(1.0)

    found = outcomes_of(monkeypatch, halves)

    assert found == {"nothing: ", "silent: weights[0]"}


def test_an_optimizer_that_says_what_is_broken_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("the last step is unfinished")

    @torch.no_grad()
    def halves(run: Run) -> None:
        try:
            for param in run.params:
                param.add_(1.0)
        except torch.OutOfMemoryError:
            for name in ("step", "state_dict", "__getstate__"):  # in the child alone
                setattr(MixedPrecision, name, refuse)
            raise

    found = outcomes_of(monkeypatch, halves)

    assert found == {"said: the next step raised RuntimeError: the last step", "said: weights[0]"}


def test_a_fault_after_the_last_change_leaves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.no_grad()
    def one_and_a_look(run: Run) -> None:
        run.params[0].add_(1.0)
        run.params[0].sum()

    assert outcomes_of(monkeypatch, one_and_a_look) == {"nothing: ", "all: "}


def test_a_process_that_dies_is_told_by_its_signal() -> None:
    with pytest.raises(ChildProcessError, match="the process died of SIGKILL"):
        forked(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_work_in_a_child_changes_nothing_here() -> None:
    weight: Tensor = torch.zeros(3)

    assert forked(lambda: weight.add_(1.0).tolist()) == [1.0, 1.0, 1.0]
    assert weight.tolist() == [0.0, 0.0, 0.0]
