import dataclasses
import io
import json
import math
import runpy
import sys

import pytest
import torch
from torch import Tensor

from transfer_surgery.reproduce import draw_figure1 as figure1_drawing
from transfer_surgery.reproduce import figure1_sensitivity
from transfer_surgery.reproduce.draw_figure1 import draw_figure1
from transfer_surgery.reproduce.figure1 import (
    NETWORKS,
    Fit,
    fit,
    grid,
    loss,
    neuron,
    run_figure1,
)
from transfer_surgery.reproduce.figure1_sensitivity import sensitivity, sensitivity_table
from transfer_surgery.reproduce.tables import figure1_table

# Without noise the transfer is quick and sure.
QUICK = Fit(noise="none", gate_lr=0.15, steps=900, points=65, seeds=3)


@pytest.fixture(scope="module")
def result() -> dict:
    return run_figure1(QUICK)


def test_the_claim_holds_with_the_default_settings():
    sin, transferred = (
        fit("sin", Fit(seeds=1, steps=500)),
        fit("resin->sin", Fit(seeds=16, steps=3000)),
    )
    # The minimum of its loss that is nearest to w = 6.
    assert sin.w.item() == pytest.approx(6.16, abs=0.03)
    # 98.6 % of 500 seeds; of the others most gates start below 6 and leave 1 too early.
    assert transferred.found.double().mean() > 0.85
    found = transferred.w[transferred.found], transferred.z[transferred.found]
    assert (loss(*found, points=257) < 0.01).all()


def test_resin_stops_behind_a_barrier_which_weight_decay_removes():
    for decay, end in ((0.0, 2.0), (0.02, -0.037)):
        outcome = fit("resin", dataclasses.replace(QUICK, weight_decay=decay))
        torch.testing.assert_close(outcome.w, torch.full_like(outcome.w, end), rtol=0, atol=0.01)
        assert not outcome.found.any()


def test_gates_as_fast_as_w_leave_it_in_poor_minima():
    fast = dataclasses.replace(QUICK, noise="example", gate_lr=1.0, steps=400, seeds=20)
    outcome = fit("resin->sin", fast)
    assert (outcome.z == 0).all()
    assert outcome.found.double().mean() < 0.6


def train_alone(
    log_alpha: Tensor, w: Tensor, settings: Fit, activation: str
) -> tuple[float, float]:
    """One seed in plain torch: Eq. 1, 2, 14 and 16 as they are written."""
    x = torch.linspace(-2 * math.pi, 2 * math.pi, settings.points)
    w, log_alpha = w.clone().requires_grad_(), log_alpha.clone().requires_grad_()
    gates = {"params": [log_alpha], "lr": settings.gate_lr * settings.lr}
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam([{"params": [w]}, gates], lr=settings.lr)
    else:
        optimizer = torch.optim.SGD([{"params": [w]}, gates], lr=settings.lr, momentum=0.9)

    def gate() -> Tensor:
        if "->" in activation:
            return (1.2 * torch.sigmoid(log_alpha) - 0.1).clamp(0, 1)
        return torch.tensor(float(activation == "resin"))

    for _ in range(settings.steps):
        optimizer.zero_grad()
        u, z = w * x, gate()
        resin = torch.where(u.abs() < math.pi / 2, u.sin(), u.sign())
        y = torch.where(z == 1, resin, torch.where(z == 0, u.sin(), z * resin + (1 - z) * u.sin()))
        risk = torch.sigmoid(log_alpha - 2 / 3 * math.log(0.1 / 1.1))
        ((y - (2 * x).sin()).square().mean() + settings.gamma * risk).backward()
        optimizer.step()
    return w.item(), gate().item()


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("network", NETWORKS)
def test_seeds_side_by_side_are_the_same_as_seeds_alone(network, optimizer):
    few = {"w_jitter": 0.2, "seeds": 3, "points": 33, "steps": 150}
    settings = Fit(noise="none", optimizer=optimizer, gamma=5.0, gate_lr=0.8, **few)
    torch.manual_seed(settings.seed)
    starts = settings.w + settings.w_jitter * torch.randn(3)
    log_alphas = 8 + torch.randn(3, generator=torch.Generator().manual_seed(settings.seed))
    alone = [train_alone(a, w, settings, network) for a, w in zip(log_alphas, starts, strict=True)]
    outcome = fit(network, settings)
    found = torch.stack([outcome.w, outcome.z], dim=1)
    torch.testing.assert_close(found, torch.tensor(alone).double(), rtol=1e-3, atol=1e-3)


def exact_loss(w: float, activation: str) -> float:
    """The mean over the interval rather than over a grid, by antiderivatives; w > 0, not 2."""

    def products(a: float, b: float) -> float:
        """The integral of (sin(w x) - sin(2x))^2 from a to b."""

        def antiderivative(x: float) -> float:
            squares = x - math.sin(2 * w * x) / (4 * w) - math.sin(4 * x) / 8
            cross = math.sin((w - 2) * x) / (w - 2) - math.sin((w + 2) * x) / (w + 2)
            return squares - cross

        return antiderivative(b) - antiderivative(a)

    end = 2 * math.pi
    bend = min(math.pi / 2 / w, end) if activation == "resin" else end

    def beyond(x: float) -> float:  # of (1 - sin(2x))^2
        return 1.5 * x + math.cos(2 * x) - math.sin(4 * x) / 8

    return (products(0, bend) + beyond(end) - beyond(bend)) / end


