"""What every converted model promises, checked on one model at a time; shared by several tests."""

import copy
import dataclasses
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from transfer_surgery import GatedActivation, bake, convert, revert

X = torch.linspace(-3, 3, 2 * 4).reshape(2, 4)


def tensors(output):
    if dataclasses.is_dataclass(output):
        output = vars(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def same(ones, others):
    return len(ones) == len(others) and all(map(torch.equal, ones, others))


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def units(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, GatedActivation)}


@torch.no_grad()
def assert_every_promise(
    model, *args, example=None, copies=(copy.deepcopy, through_pickle), **kwargs
):
    """Unchanged outputs, gates that all count, copies, bake and revert; returns it converted."""
    run = functools.partial(lambda net: tensors(net(*copy.deepcopy(args), **kwargs)))
    kinds, before = [type(m) for m in model.eval().modules()], run(model)
    keys = list(model.state_dict())
    convert(model, example_input=(kwargs or args) if example is None else example)
    assert same(run(model), before)
    for duplicate in copies:
        assert same(run(duplicate(model)), before)
    assert units(model)
    for path, unit in units(model).items():
        start = unit.log_alpha.clone()
        unit.log_alpha.fill_(-8.0)
        assert not same(run(model), before), f"{path} has no effect"
        unit.log_alpha.copy_(start)
    clone = copy.deepcopy(model)
    for unit in units(clone).values():
        unit.log_alpha.fill_(-8.0)
    moved = run(clone)
    assert same(run(bake(clone)), moved)
    assert not units(clone)
    clone = revert(copy.deepcopy(model))
    assert same(run(clone), before)
    assert list(clone.state_dict()) == keys
    assert [type(m).__name__ for m in clone.modules()] == [kind.__name__ for kind in kinds]
    return model


def assert_refused(model, error, message, example=X):
    """A clear error, and nothing of the model is changed."""

    def describe():
        modules = {id(m): (type(m), set(vars(m))) for m in model.modules()}
        return modules, [
            (key, id(value)) for key, value in model.state_dict(keep_vars=True).items()
        ]

    before = describe()
    with pytest.raises(error, match=message):
        convert(model, example_input=example)
    assert describe() == before


class Body(nn.Module):
    """A child and a function: one activation module at two places makes it be rewritten."""

    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x):
        return self.act(F.gelu(self.linear(self.act(x))) - 0.1)
