"""Rules that use sums and norms over a tensor, keep such numbers, or keep lists of tensors."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from bounds import ROUNDING, SPACING, UPDATE
from frozen import difference, frozen
from small_rules import Rule, params, recordings
from torch import Tensor

from mixprec import MixedPrecision
from mixprec.optimizer.fused.program.operations import OPERATIONS
from mixprec.optimizer.fused.program.program import NUMEL, Op, Program
from mixprec.optimizer.fused.recording import translations
from mixprec.optimizer.fused.recording.kinds import Kinds
from mixprec.optimizer.fused.recording.probe import Element, Probe, RuleState
from mixprec.optimizer.fused.recording.recorder import Recorder
from mixprec.optimizer.fused.self_check import (
    FusedAdmission,
    admit_fused,
)
from mixprec.optimizer.rule.code import code_of

SHAPES = ((33, 17), (65,), (5, 4, 3, 2), (1, 9), (1,))

LOOKS = "its Python code looks at a number of the data, by item() or in an if"


def side_by_side(
    rule: type[Rule], steps: int = 50, shapes: Any = SHAPES, **options: Any
) -> tuple[MixedPrecision, list[float]]:
    """The rule beside its programs on the same gradients: how far each parameter ends, relatively.

    Relative to what the steps allow: `UPDATE` of the way that the parameter went, and a rounding
    of the master at each step. Every tensor's gradients have a size of their own.
    """
    eager, copied = rule(params(*shapes), **options), rule(params(*shapes), **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        programs = MixedPrecision(copied, fused=True)
        pairs = list(zip(*(o.param_groups[0]["params"] for o in (eager, copied)), strict=True))
        begin = [left.detach().clone() for left, _ in pairs]
        generator = torch.Generator().manual_seed(1)
        for step in range(steps):
            for place, (left, right) in enumerate(pairs):
                size = 2.0 ** (place - step % 3)
                left.grad = torch.randn(left.shape, generator=generator) * size
                right.grad = left.grad.clone()
            torch.manual_seed(step)
            eager.step()
            torch.manual_seed(step)
            programs.step()
    distances: list[float] = []
    with torch.no_grad():
        for (left, right), first in zip(pairs, begin, strict=True):
            way, size = (left - first).abs().max(), left.abs().max()
            allowed = UPDATE * way + steps * SPACING / 2 * size
            distances.append(float((left - right).abs().max() / allowed))
    return programs, distances


def admission_of(programs: MixedPrecision) -> FusedAdmission:
    admission = programs._fused.groups.admission(0)
    assert admission is not None
    return admission


# ---------------------------------------- numbers of a tensor

NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda g: g.sum() + 1000,
    "sum of squares": lambda g: g.square().sum(),
    "sum of a mask": lambda g: (g > 0).float().sum() + 1,
    "mean": lambda g: g.mean() + 2,
    "mean over all dimensions": lambda g: g.square().mean(dim=tuple(range(g.ndim)), keepdim=True),
    "root mean square": lambda g: g.square().mean().sqrt(),
    "norm": lambda g: g.norm(),
    "norm of vectors": lambda g: torch.linalg.vector_norm(g),
    "norm of matrices": lambda g: torch.linalg.norm(g),
    "norms of lists": lambda g: torch._foreach_norm([g])[0],
    "norms of lists, stacked": lambda g: torch.stack(
        torch._foreach_norm(
            [
                g,
            ]
        )
    ).unbind()[0],
    "1-norm": lambda g: g.norm(p=1),
    "3-norm": lambda g: g.norm(p=3),
    "4-norm": lambda g: torch.linalg.vector_norm(g, 4),
    "largest": lambda g: g.abs().max(),
    "largest, by norm": lambda g: torch.linalg.vector_norm(g, math.inf),
    "smallest": lambda g: g.abs().min() + 1,
    "smallest, by norm": lambda g: torch.linalg.vector_norm(g, -math.inf) + 1,
    "how many are not 0": lambda g: torch.linalg.vector_norm(g.relu(), 0) + 1,
    "dot product": lambda g: g.flatten().dot(g.flatten()),
    "dot product with itself, doubled": lambda g: g.view(-1).dot((2 * g).view(-1)),
    "standard deviation": lambda g: g.std(),
    "population deviation": lambda g: g.std(correction=0),
    "variance": lambda g: g.var(),
    "deviation over all dimensions": lambda g: g.std(dim=tuple(range(g.ndim)), keepdim=True),
    "larger of two": lambda g: (
        torch.max(g.norm(), g.abs().sum()) + torch.min(g.norm(), g.abs().max())
    ),
    "range": lambda g: g.amax() - g.amin(),
    "a norm's own norm": lambda g: g.norm().norm() + g.norm().sum() + g.norm().max(),
    "arithmetic": lambda g: (
        (g.norm() * 2 + 1).rsqrt().clamp(max=0.5) ** -2 + g.norm().lerp(g.sum(), 0.1)
    ),
    "choice": lambda g: (
        torch.where(g.norm() > 3, g.norm(), 3.0) + torch.where(g.sum() > 0, 1.0, 2.0)
    ),
    "ones like it": lambda g: torch.ones_like(g.norm()) + g.norm().new_zeros(()) + g.norm(),
    "written over": lambda g: g.norm().fill_(3.0).add_(1).mul_(g.norm() + 1) + g.sum().zero_(),
    "built up": lambda g: torch.zeros(()).add_(g.norm()).mul_(0.5).add_(g.abs().sum(), alpha=0.1),
    "built up of a list": lambda g: torch.zeros(1).add_(g.norm()).reshape(()),
    "filled in": lambda g: torch.empty_like(g).fill_(g.norm()),
    "copied in": lambda g: torch.empty_like(g).copy_(g.norm()) + torch.zeros_like(g),
    "expanded": lambda g: g.norm().expand_as(g),
}


OF_TWO_AND_MORE = {"standard deviation", "variance", "deviation over all dimensions"}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_tensor_are_recorded_right(name: str) -> None:
    class Computes(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.addcdiv_(grad, NUMBERS[name](grad), value=-group["lr"])

    shapes = SHAPES[:-1] if name in OF_TWO_AND_MORE else SHAPES
    _, distances = side_by_side(Computes, steps=10, shapes=shapes)
    assert max(distances) <= 1


def test_a_norm_reads_as_its_formula_and_is_one_number_of_the_tensor() -> None:
    class DividesByItsNorm(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            p.sub_(grad / (grad.norm() + grad.abs().mean()))

    program = recordings(DividesByItsNorm(params()), 1)[0].program
    assert str(program).splitlines() == [
        "r0 = sum(grad^2)",
        "r2 = sum(abs(grad))",
        "master' = master - grad / (sqrt(r0) + r2 / numel)",
    ]
    assert program.per_tensor == {NUMEL, "r0", "r1", "r2", "r3", "r4"}
    assert program.reads == ("grad", "master") and not program.reduced
    assert program.num_scalars == 0


@pytest.mark.parametrize("shape", [(1,), (3,), (64, 48), (2, 3, 4, 5)])
def test_numel_is_that_of_the_tensor_at_hand(shape: tuple[int, ...]) -> None:
    ops = (
        Op("sum", ("grad",), "r0"),
        Op("div", ("r0", NUMEL), "r1"),
        Op("sub", ("master", "r1"), "master'"),
    )
    program = Program(ops, (("master", "master'"),), 0)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    master, _ = program.run(torch.ones(shape), grad, {}, [])
    assert torch.equal(master, (1 - grad.sum() / grad.numel()).expand(shape))


def test_running_a_program_that_reduces_changes_nothing_in_place() -> None:
    second = recordings(KeepsItsNorm(params()), 2)[1]
    given = torch.ones(3), torch.ones(3), {"norm": torch.ones(())}
    before = copy.deepcopy(given)
    _, made = second.program.run(*given, second.scalars)
    assert all(torch.equal(a, b) for a, b in zip(given[:2], before[:2], strict=True))
    assert given[2]["norm"] == 1 and made["norm"] != 1 and made["norm"].shape == ()


def test_reductions_are_tolerated_a_rounding_for_each_element_walked_over() -> None:
    """Ten thousand terms in two orders differ by no more than the walks that the trial allows."""
    terms = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).square()
    in_turn = torch.zeros(())
    for term in terms:
        in_turn += term
    assert (in_turn - terms.sum()).abs() <= 2 * math.sqrt(len(terms)) * ROUNDING * terms.sum()


class HasTwoWays(Rule):
    """Its loop looks at the norm; its list code, for GPUs, does not."""

    def __init__(self, params: Any, lr: float = 0.1, foreach: bool | None = None) -> None:
        super().__init__(params, lr, foreach=foreach)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if group["foreach"]:
                norms = torch.stack(torch._foreach_norm([p.grad for p in moving]))
                factors = torch.where(norms > 1, 1 / norms, 1.0).unbind()
                torch._foreach_addcmul_(moving, [p.grad for p in moving], factors, value=-0.1)
            else:
                for p in moving:
                    p.add_(p.grad / p.grad.norm() if p.grad.norm() > 1 else p.grad, alpha=-0.1)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_list_code_is_recorded_where_the_loop_looks_at_a_norm(foreach: bool | None) -> None:
    optimizer = HasTwoWays(params(), foreach=foreach)
    assert admit_fused(optimizer, 0).fusible
    assert "where(r1 > s0" in str(recordings(optimizer, 1)[0].program)
    assert optimizer.param_groups[0]["foreach"] is foreach
    assert max(side_by_side(HasTwoWays, foreach=foreach)[1]) <= 1


class Stays(HasTwoWays):
    """The list code is of no more use than the loop."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(
                    p.grad.sort().values
                    if self.param_groups[0]["foreach"]
                    else p.grad.norm().item()
                )


