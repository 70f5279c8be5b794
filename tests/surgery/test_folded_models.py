"""What a model keeps when its targets are folded: parameters, modes, outputs; what is refused."""

import copy

import pytest
import torch
from torch import nn

from tests.helpers.folding import IMAGES, folded, images, matched
from transfer_surgery import bake, convert, fold_targets, match_targets, swap_targets
from transfer_surgery.surgery import fold_site
from transfer_surgery.units import FittedActivation, PerChannel, TargetParameters

pytestmark = pytest.mark.filterwarnings("ignore:a gate saw fewer")  # a few images will do here


def test_what_is_left_trains_as_autograd_says():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    for kept in ("ab", "c", "w", "ac", ""):
        site = FittedActivation(nn.Tanh(), TargetParameters((3,), PerChannel(1)), dims=2).double()
        given = {"a": 1.0, "w": 1.0, "c": 0.0, "b": 0.0}
        for name in "awcb":
            setattr(site, name, nn.Parameter(torch.randn(3)) if name in kept else None)
            given[name] = getattr(site, name) if name in kept else given[name]
        expected = given["a"] * torch.tanh(given["w"] * x + given["c"]) + given["b"]
        found = site(x)
        torch.testing.assert_close(found, expected)
        wanted = [x, *site.parameters()]
        for one, other in zip(
            torch.autograd.grad(found.square().sum(), wanted),
            torch.autograd.grad(expected.square().sum(), wanted),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_frozen_layers_and_modes_stay_as_they_are():
    model = matched(images(nn.Conv2d(6, 6, 3, bias=False)), IMAGES).train()
    model[2].eval()
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert folded(model.train(), IMAGES) == [("(0 is frozen)", "(2 is frozen)", "a, w, c, b")]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_optimizers_made_before_train_the_folded_network():
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    report = fold_targets(model, IMAGES)
    assert {id(p) for p in model.parameters()} <= held
    assert [row.added for row in report] == [""]
    before = copy.deepcopy(model.state_dict())
    model(IMAGES).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_report_counts_parameters_and_names_new_ones():
    model = matched(images(nn.Conv2d(6, 6, 3, bias=False)), IMAGES)
    count = sum(p.numel() for p in model.parameters())
    report = fold_targets(model, IMAGES)
    # 24 numbers went, and a bias came.
    assert (report.parameters_before, report.parameters_after) == (count, count - 24 + 6)
    assert report.rows[0].added == "2.bias"
    assert str(report).endswith("new, not known to an optimizer made before: 2.bias")


def test_folding_looks_at_the_example_before_it_changes_anything():
    model = images(nn.Conv2d(6, 6, 3))
    match_targets(convert(model, "sin", example_input=IMAGES), [IMAGES])
    bake(swap_targets(model))
    before = str(model)
    with pytest.raises(ValueError, match="a batch is a list"):
        fold_targets(model, [IMAGES, 3])
    assert str(model) == before


class Unseen(torch.autograd.Function):
    """Reads a tensor where no torch function is called on it, as a kernel of one's own does."""

    @staticmethod
    def forward(ctx, x, read):
        return x + torch.from_numpy(read.numpy())

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act2(self.two(self.act1(self.one(x))))
        with torch._C.DisableTorchFunction():
            read = Unseen.apply(y, self.three.weight.detach()[:1])
        return read + self.three(y)


def test_what_the_outputs_reveal_alone_keeps_one_place_from_folding():
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    rows = folded(matched(Hidden(), x), x)
    assert rows[0] == ("one", "two", "")
    assert rows[1] == ("(outputs would change)", "(outputs would change)", "a, w, c, b")


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model = matched(images(nn.Conv2d(6, 6, 3)), IMAGES)
    before = copy.deepcopy(model.state_dict())

    def fails(changes, site, layer):
        raise KeyboardInterrupt

    monkeypatch.setattr(fold_site, "_fold_behind", fails)
    with pytest.raises(KeyboardInterrupt):
        fold_targets(model, IMAGES)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_gates_are_refused():
    model = convert(images(), "sin", example_input=IMAGES)
    with pytest.raises(ValueError, match=r"still has gates at 1 sites, such as '1': call bake"):
        fold_targets(model, IMAGES)


def test_where_nothing_was_transferred_there_is_nothing_to_fold():
    model = convert(images(), "sin", example_input=IMAGES)
    match_targets(model, [IMAGES])
    before = model.eval()(IMAGES)
    report = fold_targets(bake(model), IMAGES)
    assert "nothing to fold" in str(report)
    assert report.parameters_before == report.parameters_after
    assert torch.equal(model(IMAGES), before)


def test_a_network_that_takes_gradients_in_its_forward_is_folded() -> None:
    class Force(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(super().forward(x).sum(), x)[0]

    torch.manual_seed(0)
    x, layers = torch.randn(256, 4), (nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    model = Force(*layers)
    match_targets(convert(model, "sin", example_input=x), [x])
    wanted = bake(swap_targets(model))(x)
    assert fold_targets(model, x).rows[0].left == ""
    torch.testing.assert_close(model(x), wanted)
