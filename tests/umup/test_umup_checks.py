"""The checkers: what is right passes, what is known to be wrong is found, pictures are drawn."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixprec import formats, umup
from mixprec.umup.checks.coordinates import CoordinateReport, Slope, check_coordinates, step
from mixprec.umup.checks.picture import Line, draw
from mixprec.umup.checks.scales import check_scales, flushed

L = umup.layers
WIDTHS = (64, 256, 1024)
G = torch.Generator().manual_seed(0)
X, Y = torch.randn(32, 8, generator=G), torch.randint(4, (32,), generator=G)


class BiasInside(L.Linear):
    """The bias is multiplied as the product is."""

    def forward(self, input: Tensor) -> Tensor:
        bias = umup.scale_fwd(self.bias, self.in_features**-0.5)
        return umup.functional.linear(input, self.weight, bias)


def mlp(width: int, hidden: type[nn.Linear] = L.Linear) -> nn.Sequential:
    return nn.Sequential(
        L.Linear(8, width, role="input"), nn.Tanh(), hidden(width, width), nn.Tanh(),
        L.LinearReadout(width, 4),
    )  # fmt: skip


def unit_loss(model: nn.Module) -> tuple[Tensor, int]:
    return umup.losses.cross_entropy(model(X), Y, reduction="sum"), 32


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(umup.param_groups(model, 0.1, torch.optim.SGD))


def coordinates(**options: Any) -> CoordinateReport:
    arguments: dict[str, Any] = {
        "make_model": mlp, "widths": WIDTHS, "loss": unit_loss, "make_optimizer": sgd,
        "seeds": range(3),
    }  # fmt: skip
    return check_coordinates(**{**arguments, **options})


# ------------------------------------------------------------------ coordinates


def test_rules_of_the_table_pass_in_one_step_and_in_several() -> None:
    report = coordinates(steps=3)
    assert report.ok and not report.failures()
    assert set(report.parameters) == {f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")}
    assert set(report.activations) == set("01234")
    assert abs(report.activations["3"].slope) < 0.1


def test_a_bias_inside_the_multiplier_is_found_where_activations_look_fine() -> None:
    report = coordinates(make_model=lambda width: mlp(width, BiasInside))
    assert list(report.failures()) == ["2.bias"]
    assert report.parameters["2.bias"].slope == pytest.approx(-0.5, abs=0.1)
    assert abs(report.activations["2"].slope) < 0.1
    assert re.search(r"NOT ok\s+-0\.5\d ± 0\.0\d\s+\+0\.00   2\.bias", str(report))
    assert report.verdict == "NOT ok"
    wanted = coordinates(make_model=lambda w: mlp(w, BiasInside), wanted={"2.bi*": -0.5})
    assert wanted.ok


def test_one_learning_rate_for_all_of_a_plain_model_is_found() -> None:
    def plain(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 4))

    report = coordinates(
        make_model=plain,
        loss=lambda model: F.cross_entropy(model(X), Y),
        make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    )
    assert "2.weight" in report.failures()
    assert report.parameters["2.weight"].slope > 0.7


def standard(width: int) -> nn.Module:
    """Torch's own initial values, to be trained at one rate."""
    return nn.Sequential(
        nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )


def verdicts(model: Any, optimizer: Any, loss: Any, seeds: int, draws: int) -> set[str]:
    found = [
        check_coordinates(model, WIDTHS, loss, optimizer, seeds=range(100 * d, 100 * d + seeds))
        for d in range(draws)
    ]
    return {report.verdict for report in found}


def unit_adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(umup.param_groups(model, 2**-4, torch.optim.AdamW))


def plain_loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(X), Y)


STANDARD: list[Any] = [
    lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
]


def test_chance_makes_a_verdict_uncertain_and_never_wrong() -> None:
    """One seed is off by more than the tolerance in 7 of 16 draws of SGD."""
    assert verdicts(mlp, sgd, unit_loss, 1, 6) <= {"ok", "uncertain"}
    assert verdicts(mlp, sgd, unit_loss, 4, 2) <= {"ok", "uncertain"}
    for optimizer in STANDARD:
        assert verdicts(standard, optimizer, plain_loss, 1, 3) <= {"NOT ok", "uncertain"}
        assert verdicts(standard, optimizer, plain_loss, 4, 2) == {"NOT ok"}


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_no_draw_of_a_right_model_is_called_wrong_nor_a_wrong_one_right(seeds: int) -> None:
    for optimizer in (sgd, unit_adam):
        assert "NOT ok" not in verdicts(mlp, optimizer, unit_loss, seeds, 20)
    for optimizer in STANDARD:
        assert "ok" not in verdicts(standard, optimizer, plain_loss, seeds, 20)


