"""Activations of parts of a tensor that is written to: torch rounds by how values lie in memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import bake, convert
from transfer_surgery.units import gated_activations


class Parts(nn.Module):
    def __init__(self, axis):
        super().__init__()
        self.linear, self.axis = nn.Linear(6, 6), axis

    def forward(self, x):
        h = self.linear(x)
        first, second, last = h.narrow(self.axis, 0, 2), h.narrow(self.axis, 2, 3), h[:, 5:]
        first.copy_(F.gelu(first))
        F.silu(second, inplace=True)
        return h + F.softplus(last.expand_as(h)) - 0.1


@pytest.mark.parametrize("axis", [0, 1])
@torch.no_grad()
def test_slices_that_are_overwritten_keep_every_bit(axis):
    torch.manual_seed(0)
    x = torch.randn(501, 6)
    model = Parts(axis)
    wanted = model(x)
    convert(model, "tanh", example_input=x)
    assert len(list(gated_activations(model))) == 3
    assert torch.equal(model(x), wanted)
    for _, unit in gated_activations(model):
        unit.log_alpha.fill_(-8.0)
    gated = model.eval()(x)
    assert not torch.equal(gated, wanted)
    assert torch.equal(bake(model)(x), gated)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), gated)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), gated)