def test_the_reason_given_is_that_of_the_loop() -> None:
    assert admit_fused(Stays(params()), 0).reason == LOOKS


# ---------------------------------------- numbers kept from step to step


class KeepsItsNorm(Rule):
    """Like NovoGrad: a running mean of the squared norm, made of the first gradient."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        size = grad.square().sum()
        if "norm" not in state:
            state["norm"] = size
        else:
            state["norm"].lerp_(size, 0.02)
        p.add_(grad / state["norm"].sqrt().add_(1e-8), alpha=-group["lr"])


class KeepsItInAVector(Rule):
    """Like AdaNorm: a tensor of one element and one dimension, made of zeros, and a step count."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if not state:
            state.update(
                step=torch.tensor(0.0), norm=torch.zeros((1,)), exp_avg=torch.zeros_like(p)
            )
        state["step"] += 1
        state["norm"].mul_(0.9).add_(grad.norm(), alpha=0.1)
        state["exp_avg"].lerp_(grad * state["norm"].reshape(()), 0.1)
        p.add_(state["exp_avg"], alpha=-group["lr"] / (1 - 0.9 ** state["step"].item()))


class StartsLater(Rule):
    """Its number is one known in advance for three steps, and one of the data afterwards."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        state["step"] = state.get("step", 0) + 1
        state.setdefault("norm", torch.full((), 2.0))
        if state["step"] > 3:
            torch.maximum(state["norm"], grad.norm(), out=state["norm"])
        p.add_(grad / state["norm"], alpha=-group["lr"])


@pytest.mark.parametrize("rule", [KeepsItsNorm, KeepsItInAVector, StartsLater])
def test_numbers_of_the_data_are_kept_by_the_program(rule: type[Rule]) -> None:
    programs, distances = side_by_side(rule)
    assert admission_of(programs).reduced == ("norm",)
    assert max(distances) <= 1


def test_a_kept_number_is_read_and_written_and_never_lifted() -> None:
    first, second = recordings(KeepsItsNorm(params()), 2)
    assert str(second.program).splitlines() == [
        "r0 = sum(grad^2)",
        "norm' = lerp(norm, r0, s0)",
        "master' = master + s2 * grad / (sqrt(norm') + s1)",
    ]
    assert second.scalars == (0.02, 1e-8, -0.1)
    assert first.program.writes == second.program.writes == ("norm", "master")[::-1]
    assert first.program.reads == ("grad", "master")
    assert second.program.reads == ("grad", "norm", "master")
    assert second.program.reduced == ("norm",) and "norm'" in second.program.per_tensor


def test_a_recording_says_which_states_are_numbers_of_the_data() -> None:
    state = recordings(KeepsItInAVector(params()), 1)[0].state
    assert dict(state.numbers) == {"step": torch.tensor(1.0)}
    assert state.elements == ("exp_avg",) and state.reduced == {"norm": (1,)}


def test_a_state_from_a_checkpoint_is_told_apart_by_the_names_of_the_admission() -> None:
    optimizer = KeepsItInAVector(params())
    for _ in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    weight = optimizer.param_groups[0]["params"][0]
    admission = admit_fused(optimizer, 0)
    assert admission.fusible
    state = RuleState.of(optimizer.state[weight], weight, admission.reduced)
    recording = Probe(optimizer, 0, weight).step(state)
    assert state.reduced == {"norm": (1,)} and recording.program in admission.programs
    assert recording == recordings(KeepsItInAVector(params()), 4)[3]


# ---------------------------------------- the recorder, broken


class UsesSumAndMean(Rule):
    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        p.add_(grad / (grad.square().sum() + grad.abs().mean()), alpha=-group["lr"])


TRANSLATIONS: dict[str, Any] = translations.TRANSLATIONS


def a_mean_for_a_sum(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TRANSLATIONS, "sum", TRANSLATIONS["mean"])


def a_sum_for_a_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TRANSLATIONS, "mean", TRANSLATIONS["sum"])


def the_size_of_another_tensor(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(translations, "NUMEL", 77.0)


def the_sum_of_another_tensor(patch: pytest.MonkeyPatch) -> None:
    first: list[Tensor] = []

    def compute(values: Tensor) -> Tensor:
        first.append(values.sum())
        return first[0]

    patch.setitem(OPERATIONS, "sum", replace(OPERATIONS["sum"], compute=compute))


def kept_numbers_for_known_ones(patch: pytest.MonkeyPatch) -> None:
    begin = Recorder.__init__
    patch.setattr(Recorder, "__init__", lambda self, roots, reduced: begin(self, roots, {}))


@pytest.mark.parametrize(
    "rule, fault",
    [
        (UsesSumAndMean, a_mean_for_a_sum),
        (UsesSumAndMean, a_sum_for_a_mean),
        (UsesSumAndMean, the_size_of_another_tensor),
        (UsesSumAndMean, the_sum_of_another_tensor),
        (KeepsItsNorm, the_sum_of_another_tensor),
        (KeepsItsNorm, kept_numbers_for_known_ones),
        (KeepsItInAVector, kept_numbers_for_known_ones),
    ],
    ids=lambda value: value.__name__,
)
def test_admission_catches_a_recorder_that_takes(
    rule: type[Rule], fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert admit_fused(rule(params()), 0).fusible
    fault(monkeypatch)
    admission = admit_fused(rule(params()), 0)
    assert "its recording differs from the rule itself" in admission.reason


# ---------------------------------------- lists and dicts of tensors


class Queues(Rule):
    """Like AdaShift: moves by the gradient of two steps ago."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        queue = state.setdefault("queue", deque(maxlen=3))
        queue.append(grad.clone())
        p.add_(queue[0], alpha=-group["lr"] / len(queue))


