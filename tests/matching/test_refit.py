"""Layers refitted behind a site: least squares for their weights, and which layers can be."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from transfer_surgery import convert, match_targets, swap_targets
from transfer_surgery._running import prediction_mode
from transfer_surgery.matching.refit.layer_refit import RIDGES, LayerFit
from transfer_surgery.matching.refit.refit_rules import layers_to_refit


def add(fit: LayerFit, x: torch.Tensor, wanted: torch.Tensor) -> None:
    """All positions of a batch."""
    fit.add(fit.map.rows(x, wanted.shape, None), fit.map.outputs(wanted, None))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (5, 6)),
        (nn.Linear(6, 4, bias=False), (5, 6)),
        (nn.Conv1d(2, 4, 3, padding="same"), (2, 9)),
        (nn.Conv2d(2, 4, 3, padding=1, stride=2), (2, 7, 7)),
        (nn.Conv2d(2, 4, 3, dilation=2, bias=False), (2, 7, 7)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4), (4, 5, 5)),
        (nn.Conv3d(2, 2, 2), (2, 3, 4, 3)),
        (nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 4, 4)),
    ],
)
def test_refitted_weights_are_those_of_independent_least_squares(layer, shape, wide, monkeypatch):
    monkeypatch.setattr("transfer_surgery.matching.refit.layer_refit._MATRIX", 0 if wide else 2**20)
    x = torch.randn(40, *shape)
    changed = torch.sin(x) + 0.3 * x + 0.2
    wanted = layer(x).detach()
    fitted = LayerFit(layer, [0.0])
    for a, b in zip(changed.split(16), wanted.split(16), strict=True):
        add(fitted, a, b)
    found = copy.deepcopy(layer)
    found.load_state_dict(fitted.solve())
    best = copy.deepcopy(layer).double()
    optimizer = torch.optim.LBFGS(best.parameters(), max_iter=500, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-12, tolerance_change=1e-14)  # fmt: skip

    def loss():
        optimizer.zero_grad()
        value = F.mse_loss(best(changed.double()), wanted.double())
        value.backward()
        return value

    optimizer.step(loss)
    reached = F.mse_loss(found(changed), wanted).item()
    assert reached == pytest.approx(loss().item(), rel=1e-3)
    assert reached < F.mse_loss(layer(changed), wanted).item()


def test_a_strong_ridge_keeps_the_weights():
    layer, x = nn.Linear(6, 4), torch.randn(40, 6)
    fitted = LayerFit(layer, [1e6])
    add(fitted, x.sin(), layer(x).detach())
    torch.testing.assert_close(fitted.solve()["weight"], layer.weight.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_inputs_that_are_0_leave_their_weights_alone(ridge):
    layer = nn.Linear(4, 2)
    for scale in (torch.zeros(4), torch.tensor([1.0, 0.0, 1.0, 1.0])):
        x = torch.randn(50, 4) * scale
        fitted = LayerFit(layer, [ridge])
        add(fitted, x, layer(x).detach())
        for name, value in fitted.solve().items():
            torch.testing.assert_close(value, getattr(layer, name).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "batch", "noise", "best"),
    [(24, 12, 2.0, 1.0), (4000, 2000, 0.1, 1e-2), (4000, 1, 0.1, 1e-2)],
)
def test_few_noisy_rows_are_pulled_to_the_old_weights_more_than_many(rows, batch, noise, best):
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 4), torch.randn(rows, 12)
    # The inputs have changed, and the outputs have noise that no weight explains.
    changed = x * torch.linspace(0.5, 1.5, 12)
    wanted = layer(x).detach() + noise * torch.randn(rows, 4)
    found = {}
    for ridges in (RIDGES, *([ridge] for ridge in RIDGES)):
        fit = LayerFit(layer, ridges)
        for part in torch.arange(rows).split(batch):
            add(fit, changed[part], wanted[part])
        found[tuple(ridges)] = fit.solve()["weight"]
    assert torch.equal(found[tuple(RIDGES)], found[(best,)])


def test_only_plain_trainable_weights_are_refitted_and_the_others_are_named():
    frozen, half_frozen, hooked, of_a_teacher = (nn.Linear(2, 2) for _ in range(4))
    frozen.requires_grad_(False)
    half_frozen.bias.requires_grad_(False)
    hooked.register_forward_pre_hook(lambda layer, args: None)
    teacher = nn.Sequential(of_a_teacher, nn.ReLU())
    pruned = prune.l1_unstructured(nn.Linear(2, 2), "weight", amount=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the older kind of weight norm, still used
        older = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    expected = {
        nn.Conv2d(2, 2, 3): None,
        nn.Linear(2, 2): None,
        nn.Conv2d(2, 2, 3, groups=2, padding="same", padding_mode="reflect"): None,
        nn.Conv1d(2, 2, 3): None,
        nn.ConvTranspose3d(2, 2, 3): None,
        half_frozen: "is frozen",
        nn.Linear(2, 2, device="meta"): "is offloaded",
        hooked: "has hooks",
        of_a_teacher: "is part of another network, too",
        parametrizations.weight_norm(nn.Linear(2, 2)): "has a computed weight",
        older: "has a computed weight",
        pruned: "has a computed weight",
        frozen: "is frozen",
    }
    layers, left = layers_to_refit(nn.ModuleList(expected))
    assert layers == [layer for layer, reason in expected.items() if reason is None]
    assert left == {layer: reason for layer, reason in expected.items() if reason}
    assert teacher[0] is of_a_teacher  # as long as the teacher lives


class Cast(nn.Linear):
    """As timm's own, which helps with mixed precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Standardised(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, F.normalize(self.weight), self.bias)


