"""The last layer of a residual block is refitted to the sum, which the shortcut's error is in."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.matching.test_one_pass import refitted
from transfer_surgery import convert, match_targets, swap_targets
from transfer_surgery.matching.two_networks.probe import probe

WIDTH, BATCH = 6, 200


class Block(nn.Module):
    """Two layers and a shortcut; `way` says how the second one's output comes to the sum."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 0.3, 1.0, 0.7]))
        self.other, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode() if self.way == "frozen" else nullcontext():
            y = self.last(F.relu(self.first(x)))
        match self.way:
            case "plain" | "frozen":
                return x + y
            case "in place":
                y = F.dropout(y, training=self.training)
                y += x
                return y
            case "scaled":
                return torch.add(self.scale * y, x)
            case "late shortcut":
                return y.add_(x * 0.5)
            case "moved":  # positions and channels of a layout that no rule foresees
                return (self.scale * y).roll(3, 0).view(-1, 2, 4, WIDTH).transpose(1, 2) + (
                    x.roll(3, 0).view(-1, 2, 4, WIDTH).transpose(1, 2)
                )
            case "read twice":
                return (x + y) * y.sigmoid()
            case "layer behind":
                return self.other(F.relu(x)) * 0 + (x + y) + self.other(y)
            case "not linear":
                return x + torch.tanh(y)
            case "mixed":
                return x + self.norm(y)
            case "by example":
                return x + y * x.mean(-1, keepdim=True)
            case "overwritten input":
                h = F.relu(self.first(x))
                y = self.last(h)
                h.zero_()
                return x + y
        raise AssertionError(self.way)


class Network(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(WIDTH, WIDTH), Block(way), nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(F.relu(self.stem(x))))


def matched(way: str) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The original network and a refitted one, in float64, and their inputs."""
    torch.manual_seed(0)
    model, x = Network(way).double().eval(), torch.randn(3 * BATCH, WIDTH, dtype=torch.float64)
    found = convert(copy.deepcopy(model), "sin", example_input=x)
    match_targets(found, x.split(BATCH), refit=True)
    return model, swap_targets(found), x


def inside(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes into the block, and what comes into its last layer."""
    seen = {}
    block = model.block
    handles = [
        block.register_forward_pre_hook(lambda m, args: seen.update(block=args[0].clone())),
        block.last.register_forward_pre_hook(lambda m, args: seen.update(last=args[0].clone())),
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen["block"], seen["last"]


@pytest.mark.parametrize(
    ("way", "shortcut"),
    [
        ("plain", 1),
        ("in place", 1),
        ("scaled", 1),
        ("late shortcut", 0.5),
        ("frozen", 1),
        ("moved", 1),
    ],
)
def test_the_last_layer_makes_up_for_the_error_of_the_shortcut(way, shortcut):
    model, found, x = matched(way)
    (x_before, h_before), (x_now, h_now) = inside(model, x), inside(found, x)
    scale = model.block.scale.detach() if way in ("scaled", "moved") else 1.0
    last = model.block.last
    with torch.no_grad():
        wanted = last(h_before) + shortcut * (x_before - x_now) / scale
    best = refitted(last, h_now, wanted, BATCH)
    rows = [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(found.block.last.weight.T.detach(), best[rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.block.last.bias.detach(), best[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["read twice", "not linear", "mixed", "by example"])
def test_without_a_plain_sum_a_layer_is_fitted_to_what_it_gave(way):
    model, found, x = matched(way)
    (_, h_before), (_, h_now) = inside(model, x), inside(found, x)
    best = refitted(model.block.last, h_now, model.block.last(h_before).detach(), BATCH)
    torch.testing.assert_close(found.block.last.bias.detach(), best[-1], rtol=1e-4, atol=1e-5)


def test_a_branch_that_a_scale_of_0_switches_off_stays_finite():  # as blocks begin in timm
    model, x = Network("scaled").eval(), torch.randn(BATCH, WIDTH)
    model.block.scale.data.zero_()
    match_targets(convert(model, "sin", example_input=x), [x], refit=True)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("way", ["read twice", "layer behind", "overwritten input"])
def test_a_layer_whose_output_goes_elsewhere_has_no_sum(way):
    model = Network(way)
    x = torch.randn(4, WIDTH)
    layers = [model.block.last]
    modules = [*layers, model.block.other]
    with torch.no_grad():
        seen = probe(model, modules, layers, lambda: model(x))
    assert not seen.sums