class KeepsManyMomenta(Rule):
    """Like AggMo: a dict by decay, and a list of one."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if not state:
            state["momenta"] = {decay: torch.zeros_like(p) for decay in (0.0, 0.9)}
            state["more"] = [torch.ones_like(p), "a note", 7]
        for decay, momentum in state["momenta"].items():
            p.add_(momentum.mul_(decay).add_(grad), alpha=-group["lr"] / 2)
        state["more"][0] = state["more"][0].lerp(grad, 0.1)
        p.add_(state["more"][0], alpha=-group["lr"])


@pytest.mark.parametrize("rule", [Queues, KeepsManyMomenta])
def test_tensors_in_collections_are_states_of_their_own(rule: type[Rule]) -> None:
    programs, distances = side_by_side(rule)
    assert admission_of(programs).exact and max(distances) == 0


def test_a_queue_that_moves_is_copied() -> None:
    fourth = recordings(Queues(params()), 4)[3]
    assert str(fourth.program).splitlines() == [
        "master' = master + s0 * queue[1]",
        "queue[0]' = queue[1]",
        "queue[1]' = queue[2]",
        "queue[2]' = grad",
    ]
    places = [Element(f"queue[{i}]") for i in range(3)]
    assert fourth.state.numbers == {"queue": deque(places, maxlen=3)}
    assert fourth.state.elements == ("queue[0]", "queue[1]", "queue[2]")


def test_a_state_is_taken_apart_and_put_together_again() -> None:
    entry = {
        "step": 3,
        "norm": torch.tensor([2.0]),
        "exp_avg": torch.ones(2, 2),
        "momenta": {0.9: torch.zeros(2, 2), 0.5: torch.ones(2, 2)},
        "queue": deque([torch.full((2, 2), 3.0)], maxlen=4),
        "note": ["a", (1, None)],
        "master": torch.ones(2, 2),
    }
    state = RuleState.of(entry, torch.zeros(2, 2), ["norm"])
    assert state.elements == ("exp_avg", "momenta[0.9]", "momenta[0.5]", "queue[0]")
    assert state.reduced == {"norm": (1,)}
    again = state.entry(state.tensors(entry))
    del entry["master"]
    assert again.keys() == entry.keys() and again["queue"].maxlen == 4
    assert difference(frozen(entry), frozen({key: again[key] for key in entry})) == ""
    again["note"].append("b")
    assert state.numbers["note"] == ["a", (1, None)]


@pytest.mark.parametrize("rule", [Queues, KeepsManyMomenta])
def test_collections_from_a_checkpoint_go_on(rule: type[Rule]) -> None:
    optimizer = rule(params())
    for _ in range(5):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert admit_fused(optimizer, 0).exact


# ---------------------------------------- scalars of a size

Update = Callable[[Any, dict[str, Any], Any, Tensor, dict[str, Any]], None]


def bent(update: Update) -> type[Rule]:
    class Bent(Rule):
        def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
            update(self, group, p, grad, state)

    return Bent


def knows_its_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-group["lr"] / math.sqrt(p.numel()))


def knows_its_last_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-group["lr"] / p.shape[-1])


def knows_its_aspect(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """1 for the probe and for all small squares, 2 for the parameter."""
    p.add_(grad, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[-1]))


def remembers_its_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=-group["lr"] / state.setdefault("fan", p.shape[0]))


def keeps_its_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    """Like Adam-mini: the number of elements, in a tensor."""
    if not state:
        state.update(size=torch.tensor(float(p.numel())), mean=torch.tensor(0.0))
    state["mean"].lerp_(grad.square().sum().div_(state["size"]), 0.1)
    p.add_(grad / (state["mean"].sqrt() + 1e-8), alpha=-group["lr"])


def is_off_by_a_hundred_thousandth(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    p.add_(grad, alpha=1 + 1e-5 * p.shape[0])


OF_A_SIZE = (
    knows_its_size,
    knows_its_last_size,
    knows_its_aspect,
    remembers_its_size,
    keeps_its_size,
    is_off_by_a_hundred_thousandth,
)


@pytest.mark.parametrize("update", OF_A_SIZE, ids=lambda update: update.__name__)
def test_scalars_that_follow_from_sizes_are_recorded_for_each_size(update: Update) -> None:
    programs, distances = side_by_side(bent(update))
    admission = admission_of(programs)
    assert admission.by_size and not admission.first_eager
    assert admission.reason.endswith("in 12 trial steps, with scalars of its own for each size")
    assert max(distances) <= 1


def test_scalars_of_no_size_are_not_recorded_for_each() -> None:
    assert not admit_fused(KeepsItsNorm(params()), 0).by_size


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_a_size_that_small_tensors_hide_is_seen_at_any_learning_rate(lr: float) -> None:
    optimizer = bent(knows_its_aspect)(params((128, 64)), lr=lr)
    assert admit_fused(optimizer, 0).by_size
    weight = optimizer.param_groups[0]["params"][0]
    optimizer.param_groups[0]["lr"] = 0.5
    assert Probe(optimizer, 0, weight, by_size=True).step(RuleState()).scalars == (-1.0,)


def test_kinds_are_told_apart_by_size_only_where_it_matters() -> None:
    wide, high = params((4, 6), (6, 4))
    kinds = Kinds(code_of(bent(knows_its_aspect)([wide, high])))
    assert kinds.kind_of(wide) == kinds.kind_of(high)
    assert kinds.kind_of(wide, by_size=True) != kinds.kind_of(high, by_size=True)


def test_a_number_that_only_data_would_show_is_refused() -> None:
    def update(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        state["seen"] = torch.empty_like(p, dtype=torch.int64).fill_(3).sum()
        p.add_(grad, alpha=-group["lr"] / p.numel())

    assert not admit_fused(bent(update)(params()), 0).fusible


# ---------------------------------------- a first step that is no program


class StartsAtRandom(Rule):
    """Like Gravity."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if not state:
            state["momentum"] = torch.empty_like(p).normal_(std=0.1)
        p.add_(state["momentum"].lerp_(grad, 0.1), alpha=-group["lr"])


