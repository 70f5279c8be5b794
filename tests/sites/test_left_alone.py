"""Examining a model leaves the model, and what its code keeps outside of it, as they were."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X
from transfer_surgery import find_activations


class Frozen(nn.Sequential):
    """Its copies are, or have the parts of, itself."""

    def __init__(self, copied):
        super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
        self.copied = copied
        self.register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return F.gelu(super().forward(x)) if x.sum() < 1e9 else x

    def __deepcopy__(self, memo):
        return self.copied(self)


def _everything(model):
    held = [(module, dict(vars(module))) for module in model.modules()]
    tables = [{n: dict(v) for n, v in h.items() if isinstance(v, dict)} for _, h in held]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    return (held, tables, grads), [x.clone() for x in model.state_dict().values()]


@pytest.mark.parametrize("copied", [lambda module: module, copy.copy])
def test_modules_that_copies_share_are_copied_all_the_same(copied):
    model = nn.Sequential(Frozen(copied).requires_grad_(False), nn.ReLU()).eval()
    parts, values = _everything(model)
    assert [site.path for site in find_activations(model, X)] == ["0.gelu_0", "1"]
    now, new = _everything(model)
    assert now == parts
    assert all(map(torch.equal, new, values))