def test_what_is_uncertain_says_how_many_seeds_would_settle_it() -> None:
    slope = Slope((1.0, 1.1, 1.2), 0.05, 0.0, 0.1, error=0.06, seeds=4)
    # 2.23 standard errors at 10 degrees of freedom are 0.134; 2.13 of 7 seeds' are 0.092.
    assert slope.verdict == "uncertain" and not slope.ok and 6 <= slope.seeds_wanted <= 8
    report = CoordinateReport((1, 2, 4), {"w": slope}, {})
    assert report.verdict == "uncertain" and not report.ok and not report.failures()
    assert f"give about {slope.seeds_wanted} seeds" in str(report)
    assert "uncertain   +0.05 ± 0.06" in str(report)
    assert replace(slope, seeds=16, error=0.03).verdict == "ok"
    assert replace(slope, slope=0.5, error=0.06).verdict == "NOT ok"
    assert replace(slope, slope=0.5, error=0.2).verdict == "uncertain"
    assert replace(slope, slope=0.25, compared=50).verdict == "uncertain"  # of 50, one by chance
    assert replace(slope, slope=math.nan, error=math.nan).verdict == "NOT ok"
    two_points = replace(slope, sizes=(1.0, 1.1), seeds=1, error=math.inf)
    assert two_points.verdict == "uncertain" and two_points.seeds_wanted > 1


def test_a_check_without_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seeds is empty; give one or more, such as range\(4\)"):
        coordinates(seeds=[])


PLAIN_ROLES: dict[str, Any] = {"0.weight": "input", "2.weight": "hidden", "4.weight": "output"}


def plain_mlp(width: int) -> nn.Module:
    """No multipliers; initial values by the table."""
    model = nn.Sequential(
        nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)
    )
    for name, entry in umup.spec(model, PLAIN_ROLES).items():
        row = umup.rule(entry.role, entry.shape, plain=entry.plain)
        nn.init.normal_(model.get_parameter(name), std=row.init_std)
    return model


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_plain_model_with_roles_by_pattern_passes(kind: Any) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        spec = umup.spec(model, PLAIN_ROLES)
        options: Any = {} if kind is torch.optim.SGD else {"eps": 1e-30}
        return kind(umup.param_groups(model, 2**-6, kind, spec=spec, **options))

    def loss(model: nn.Module) -> tuple[Tensor, int]:
        return F.cross_entropy(model(X), Y, reduction="sum"), 32

    report = coordinates(make_model=plain_mlp, loss=loss, make_optimizer=optimizer, seeds=range(8))
    assert report.ok, str(report)


