"""Targets fitted to a trained network: the order of sites, whole or not at all."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    MatchWarning,
    TransferSchedule,
    bake,
    convert,
    match_targets,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.matching import samples
from transfer_surgery.matching.fitting.target_fit import TargetFit
from transfer_surgery.units import gated_activations


class Block(nn.Module):
    """Functional activations, one module called twice, and a skip: it is edited."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.bn(self.conv1(x)))
        return F.gelu(self.act(self.conv2(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), Block(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(),
        nn.Linear(8, 3),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(2)
    return model


def data(number: int = 512) -> torch.Tensor:
    return torch.randn(number, 2, 6, 6, generator=torch.Generator().manual_seed(5))


def converted(target: str = "sin", **options) -> nn.Module:
    return convert(network(), target, example_input=data(2), seed=0, **options)


def test_matching_changes_no_output_and_nothing_else_of_the_model():
    model, original = converted(), network()
    model.train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    match_targets(model, data().split(128))
    assert torch.equal(torch.get_rng_state(), random)
    named = dict(model.named_modules())
    assert [named[k].training for k in dict(converted().named_modules())] == modes
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(".fitted." in k for k in after.keys() - before.keys())
    assert torch.equal(model.eval()(data()), original.eval()(data()))


def divergence(model: nn.Module) -> float:
    x = data(2048)[512:]
    with torch.no_grad():
        answers = [F.log_softmax(m.eval()(x), 1) for m in (model, network())]
    return F.kl_div(*answers, log_target=True, reduction="batchmean").item()


def deep() -> tuple[nn.Sequential, nn.Sequential, torch.Tensor]:
    """A network of ten layers, in which errors add up, its copy, and inputs."""
    torch.manual_seed(0)
    layers = [layer for _ in range(10) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return model, copy.deepcopy(model), torch.randn(2048, 16)


def squared_error(model: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        return F.mse_loss(model(x), original(x)).item()


def test_each_site_makes_up_for_those_before_and_refitted_layers_do_more():
    def error(match):
        model, original, x = deep()
        match(convert(model, example_input=x), x[:1024].split(128))
        return squared_error(swap_targets(model), original, x[1024:])

    def each_alone(model, batches):  # the others are at their source meanwhile
        for path, _ in gated_activations(model):
            match_targets(model, batches, include=path)

    plain = error(lambda model, batches: None)
    alone, together = error(each_alone), error(match_targets)
    refitted = error(lambda *args: match_targets(*args, refit=True))
    assert refitted < 0.97 * together
    assert together < 0.97 * alone
    assert alone < 0.5 * plain


def test_a_refit_leaves_the_gates_and_says_that_a_swap_has_to_follow():
    model = converted()
    found = match_targets(model, data().split(128), refit=True, logits=True)
    assert all((unit.gate.predict() == 1).all() for _, unit in gated_activations(model))
    assert found.refitted == ("1.conv2", "4", "6")  # not the layers before the first site
    assert torch.equal(model[0].weight, network()[0].weight)
    assert not torch.equal(model[6].weight, network()[6].weight)
    assert found.needs_swap
    assert (
        "3 layers were refitted to these targets; "
        "the outputs are wrong until you call swap_targets(model)."
    ) in found.notes
    assert found.rows[-1].divergence < 0.1
    assert divergence(swap_targets(model)) == pytest.approx(found.rows[-1].divergence, rel=0.5)
    assert "swap_targets" not in str(match_targets(converted(), [data()]))


def test_a_network_that_is_swapped_first_is_refitted_to_the_same():
    first, later = converted(), converted()
    found = match_targets(swap_targets(first), [data()], refit=True)
    match_targets(later, [data()], refit=True)
    state, other = first.state_dict(), swap_targets(later).state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state if "log_alpha" not in k)
    assert not found.needs_swap
    assert "3 layers were refitted to these targets." in found.notes


def test_rows_are_in_the_order_of_execution_and_say_how_well_it_went():
    model = converted()
    found = match_targets(model, data().split(128), logits=True)
    assert [row.path for row in found] == ["1.act_0", "1.act_1", "1.gelu_0", "5"]
    assert all(0.5 < row.r2 <= 1 and row.periods > 0 for row in found)
    divergences = [row.divergence for row in found]
    assert (
        divergences[0] < divergences[-1] == pytest.approx(divergence(swap_targets(model)), rel=0.5)
    )
    heading = " ".join(str(found).splitlines()[0].split())
    assert heading == "path where source target R2 periods range outside output error KL"


def test_the_report_has_the_error_of_each_output_and_no_divergence_of_what_is_no_logits():
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.act = nn.Linear(4, 8), nn.ReLU()
            self.energy, self.classes = nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.act(self.body(x))
            return 1000 * self.energy(x) - 5000, self.classes(x).softmax(1)

    torch.manual_seed(0)
    original, x = TwoHeads().eval(), torch.randn(256, 4)
    model = convert(copy.deepcopy(original), "sin", example_input=x)
    (row,) = match_targets(model, [x])
    assert row.divergence is None
    with torch.no_grad():
        some = x[:128]  # so many take half a forward pass of all inputs
        pairs = zip(swap_targets(model)(some), original(some), strict=True)
        expected = [
            ((now - y).square().sum() / (y - y.mean(0)).square().sum()).item() for now, y in pairs
        ]
    assert row.errors == {str(i): pytest.approx(e, rel=1e-3) for i, e in enumerate(expected)}


def test_batches_of_any_size_give_the_same_fit():
    models = [converted(), converted(), converted()]
    for model, size in zip(models, (512, 128, 100), strict=True):
        match_targets(model, data().split(size))
    for other in models[1:]:
        for (_, one), (_, two) in zip(*map(gated_activations, (models[0], other)), strict=True):
            torch.testing.assert_close(one.fitted.state_dict(), two.fitted.state_dict(),
                                       rtol=1e-3, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_parameters_are_shared_as_the_gates_are(granularity):
    model = converted(granularity=granularity)
    match_targets(model, data().split(128))
    for _, unit in gated_activations(model):
        assert unit.fitted.a.shape == unit.gate.shape
    assert divergence(swap_targets(model)) < 0.5


def test_the_first_site_is_the_least_squares_fit_of_its_source(monkeypatch):
    monkeypatch.setattr("transfer_surgery.matching.one_pass.RIDGE", 0.0)
    model = converted()
    match_targets(model, [data()])
    unit = model[1].act_0
    with torch.no_grad():
        block = model[1].eval()
        x = block.bn(block.conv1(model[0](data())))
        a, w, c, b = unit.fitted.expand(x)
        here = (a * torch.sin(w * x + c) + b - x.relu()).square().mean()
        for name in "awcb":
            value = getattr(unit.fitted, name)
            for step in (0.01, -0.01) if name != "w" else ():
                value.data += step
                a, w, c, b = unit.fitted.expand(x)
                assert (a * torch.sin(w * x + c) + b - x.relu()).square().mean() > here
                value.data -= step


def test_only_chosen_sites_are_matched():
    model = converted()
    found = match_targets(model, [data()], exclude="1.gelu_0")
    assert [row.path for row in found] == ["1.act_0", "1.act_1", "5"]
    assert model[1].gelu_0.fitted is None
    with pytest.raises(ValueError, match="'2' matches none of the 4 sites"):
        match_targets(model, [data()], include="2")


def test_a_site_that_does_not_run_in_evaluation_is_listed():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.act, self.aux = nn.Linear(4, 3), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.head(self.act(x))
            return y + F.gelu(self.aux(x)) if self.training else y

    model = convert(Auxiliary(), example_input=torch.zeros(2, 4))
    found = match_targets(model, [torch.randn(64, 4)])
    assert [(row.path, row.r2 is None) for row in found] == [("act", False), ("gelu_0", True)]
    assert "not run" in str(found)


def test_a_site_that_only_later_batches_come_to_is_warned_of():
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.act, self.further = nn.Linear(4, 3), nn.ReLU(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.act(F.gelu(self.further(x)) if len(x) > 50 else x))

    model = convert(Long(), example_input=torch.zeros(60, 4))
    with pytest.warns(MatchWarning, match=r"than the first come to a site.* at gelu_0 "):
        found = match_targets(model, [torch.randn(40, 4), torch.randn(60, 4)])
    assert [row.values for row in found] == [100, 0]


@pytest.mark.parametrize("refit", [False, True])
def test_a_failure_leaves_the_model_as_it_was(refit, monkeypatch):
    model = converted()
    before = copy.deepcopy(model.state_dict())

    def fail_late(self, *args):
        if unit.fitted is not None:
            raise RuntimeError("late")
        return solve(self, *args)

    unit, solve = model[1].gelu_0, TargetFit.solve
    monkeypatch.setattr(TargetFit, "solve", fail_late)
    with pytest.raises(RuntimeError, match="late"):
        match_targets(model, [data()], refit=refit)
    assert_same_bits(model, before)


def test_gates_are_transferred_softly_to_matched_targets():
    model = converted()
    match_targets(model, data().split(128))
    optimizer = wrap_optimizer(
        torch.optim.SGD(model.parameters(), lr=1e-4), model, transfer=TransferSchedule(20)
    )
    original, x = network().eval(), data()
    model.eval()  # dropout is not what is looked at
    for _ in range(20):
        for _, unit in gated_activations(model):
            unit.train()
        loss = F.mse_loss(model(x), original(x))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((unit.gate.predict() == 0).all() for _, unit in gated_activations(model))
    assert divergence(model) < 0.1 * divergence(swap_targets(converted()))


SLOW = [pytest.param(f"test_{n}", marks=pytest.mark.slow)
        for n in ("resnet", "convnext", "efficientnet")]  # fmt: skip


@pytest.mark.parametrize("name", ["test_vit", *SLOW])
def test_models_of_timm_are_matched(name):
    model = timm.create_model(name, num_classes=5).eval()
    size = 64 if name == "test_resnet" else 160
    x = torch.randn(32, 3, size, size)  # fewer than 30 values per gate are warned about
    before = model(x[:4])
    convert(model, target="sin")
    found = match_targets(model, x.split(8))
    assert torch.equal(model(x[:4]), before)
    assert all(row.r2 > 0.5 for row in found)
    swapped = bake(swap_targets(model))(x[:4])
    assert (swapped - before).square().mean() < 0.2 * before.square().mean() + 1e-4


def test_the_range_of_a_site_is_that_of_all_values_and_not_of_the_sample(monkeypatch):
    monkeypatch.setattr(samples, "VALUES", 50)
    x = torch.randn(5000, 4)
    model = convert(nn.Sequential(nn.ReLU()), "polynomial(degree=4)", example_input=x)
    (row,) = match_targets(model, list(x.split(1000)))
    assert row.range == (x.min().item(), x.max().item())
    for channel, (w, c) in enumerate(zip(model[0].fitted.w, model[0].fitted.c, strict=True)):
        ends = w * torch.stack(x[:, channel].aminmax()) + c
        torch.testing.assert_close(ends, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("target", ["polynomial", "square"])
def test_nearly_straight_parabolas_can_be_trained(target):
    """Written by their vertex, a step of 0.001 would change their amplitude by itself."""
    torch.manual_seed(0)
    x = torch.randn(500, 4) + 6  # relu is the identity there
    model = convert(nn.Sequential(nn.ReLU(), nn.Linear(4, 1)), target, include="0", example_input=x)
    match_targets(model, [x])
    swap_targets(model)
    wanted = x.sum(1, keepdim=True).sin()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(50):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert max(losses) < 2 * losses[0]