class Caching(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "kept"):
            self.kept = self.weight.detach().clone()
        return F.linear(x, self.kept, self.bias)


@pytest.mark.parametrize("kind", [nn.Linear, Cast, Standardised, Caching])
def test_a_subclass_is_refitted_where_it_computes_what_torchs_class_does(kind):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), kind(8, 3)), torch.randn(256, 4)
    wanted, last = model(x).detach(), model[2].weight.detach().clone()
    report = match_targets(convert(model, "sin", example_input=x), [x], refit=True)
    swap_targets(model)
    if kind in (nn.Linear, Cast):
        assert report.refitted == ("2",)
        normal = torch.cat([model[1](model[0](x)), torch.ones(256, 1)], 1).double()
        best = normal @ torch.linalg.lstsq(normal, wanted.double()).solution
        error = (model(x) - wanted).square().mean()
        assert error < 1.2 * (best - wanted).square().mean()
    else:
        name = f"{__name__}.{kind.__qualname__}"
        assert report.left == {"2": f"is of the class {name}, which computes something else"}
        assert torch.equal(model[2].weight, last)


def test_all_objects_are_looked_through_only_where_something_else_holds_a_part(monkeypatch):
    """It takes long, and threads that make a tuple meanwhile fail with a SystemError."""
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    with monkeypatch.context() as patch, prediction_mode(model):
        patch.setattr("gc.get_objects", None)
        assert layers_to_refit(model)[1] == {}
    one, other = nn.Sequential(model[0]), nn.Linear(2, 2)
    assert list(layers_to_refit(model)[1]) == [model[0][0]]
    del one
    other.weight = model[1].weight
    assert list(layers_to_refit(model)[1]) == [model[1]]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_norm_keeps_its_statistics(frozen):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2)
    ).eval()
    model[3].requires_grad_(not frozen)
    x, before = torch.randn(256, 4), model[3].running_mean.clone()
    report = match_targets(convert(model, example_input=x), [x], refit=True)
    assert report.refitted == ("2", "4")
    assert torch.equal(model[3].running_mean, before) == frozen


def test_a_layer_whose_weight_is_read_elsewhere_is_left_alone():
    class Tied(nn.Module):
        """An autoencoder whose decoder is its encoder's weight; T5 asks a weight for its dtype."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.code, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            code = F.gelu(self.code(F.relu(self.first(x).to(self.last.weight.dtype))))
            return self.last(F.linear(code, self.code.weight.t()))

    torch.manual_seed(0)
    model, x = Tied(), torch.randn(256, 4)
    before = model.code.weight.clone()
    report = match_targets(convert(model, example_input=x), [x], refit=True)
    assert torch.equal(model.code.weight, before)
    assert report.refitted == ("last",)
    assert report.left == {"code": "has a weight that something else reads, too"}


def test_layers_that_are_left_alone_keep_their_weights_and_stand_in_the_report():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    x = torch.randn(256, 4)
    report = match_targets(convert(model, example_input=x), [x], refit=True)
    assert torch.equal(model[2].weight, before)
    assert (report.refitted, report.left) == (("4",), {"2": "is frozen"})
    assert "1 layer was not refitted: 2 is frozen." in str(report)
