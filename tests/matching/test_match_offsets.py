"""Targets without an offset, as int8 code needs them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import (
    bake,
    convert,
    distill,
    fold_targets,
    load_gates,
    match_targets,
    save_gates,
    swap_targets,
)
from transfer_surgery.units import FittedActivation, gated_activations


class Crossing(nn.Module):
    """Its activations stand before padding, before a sum, and before pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.act, self.head = nn.SiLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norms[0](self.one(x)))
        x = x + self.act(self.norms[1](self.two(x)))
        return self.head(x.mean((2, 3)))


def test_without_offsets_every_relu_is_a_plain_one_after_folding():
    model, x = Crossing(), torch.randn(64, 3, 8, 8)
    for _ in range(50):  # statistics as those of a trained network
        model(x)
    original = copy.deepcopy(model.eval())
    convert(model, "relu", example_input=x)
    match_targets(model, [x], refit=True, offset=False)
    optimizer = torch.optim.AdamW(swap_targets(model).parameters(), 1e-4)
    F.mse_loss(model(x), original(x)).backward()
    optimizer.step()
    for _, unit in gated_activations(model):
        assert unit.fitted.b.count_nonzero() == 0
        assert unit.fitted.a.min() >= 0
    bake(model)
    with torch.no_grad():
        before = model(x)
        report = fold_targets(model, x[:2])
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert [row.left for row in report.rows] == ["", ""]
    assert sum(isinstance(module, nn.ReLU) for module in model.modules()) == 2
    assert not any(isinstance(module, FittedActivation) for module in model.modules())

    def squared_error(network: nn.Module) -> float:
        with torch.no_grad():
            return (network(x) - original(x)).square().mean().item()

    plain = bake(swap_targets(convert(copy.deepcopy(original), "relu", example_input=x)))
    assert squared_error(model) < 0.2 * squared_error(plain)


def test_a_layer_behind_makes_up_for_the_offset_that_a_fit_leaves_out():
    errors = {}
    for offset in (True, False):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3)), torch.randn(512, 4)
        wanted = model(x).detach()
        convert(model, "relu", example_input=x)
        report = match_targets(model, [x], refit=True, offset=offset)
        swap_targets(model)
        errors[offset] = (model(x) - wanted).square().mean().item()
        assert report.rows[0].r2 > 0.9
    assert model[1].fitted.b.count_nonzero() == 0
    assert errors[False] == pytest.approx(errors[True], rel=0.05)


def test_teaching_makes_no_amplitude_negative_where_there_is_no_offset():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 3))
    x = torch.randn(256, 4)
    model = convert(copy.deepcopy(teacher), "relu", example_input=x)
    match_targets(model, [x], offset=False)
    model[1].fitted.a.data.fill_(1e-3)
    teacher[2].weight.data.neg_()  # what is taught is a negative amplitude
    distill(swap_targets(model), teacher, x.split(64), steps=8, train="targets", features=[])
    assert model[1].fitted.a.min() == 0


@pytest.mark.parametrize("refit", [False, True])  # there is no layer behind
def test_an_amplitude_without_offset_is_the_least_squares_one(refit):
    torch.manual_seed(0)
    x = torch.randn(4096, 1)
    model = convert(nn.Sequential(nn.SiLU()), "relu", example_input=x, granularity="layer")
    match_targets(model, [x], refit=refit, offset=False)
    fitted = model[0].fitted
    y, shape = F.silu(x), F.relu(fitted.w * x + fitted.c).detach()
    assert fitted.a.item() == pytest.approx(((shape * y).sum() / (shape**2).sum()).item(), rel=1e-3)
    match_targets(model, [x])
    assert fitted.b.requires_grad
    assert fitted.b != 0


@pytest.mark.parametrize("offset", [False, True])
def test_files_know_whether_the_offset_is_trained(offset, tmp_path):
    def make():
        return convert(nn.Sequential(nn.SiLU()), "relu", example_input=torch.zeros(2, 4))

    model = make()
    match_targets(model, [torch.randn(256, 4)], offset=offset)
    save_gates(model, tmp_path / "gates")
    fresh, matched = nn.Sequential(nn.SiLU()), make()
    match_targets(matched, [torch.randn(256, 4)], offset=not offset)
    for other in (fresh, matched):
        load_gates(other, tmp_path / "gates", torch.zeros(2, 4))
        trained = {name for name, p in other[0].fitted.named_parameters() if p.requires_grad}
        assert trained == {"a", "w", "c"} | ({"b"} if offset else set())


def test_a_target_that_needs_its_offset_says_so():
    x = torch.randn(8, 4)
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "sin", example_input=x)
    with pytest.raises(ValueError, match=r"sin needs its offset.*relu"):
        match_targets(model, [x], offset=False)
    assert all(unit.fitted is None for _, unit in gated_activations(model))
