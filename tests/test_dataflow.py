"""Who shares a parameter, and what follows for the layers that may get new weights."""

from torch import nn

from transfer_surgery.matching.refit.refit_rules import layers_to_refit
from transfer_surgery.surgery import sharing_parameters


def test_a_layer_that_shares_its_weight_with_any_module_is_not_refitted():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5))
    assert layers_to_refit(model) == ([model[1], model[3]], {})
    model[3].weight = model[0].weight
    assert sharing_parameters(model) == {model[0], model[3]}
    assert layers_to_refit(model) == ([model[1]], {model[3]: "shares a parameter"})