class LooksOnce(Rule):
    """Like SGDSaI: the ratio of two statistics of the first gradient scales all later steps."""

    def update(self, group: Any, p: Any, grad: Tensor, state: Any) -> None:
        if not state:
            spread = grad.std(correction=0)
            state["gain"] = grad.norm() / spread if spread != 0 else grad.norm()
        p.add_(grad * state["gain"], alpha=-group["lr"])


@pytest.mark.parametrize(
    "rule, reduced",
    [(StartsAtRandom, ()), (LooksOnce, ("gain",))],
)
def test_a_first_step_that_is_no_program_is_left_to_the_rule(
    rule: type[Rule], reduced: tuple[str, ...]
) -> None:
    programs, distances = side_by_side(rule)
    admission = admission_of(programs)
    assert admission.first_eager and admission.reduced == reduced
    assert admission.reason.endswith("in 12 trial steps, after a first step of its own")
    assert max(distances) <= 1


def test_other_first_steps_are_not_left_to_the_rule() -> None:
    assert not admit_fused(KeepsItsNorm(params()), 0).first_eager


def draws_each_time(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    state["noise"] = torch.randn_like(p)
    p.add_(grad * state["noise"], alpha=-group["lr"])


def draws_and_keeps_nothing(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if not getattr(rule, "begun", False):
        p.add_(torch.randn_like(p))
    p.add_(grad, alpha=-group["lr"])


def keeps_a_float_of_the_data(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if not state:
        state.update(gain=grad.norm().item(), momentum=torch.zeros_like(p))
    p.add_(state["momentum"].lerp_(grad, 0.1), alpha=-group["lr"] * state["gain"])


def keeps_a_float_of_the_size(rule: Any, group: Any, p: Any, grad: Tensor, state: Any) -> None:
    if not state:
        state.update(gain=float(p.shape[0]), momentum=torch.randn_like(p))
    p.add_(state["momentum"].lerp_(grad, 0.1), alpha=-group["lr"] * state["gain"])


@pytest.mark.parametrize(
    "update",
    [
        draws_each_time,
        draws_and_keeps_nothing,
        keeps_a_float_of_the_data,
        keeps_a_float_of_the_size,
    ],
    ids=lambda update: update.__name__,
)
def test_a_first_step_of_its_own_excuses_nothing_else(update: Update) -> None:
    assert not admit_fused(bent(update)(params((128, 64))), 0).fusible


def test_a_number_of_the_size_is_refused_where_the_trial_has_one_size_only() -> None:
    """Of 3 elements both trial tensors are, and what they hold would be taken for known."""

    rule = bent(keeps_a_float_of_the_size)
    assert admit_fused(rule(params((3,))), 0).first_eager
    admission = admit_fused(rule(params((3,), (300,))), 0)
    assert admission.reason == "it draws random numbers (torch.randn_like)"


# ---------------------------------------- counters on the optimizer itself


class CountsOnItself(Rule):
    count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.add_(p.grad, alpha=-0.1 / self.count)


def test_a_count_kept_on_the_optimizer_is_lifted_and_returned_not_written() -> None:
    optimizer = CountsOnItself(params())
    recording = Probe(optimizer, 0, params()[0]).step(RuleState())
    assert recording.attributes == {"count": 1} and optimizer.count == 0
    programs, distances = side_by_side(CountsOnItself)
    assert vars(programs.inner)["count"] == 50 and max(distances) == 0
