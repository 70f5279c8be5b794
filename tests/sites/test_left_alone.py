"""Examining a model leaves the model, and what its code keeps outside of it, as they were."""

import copy
import functools
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.promises import X
from transfer_surgery import find_activations
from transfer_surgery.sites.surroundings import Surroundings


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


CACHE: dict[int, torch.Tensor] = {}
STATE = {"mask": None}
LAST = None
EACH = []


class Holder:
    mask = None


HOLDER = Holder()


@functools.lru_cache
def in_a_cache(x):
    return torch.full((x.shape[-1],), 2.0)


def in_a_dict(x):
    if x.shape[-1] not in CACHE:
        CACHE[x.shape[-1]] = torch.full((x.shape[-1],), 2.0)
    return CACHE[x.shape[-1]]


def in_an_entry(x):
    if STATE["mask"] is None:
        STATE["mask"] = (torch.full((x.shape[-1],), 2.0),)
    return STATE["mask"][0]


def in_a_global(x):
    global LAST
    if LAST is None:
        LAST = torch.full((x.shape[-1],), 2.0)
    return LAST


def in_a_class(x):
    if Holder.mask is None:
        Holder.mask = torch.full((x.shape[-1],), 2.0)
    return Holder.mask


def in_an_object(x):
    if HOLDER.mask is None:
        HOLDER.mask = torch.full((x.shape[-1],), 2.0)
    return HOLDER.mask


def in_a_default(x, kept={}):  # noqa: B006
    return kept.setdefault("mask", torch.full((x.shape[-1],), 2.0))


def in_an_attribute(x):
    if not hasattr(in_an_attribute, "mask"):
        in_an_attribute.mask = torch.full((x.shape[-1],), 2.0)
    return in_an_attribute.mask


def in_a_list(x):
    EACH.append(x * 2)
    return EACH[-1] / x


def _in_a_cell():
    mask = None

    def in_a_cell(x):
        nonlocal mask
        mask = torch.full((x.shape[-1],), 2.0) if mask is None else mask
        return mask

    return in_a_cell


in_a_cell = _in_a_cell()


WAYS = {
    way.__name__: way
    for way in (in_a_dict, in_an_entry, in_a_global, in_a_class, in_an_object, in_a_default)
} | {"an attribute": in_an_attribute, "a list": in_a_list, "a cell": in_a_cell, "lru": in_a_cache}


class Masked(nn.Module):
    def __init__(self, way, reads_values):
        super().__init__()
        self.linear, self.way, self.reads_values = nn.Linear(4, 4), way, reads_values

    def forward(self, x):
        y = F.relu(self.linear(x)) * WAYS[self.way](x)
        return y if not self.reads_values or float(y.detach().sum()) < 1e9 else -y


@pytest.mark.parametrize("reads_values", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_caches_of_the_models_code_are_as_they_were(way, reads_values):
    model = Masked(way, reads_values)
    assert [site.path for site in find_activations(model, X)] == ["relu_0"]
    assert CACHE == vars(HOLDER) == vars(in_an_attribute) == in_a_default.__defaults__[0] == {}
    assert STATE["mask"] is LAST is Holder.mask is in_a_cell.__closure__[0].cell_contents is None
    assert EACH == []
    assert in_a_cache.cache_info().currsize == 0
    before = Surroundings(model)
    assert type(model(X)) is torch.Tensor
    before.put_back()


class Slots:
    __slots__ = ("mask",)


SLOTS = Slots()


def test_a_tensor_without_values_that_cannot_be_removed_is_an_error_that_names_its_holder():
    class Net(nn.Module):
        def forward(self, x):
            SLOTS.mask = torch.ones(4)
            return F.relu(x) * SLOTS.mask

    with pytest.raises(RuntimeError, match=r"without values.* into Slots, from where"):
        find_activations(Net(), X)


@pytest.mark.parametrize("way", ["usual", "in_place"])
def test_a_usual_model_needs_no_search_for_what_is_left(monkeypatch, way):
    searches = []
    inplace = way == "in_place"
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.GELU())
    monkeypatch.setattr(gc, "collect", lambda *age: searches.append(age))
    find_activations(layers, torch.randn(1, 3, 4, 4))
    assert searches == []
