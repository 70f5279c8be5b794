"""`TransferSchedule(order=...)`: who goes first, while all gates together keep to the budget."""

import itertools
import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    convert,
    structural_risk,
    wrap_optimizer,
)
from transfer_surgery.transfer.schedule import groups_in_order, split_in_order
from transfer_surgery.units import gated_activations

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Functional(nn.Module):
    """Its sites have no stages, and run in another order than their names say."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.ReLU()
        self.convolution = nn.Conv2d(3, 5, 3)
        self.linear = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.convolution(x)).mean((2, 3))
        return self.last(nn.functional.gelu(self.linear(x)))


def names(groups: list[list[GatedActivation]]) -> list[list[str]]:
    return [[unit.path for unit in group] for group in groups]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return convert(timm.create_model("resnet18"))


def test_a_zoo_model_goes_stage_by_stage(resnet: nn.Module) -> None:
    model = dict(gated_activations(resnet))
    stages = ["act1", "layer1", "layer2", "layer3", "layer4"]
    forward = names(groups_in_order(model, "front_to_back"))
    assert [{p.split(".")[0] for p in group} for group in forward] == [{s} for s in stages]
    (joint,) = names(groups_in_order(model, "joint"))
    assert [path for group in forward for path in group] == joint
    assert names(groups_in_order(model, "back_to_front")) == forward[::-1]


def test_a_network_without_stages_goes_site_by_site_as_it_runs() -> None:
    model = convert(nn.Sequential(Functional()), example_input=X, roles=("hidden", "output"))
    found = names(groups_in_order(dict(gated_activations(model)), "front_to_back"))
    assert found == [["0.tanh_0"], ["0.gelu_0"], ["0.last"]]


def test_globs_say_who_goes_with_whom(resnet: nn.Module) -> None:
    model = dict(gated_activations(resnet))
    groups = names(groups_in_order(model, ["layer3", "*.act2", "*"]))
    assert all(path.startswith("layer3.") for path in groups[0])
    assert groups[1] == [p for p in model if p.endswith("act2") and not p.startswith("layer3")]
    assert sum(len(group) for group in groups) == len(model)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (["layer5", "*"], "order: 'layer5' matches none of the sites that are left: act1, "),
        (["*", "layer1"], "order: 'layer1' matches none of the sites that are left"),
        (["layer1"], r"order: no glob matches act1, .*; add '\*' as the last one"),
    ],
)
def test_globs_that_do_not_fit_are_errors_and_leave_the_optimizer_alone(
    resnet: nn.Module, order: list[str], message: str
) -> None:
    optimizer = SGD(resnet.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        wrap_optimizer(optimizer, resnet, transfer=TransferSchedule(10, order=order))
    assert len(optimizer.param_groups) == 1


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=6),
    st.floats(0.01, 1),
    st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_shares_add_up_to_the_joint_transfer_and_come_one_after_the_other(
    sizes: list[int], fraction: float, moments: list[float]
) -> None:
    going = math.ceil(fraction * sum(sizes) - 1e-6)
    before = [0.0] * len(sizes)
    for progress in sorted(moments):
        found = split_in_order(sizes, fraction, progress)
        gone = [size * share * done for size, (share, done) in zip(sizes, found, strict=True)]
        assert sum(gone) == pytest.approx(going * progress, abs=1e-6)
        for (_, done), (_, then) in itertools.pairwise(found):
            assert done == pytest.approx(1) or then == 0
        assert all(now >= then - 1e-9 for now, then in zip(gone, before, strict=True))
        before = gone


@pytest.mark.parametrize(
    ("order", "fraction"),
    [
        ("joint", 0.6),
        ("front_to_back", 0.6),
        ("back_to_front", 0.6),
        ("back_to_front", 1.0),
        (["2.*", "*"], 1.0),
    ],
)
def test_all_gates_together_keep_to_the_budget_in_any_order(
    order: str | list[str], fraction: float
) -> None:
    torch.manual_seed(0)
    widths = [3, 20, 8, 30, 2]
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    model = convert(
        nn.Sequential(*layers), example_input=torch.zeros(1, 3), roles=("hidden", "output")
    )
    schedule = TransferSchedule(40, order=order, fraction=fraction, start=4, end=0.9)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for step in range(1, 41):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert structural_risk(model, "mean").item() == pytest.approx(
            schedule.budget(step), abs=1e-3
        )
        groups = groups_in_order(dict(gated_activations(model)), order)
        for earlier, later in itertools.pairwise(groups):
            begun = any(bool((unit.gate.predict() < 1).any()) for unit in later)
            done = all(bool((unit.gate.predict() == 0).all()) for unit in earlier)
            assert done or not begun
    z = torch.cat([unit.gate.predict() for group in groups for unit in group])
    assert int((z == 0).sum()) == math.ceil(fraction * len(z) - 1e-6)
    assert int((z == 1).sum()) == len(z) - int((z == 0).sum())
    # Those that come last are kept.
    if order in ("front_to_back", "back_to_front") and fraction < 1:
        assert bool((torch.cat([u.gate.predict() for u in groups[-1]]) == 1).any())
        assert bool((torch.cat([u.gate.predict() for u in groups[0]]) == 0).all())


def test_two_converted_networks_in_one_model_go_one_after_the_other() -> None:
    parts = [
        convert(
            nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.GELU())),
            example_input=torch.zeros(1, 4),
            roles=("hidden", "output"),
        )
        for _ in range(2)
    ]
    both = dict(gated_activations(nn.Sequential(*parts)))
    found = groups_in_order(both, "front_to_back")
    names_of = {id(unit): path for path, unit in both.items()}
    assert [[names_of[id(u)] for u in g] for g in found] == [["0.0"], ["0.1.1"], ["1.0"], ["1.1.1"]]


def test_the_order_is_that_of_the_model_inside_any_wrapper(resnet: nn.Module) -> None:
    def order(model: nn.Module, *globs: str) -> list[list[str]]:
        return names(groups_in_order(dict(gated_activations(model)), globs or "front_to_back"))

    for wrapper in (nn.Sequential(nn.Sequential(resnet)), nn.DataParallel(resnet)):
        assert order(wrapper) == order(resnet)
    # Globs may be those of the model, or of what wraps it.
    expected = order(resnet, "layer3", "*")
    assert order(wrapper, "layer3", "*") == order(wrapper, "module.layer3", "*") == expected
