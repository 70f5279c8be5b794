"""The same patterns select sites before the conversion and units after it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import convert, find_activations
from transfer_surgery.units import select_units

X = torch.zeros(2, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(F.relu(self.linear(x)))


def network() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), nn.ReLU())


PATTERNS = {
    "a path": (lambda m: "1.act", ["1.act"]),
    "all below a path": (lambda m: "0", ["0.act", "0.relu_0"]),
    "a glob": (lambda m: "*.relu_*", ["0.relu_0", "1.relu_0"]),
    "a caller's type": (lambda m: Block, ["0.act", "0.relu_0", "1.act", "1.relu_0"]),
    "an activation's type": (lambda m: nn.ReLU, ["2"]),
    "a module": (lambda m: m[1], ["1.act", "1.relu_0"]),
    "the model": (lambda m: m, ["0.act", "0.relu_0", "1.act", "1.relu_0", "2"]),
    "a predicate": (lambda m: lambda one: one.source.name == "tanh", ["0.act", "1.act"]),
    "several": (lambda m: ["1", nn.ReLU], ["1.act", "1.relu_0", "2"]),
}


@pytest.mark.parametrize(("pattern", "paths"), PATTERNS.values(), ids=PATTERNS)
def test_a_pattern_selects_the_same_sites_and_units(pattern, paths):
    model = convert(network(), example_input=X)
    assert sorted(select_units(model, include=pattern(model))) == paths
    left = sorted(set(select_units(model)) - set(paths))
    if left:
        assert sorted(select_units(model, exclude=pattern(model))) == left
    model = network()
    convert(model, example_input=X, include=pattern(model))
    assert sorted(select_units(model)) == paths


@pytest.mark.parametrize("pattern", ["3", nn.GELU, lambda one: False])
def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_sites(pattern):
    message = r"include=.* matches none of the 5 sites: 0\.relu_0, 0\.act, "
    with pytest.raises(ValueError, match=message):
        find_activations(network(), X).select(include=pattern)
    with pytest.raises(ValueError, match=r"exclude=.* matches none of the 5 sites: 0"):
        select_units(convert(network(), example_input=X), exclude=pattern)


def test_a_module_of_another_model_is_refused():
    for call in (
        lambda: convert(network(), example_input=X, include=nn.ReLU()),
        lambda: find_activations(network(), X).select(include=nn.ReLU()),
        lambda: select_units(convert(network(), example_input=X), nn.ReLU()),
    ):
        with pytest.raises(ValueError, match=r"the pattern ReLU\(\.\.\.\) is not a module of the"):
            call()