@pytest.mark.parametrize("w", [0.1, 0.5, 1.3, 1.99, 3.7, 6.0])
def test_loss_is_the_integral_of_the_squared_error(w):
    z = torch.tensor([1.0, 0.0])
    expected = torch.tensor([exact_loss(w, "resin"), exact_loss(w, "sin")])
    actual = loss(torch.tensor(w), z, points=100_001)
    torch.testing.assert_close(actual, expected.double(), rtol=0, atol=1e-4)


def test_result_is_small_json_and_says_what_was_found(result):
    text = json.dumps(result)
    assert len(text) < 60_000
    assert json.loads(text) == result
    assert list(result["networks"]) == list(NETWORKS)
    assert [result["networks"][name]["found"] for name in NETWORKS] == [0, 0, 1]
    for network in result["networks"].values():
        trace = network["trace"]
        assert (trace["step"][0], trace["step"][-1]) == (0, QUICK.steps)
        assert len(set(map(len, trace.values()))) == 1
        assert len(trace["step"]) <= 200
        assert trace["w"][0] == QUICK.w
        assert [trace[key][-1] for key in ("w", "z", "loss")] == [
            network[key][0] for key in ("w", "z", "loss")
        ]


def test_final_loss_is_that_of_the_fit(result):
    x = grid(QUICK.points)
    for network in result["networks"].values():
        for w, z, expected in zip(network["w"], network["z"], network["loss"], strict=True):
            y = neuron(x, torch.tensor(w, dtype=torch.float64), torch.tensor(z).double())
            assert (y - torch.sin(2 * x)).square().mean().item() == pytest.approx(
                expected, abs=1e-5
            )


def test_same_seed_same_result_and_the_global_random_state_stays():
    settings = Fit(steps=60, seeds=3, points=33, batch=8, w_jitter=0.1, gate_lr=1.0)
    before = torch.get_rng_state()
    first = fit("resin->sin", settings)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again = fit("resin->sin", settings)
    assert torch.equal(first.trace, again.trace)
    assert torch.equal(first.w, again.w)
    assert not torch.equal(first.w, fit("resin->sin", dataclasses.replace(settings, seed=1)).w)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"points": 1}, {"lr": 0.0}, {"optimizer": "adan"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fit(**wrong)


def test_sensitivity_lists_what_was_changed(monkeypatch):
    monkeypatch.setattr(figure1_sensitivity, "_GATES", ({"noise": "batch"},))
    monkeypatch.setattr(figure1_sensitivity, "_TRAININGS", ({"batch": 4},))
    rows = sensitivity(Fit(steps=5, seeds=2, points=17))
    assert json.loads(json.dumps(rows)) == rows
    assert [row["changed"] for row in rows] == [{"noise": "batch"}, {"batch": 4}]
    assert [list(row["networks"]) for row in rows] == [["resin->sin"], list(NETWORKS)]
    assert rows[1]["networks"]["sin"].keys() == {"found", "transferred", "w"}
    assert rows[1]["networks"]["sin"]["transferred"] == 1
    assert len(sensitivity_table(rows).splitlines()) == 4


def test_sensitivity_table_puts_settings_into_words_and_leaves_unseen_networks_empty():
    soft = {"found": 0.98, "transferred": 1.0, "w": 2.0001}
    resin, sin = dict(soft, found=0.0, transferred=0.0), dict(soft, found=0.0, w=6.1722)
    changes: list[dict] = [
        {"noise": "none", "gate_lr": 0.25},
        {"init": "log_alpha", "w_jitter": 0.1},
        {"optimizer": "sgd", "weight_decay": 0.0001},
        {},
    ]
    rows = [{"changed": changed, "networks": {"resin->sin": soft}} for changed in changes]
    rows[-1]["networks"].update(resin=resin, sin=sin)
    unseen = "| 98 % | 100 % | 2.00 |  |  |  |  |"
    assert sensitivity_table(json.loads(json.dumps(rows))).splitlines() == [
        "| changed | resin->sin: found | gate transferred | median w "
        "| resin: found | median w | sin: found | median w |",
        "|---|---|---|---|---|---|---|---|",
        f"| no noise, gates' learning rate x 0.25 {unseen}",
        f"| log alpha from N(8, 1), w jitter 0.1 {unseen}",
        f"| SGD, weight decay 0.0001 {unseen}",
        "| nothing | 98 % | 100 % | 2.00 | 0 % | 2.00 | 0 % | 6.17 |",
    ]


def test_picture_has_a_fit_and_a_solution_space_per_network(result):
    figure = draw_figure1(json.loads(json.dumps(result)))
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert len(figure.axes) == 2 * len(NETWORKS)
    for name, left, right in zip(NETWORKS, figure.axes[::2], figure.axes[1::2], strict=True):
        title = left.get_title(loc="left")
        assert title.startswith(f"{name}: ")
        assert ("3 seeds" in title) == ("->" in name)
        curves = [line.get_label() for line in right.lines if line.get_label().startswith("z = ")]
        assert len(curves) == (5 if "->" in name else 1)
        ends = [line for line in right.lines if line.get_label() in ("start", "end")]
        assert [line.get_xdata()[0] for line in ends] == [
            result["networks"][name]["trace"]["w"][i] for i in (0, -1)
        ]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for module in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    imported_anew = runpy.run_path(figure1_drawing.__file__)
    with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[plots\]'"):
        imported_anew["draw_figure1"]({})


def test_table_has_a_row_per_network(result):
    lines = figure1_table(result).splitlines()
    assert lines[0].startswith("| network | found sin(2x), of 3 seeds | final w |")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [f"`{name}`" for name in NETWORKS]
    assert [line.split("|")[2].strip() for line in lines[2:]] == ["0.0%", "0.0%", "100.0%"]