def test_modules_that_are_not_called_and_parameters_that_do_not_move_are_said_to() -> None:
    class Model(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = L.Linear(8, width, role="input")
            self.head = L.LinearReadout(width, 4)

        def forward(self, x: Tensor) -> Tensor:
            return umup.functional.linear_readout(self.inner(x), self.head.weight, self.head.bias)

    report = coordinates(make_model=Model)
    assert report.not_called == ("head.weight", "head.bias") and report.ok
    assert "not called: head.weight, head.bias" in str(report)
    still = coordinates(make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    assert not still.ok and math.isnan(still.parameters["0.weight"].slope)


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    before = torch.get_rng_state()
    coordinates(widths=(8, 16), seeds=(0,))
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------ scales


def test_scales_of_a_unit_scaled_decoder_pass_and_of_a_mean_loss_do_not() -> None:
    model = umup.Decoder(100, width=64, depth=2, seq_len=16)
    g = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(100, (2, 16, 16), generator=g).unbind(0)
    targets[:, 8:] = -100

    def loss(model: nn.Module) -> tuple[Tensor, Tensor]:
        logits = model(tokens).flatten(0, 1)
        loss_sum = umup.losses.cross_entropy(logits, targets.flatten(), reduction="sum")
        return loss_sum, (targets != -100).sum()

    report = check_scales(model, loss)
    assert report.ok, str(report)
    rows = {row.name: row for row in report.rows}
    assert rows["readout"].output == pytest.approx(64**-0.5, rel=0.1)
    assert rows["readout"].grad_output == pytest.approx(1, abs=0.01)
    assert rows["readout"].grad_input == pytest.approx(1, abs=0.1)
    assert rows["readout"].grad_weights["weight"] == pytest.approx(1, abs=0.2)
    assert rows["embedding"].grad_weights["weight"] == pytest.approx(1, abs=0.4)
    assert rows["layers.0.mlp.up"].output == pytest.approx(1, abs=0.1)

    def mean(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()) / 2**12

    report = check_scales(model, mean)
    assert not report.ok
    row = next(row for row in report.failures() if row.name == "layers.0.mlp.up")
    assert row.grad_flush > 0.5
    assert "NOT" in str(report) and "layers.0.mlp.up (Linear)" in str(report)


def test_overflow_of_8_bits_fails() -> None:
    model = nn.Sequential(L.Linear(8, 8), L.LinearReadout(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(10_000)  # type: ignore[union-attr,operator]
    report = check_scales(model, unit_loss)
    first = report.failures()[0]
    assert first.name == "0" and first.overflow > 0.9


@pytest.mark.parametrize("format", [formats.E4M3, formats.E5M2])
def test_flushed_counts_what_the_format_turns_into_0(format: formats.Format) -> None:
    half = format.smallest_subnormal / 2  # a tie, which goes to the even 0
    values = torch.tensor([0.0, half, half * 1.01, 1.0, -half / 2])
    assert flushed(values, format) == 0.5
    assert math.isnan(flushed(torch.zeros(3), format))


# ------------------------------------------------------------------ transfer


def bowl(move: float) -> Callable[[int, float], float]:
    """A loss whose best learning rate moves by that many octaves a doubling."""

    def train(width: int, lr: float) -> float:
        if lr > 2:
            return math.nan
        return (math.log2(lr) + 4 + move * math.log2(width / 64)) ** 2

    return train


def test_transfer_reports_the_drift_of_the_best_rate() -> None:
    lrs = [2.0**e for e in range(-9, 3)]
    fine = umup.check_transfer(bowl(0.4), [64, 128, 256, 512], lrs)
    assert fine.drift == 1 and fine.ok and fine.best[64] == 2**-4
    assert fine.losses[64][4.0] == math.inf
    moves = umup.check_transfer(bowl(1.0), [64, 128, 256, 512], lrs)
    assert moves.drift == 3 and not moves.ok
    assert "moves by 3 octaves" in str(moves) and "inf" in str(moves)


def test_a_best_rate_at_the_edge_of_the_sweep_is_no_success() -> None:
    report = umup.check_transfer(bowl(0.0), [64, 128], [2**-4, 2**-3])
    assert report.drift == 0 and report.at_an_edge == [64, 128] and not report.ok
    assert "at the edge of the sweep: widths [64, 128]" in str(report)


def test_widths_that_always_diverge_are_no_success() -> None:
    report = umup.check_transfer(lambda width, lr: math.nan, [64], [1.0, 2.0])
    assert math.isnan(report.drift) and not report.ok
    ET.fromstring(report.svg())


# ------------------------------------------------------------------ drift


def test_the_monitor_names_what_has_moved_and_says_where_weights_settle() -> None:
    model = nn.Sequential(L.Linear(64, 64, bias=False), L.LinearReadout(64, 8, bias=False))
    optimizer = torch.optim.AdamW(umup.param_groups(model, 0.5, torch.optim.AdamW, 2**-7))
    monitor = umup.DriftMonitor(model, optimizer, factor=2.0)
    assert monitor.warnings() == []
    with torch.no_grad():
        model[1].weight.mul_(0.25)  # type: ignore[union-attr,operator]
    assert monitor.warnings() == ["1.weight: RMS 0.25 times what it was"]
    hidden, readout = monitor.measure()
    assert hidden.rms == hidden.initial and readout.rms == pytest.approx(readout.initial / 4)
    # lr * multiplier / (2 * weight decay)^1/2 = 0.5 / 8 / 2^-3
    assert hidden.equilibrium == pytest.approx(0.5)
    assert readout.equilibrium == pytest.approx(4.0)
    assert "0.weight" in str(monitor)


@pytest.mark.slow
def test_weights_settle_where_the_monitor_says() -> None:
    layer = L.Linear(64, 64, bias=False)
    kind = torch.optim.AdamW
    optimizer = kind(umup.param_groups(layer, 0.5, kind, 2**-5), betas=(0.0, 0.999))
    monitor = umup.DriftMonitor(layer, optimizer)
    g = torch.Generator().manual_seed(0)
    for _ in range(400):
        layer.weight.grad = torch.randn(64, 64, generator=g)
        optimizer.step()
    (drift,) = monitor.measure()
    assert drift.rms == pytest.approx(drift.equilibrium, rel=0.1)  # r = 1 without momentum


# ------------------------------------------------------------------ pictures


def test_reports_draw_themselves_as_svg_with_a_line_for_each_name() -> None:
    report = coordinates(widths=(16, 32), seeds=(0,))
    transfer = umup.check_transfer(bowl(0.0), [64, 128], [2.0**e for e in range(-8, 3)])
    for svg, names in (
        (report.svg(), report.parameters),
        (transfer.svg("<title>\x00"), ("width 64", "width 128")),
    ):
        root = ET.fromstring(svg)
        texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
        lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
        assert len(lines) == len(names)
        for name in names:
            assert any(text.startswith(name) for text in texts)
        for line in lines:
            for point in line.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert 0 <= x <= 860 and 0 <= y <= 480
    assert transfer.svg().count("<circle") == 2


def test_a_picture_of_nothing_and_of_gaps() -> None:
    ET.fromstring(draw([], title="t", x_label="x", y_label="y"))
    svg = draw(
        [Line("a", [1, 2, 4, 8], [1.0, math.nan, 2.0, 0.0])],
        title="t", x_label="x", y_label="y", log_y=True,
    )  # fmt: skip
    assert svg.count("<polyline") == 2


# ------------------------------------------------------------------ bad input


def test_bad_input_is_refused_with_what_was_seen() -> None:
    with pytest.raises(ValueError, match=r"widths=\[64\]; a slope needs two different widths"):
        coordinates(widths=[64])
    with pytest.raises(ValueError, match="the models of widths 64 and 128 differ in"):
        coordinates(
            make_model=lambda w: mlp(w) if w == 64 else nn.Sequential(mlp(w)), widths=(64, 128)
        )
    with pytest.raises(ValueError, match=r"widths=\[\], lrs=\[1.0\]; give a width or more"):
        umup.check_transfer(bowl(0.0), [], [1.0])


@pytest.mark.parametrize("power, factor", [(None, 0.25), (-0.5, 0.5), (0.0, 1.0)])
def test_a_step_divides_by_the_power_of_tokens_that_each_group_asks_for(
    power: float | None, factor: float
) -> None:
    model = nn.Linear(3, 1, bias=False)
    group: dict[str, Any] = {"params": list(model.parameters())}
    optimizer = torch.optim.SGD([group | ({} if power is None else {"token_power": power})], lr=1.0)

    def loss(module: nn.Module) -> tuple[Tensor, int]:
        return module(torch.ones(4, 3)).sum(), 4

    step(model, optimizer, loss, backward_only=True)
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, torch.full((1, 3), 4.0 * factor))


@pytest.mark.parametrize(("count", "labels"), [(3, 3), (10, 10), (12, 6)])
def test_a_picture_labels_its_widths_ten_at_most(count: int, labels: int) -> None:
    widths = [2**i for i in range(count)]
    svg = draw([Line("a", widths, [1.0] * count)], title="t", x_label="x", y_label="y")
    shown = [width for width in widths if f'text-anchor="middle">{width}<' in svg]
    assert shown == widths[:: -(-count // 10)] and len(shown) == labels


def test_modules_that_were_not_called_are_no_rows_of_scales() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    report = check_scales(Half(), lambda model: model(torch.randn(8, 4)).sum())
    assert [row.name for row in report.rows] == ["used"]
