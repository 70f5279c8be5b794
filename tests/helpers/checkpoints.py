"""Small networks with gates in files, and what a refused load must not change; for tests."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import units
from transfer_surgery import convert, load_gates, register_activation, save_gates

X = torch.linspace(-3, 3, 2 * 4).reshape(2, 4)


@contextmanager
def full_disk():
    """Files end after 100 bytes, as far as this process writes them."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def register_bump():
    """Registers the activation `bump`, whose options are of every kind; for `own_registry`."""

    @register_activation("bump")
    def bump(x, width=1.0, mode="plain", limits=(0, 1), top=float("inf")):
        return torch.exp(-((x / width) ** 2)).clamp(max=top)


class Calls(nn.Linear):
    """Two functions in one forward: it is edited."""

    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x):
        x = F.relu(x)
        return F.gelu(super().forward(x))


class CallsOneMore(Calls):
    """The same after an edit: what was relu_0 is relu_1 now."""

    def forward(self, x):
        x = F.relu(x + 0.5)
        x = F.relu(x)
        return F.gelu(nn.Linear.forward(self, x))


class WhenTraining(nn.Module):
    """Its calls come in another order in training."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            x = F.relu(self.b(x))
        return F.relu(self.a(x))


def chain(*middle):
    return nn.Sequential(nn.Linear(4, 6), *(middle or (nn.ReLU(),)), nn.Linear(6, 2))


def spread(model, seed=1):
    """Gates everywhere between source and target."""
    generator = torch.Generator().manual_seed(seed)
    for unit in units(model).values():
        for tensor in (*unit.gate.parameters(), *unit.gate.buffers()):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator).mul(3).abs())
    return model


def saved(file, model=None, **options):
    model = convert(chain() if model is None else model, example_input=X, **options)
    save_gates(spread(model), file)
    return model


def everything(model):
    """What must not change when a load fails: objects, classes and values."""
    state = model.state_dict(keep_vars=True)
    return (
        {id(m): (type(m), list(m._modules.values())) for m in model.modules()},
        [(name, id(tensor), tensor.detach().clone().tolist()) for name, tensor in state.items()],
    )


def refuses(error, match, model, file, **options):
    before, random = everything(model), torch.get_rng_state()
    with pytest.raises(error, match=match) as caught:
        load_gates(model, file, **({"example_input": X} | options))
    assert everything(model) == before
    assert torch.equal(torch.get_rng_state(), random)
    return str(caught.value)
