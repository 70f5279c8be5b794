"""Pictures of units: histogram of gates, curves of a site."""

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from transfer_surgery import convert, match_targets
from transfer_surgery.reports import plot_activation, plot_gates
from transfer_surgery.units import gated_activations

X = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))


def network(**how) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 2)]
    model = convert(nn.Sequential(*layers), example_input=X[:2], **how)
    for _, unit in gated_activations(model):
        if unit.gate.learned:
            unit.log_alpha.data.normal_(0, 2)
    return model


def test_every_gate_is_counted_once_and_the_ends_are_where_prediction_is_exact():
    model = network()
    ax = plot_gates(model)
    assert sum(bar.get_height() for bars in ax.containers[-1:] for bar in bars) <= 10
    tops = {}
    for bars in ax.containers:
        for bar in bars:
            place = round(bar.get_x(), 6)
            tops[place] = max(tops.get(place, 0), bar.get_y() + bar.get_height())
    assert sum(tops.values()) == 10
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["1", "3"]
    low, high = (line.get_xdata()[0] for line in ax.lines)
    gate = model[1].gate
    for place, expected in ((low, 0.0), (high, 1.0)):
        gate.log_alpha.data.fill_(place + (1e-3 if expected else -1e-3))
        assert (gate.predict() == expected).all()
        gate.log_alpha.data.fill_(place - (1e-3 if expected else -1e-3))
        assert (gate.predict() != expected).all()


@pytest.mark.parametrize("matched", [False, True])
def test_curves_are_what_the_unit_computes(matched):
    model = network(include="1").eval()
    if matched:
        match_targets(model, [X])
    unit = model[1]
    ax = plot_activation(model, "1", [X], curves=6)
    curves = [line for line in ax.lines if line.get_label().startswith("z = ")]
    assert len(curves) == 6
    x = torch.as_tensor(curves[0].get_xdata())
    with torch.no_grad():
        outputs = unit(x[:, None].expand(-1, 6))[:, unit.gate.predict().argsort()]
    for line, expected in zip(curves, outputs.T, strict=True):
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), expected)
    labels = [line.get_label() for line in ax.lines]
    assert labels[:2] == ["relu", curves[0].get_label() if matched else "sin"]
    inputs = model[0](X).detach()
    assert inputs.min() <= x.min() < x.max() <= inputs.max()


def test_given_axes_are_used():
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plot_gates(network(), left) is left
    assert plot_activation(network(), "1", [X], ax=right) is right
    assert left.patches
    assert right.lines


def test_what_cannot_be_drawn_is_said():
    model = network()
    with pytest.raises(ValueError, match=r"no unit 'act'; its units are 1, 3\.prelu_0\."):
        plot_activation(model, "act", [X])
    with pytest.raises(ValueError, match="prelu"):
        plot_activation(model, "3", [X])
    with pytest.raises(ValueError, match=r"^1: NaN or infinity comes in there"):
        plot_activation(model, "1", [X * torch.nan])
    with pytest.raises(ValueError, match="no log_alpha"):
        plot_gates(network(gate="line"))
    model.add_module("idle", network()[1])
    model.forward = lambda x: x
    with pytest.raises(ValueError, match="does not run"):
        plot_activation(model, "1", [X])


def test_gates_without_a_stretch_have_no_ends_to_mark():
    assert not plot_gates(network(gate="bernoulli")).lines
