"""The models that break surgery elsewhere, one reason each: unchanged, trainable, bakeable."""

import pytest
import timm
import torch
import torchvision
from torch.utils._pytree import tree_leaves

from transfer_surgery import bake, convert, find_activations
from transfer_surgery.units import gated_activations


def _boxes():
    targets = [{"boxes": torch.tensor([[9.0, 9.0, 60.0, 70.0]]), "labels": torch.ones(1).long()}]
    return [torch.rand(3, 128, 160), torch.rand(3, 160, 128)], targets * 2


def _faster_rcnn():
    options = {"min_size": 128, "max_size": 160, "box_score_thresh": 0.0}
    return torchvision.models.get_model(
        "fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None, **options
    )


# name: (how it is built, arguments, converted sites, what is hard about it)
HARD = {
    "hrnet_w18": (96, 284, "changes a list while it runs"),
    "efficientvit_b1": (96, 46, "a branch on the device"),
    "bat_resnext26ts": (256, 59, "control flow in attention"),
    "dm_nfnet_f0": (96, 64, "F.gelu inside a module with a gain"),
    "res2net50_26w_4s": (96, 81, "one ReLU for branches of different width"),
    "coat_tiny": (224, 14, "whole blocks called several times"),
    "resnetv2_50d_evos": (96, 51, "the activation is inside the norm"),
    "resnetv2_50d_frn": (96, 51, "the activation is a maximum inside the norm"),
    "sequencer2d_s": (224, 18, "LSTMs"),
    "mobilevitv2_050": (96, 34, "relu(v) * context in attention"),
    "convit_tiny": (224, 12, "sigmoids of parameters"),
    "ghostnetv2_100": (96, 42, "gates that eval does not call"),
}
OTHERS = {
    "torchvision fasterrcnn_resnet50_fpn": (_faster_rcnn, _boxes, 52),
    "torchvision raft_small": (
        lambda: torchvision.models.get_model("raft_small"),
        lambda: (torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128)),
        58,
    ),
}
CASES = OTHERS | {
    name: (
        lambda name=name: timm.create_model(name),
        lambda size=size: (torch.randn(2, 3, size, size),),
        sites,
    )
    for name, (size, sites, _) in HARD.items()
}

# They take 5 to 15 seconds each; what is hard about them is in smaller networks of these tests too.
SLOW = {
    "hrnet_w18",
    "dm_nfnet_f0",
    "resnetv2_50d_evos",
    "resnetv2_50d_frn",
    "sequencer2d_s",
    "torchvision fasterrcnn_resnet50_fpn",
}


@torch.no_grad()
def _wake(model):
    """Noise on constant weights: what starts as zero would hide what it multiplies."""
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _loss(output):
    return sum(x.square().mean() for x in tree_leaves(output) if x.is_floating_point())


@torch.no_grad()
def _predict(model, arguments):
    torch.manual_seed(0)
    return [x for x in tree_leaves(model.eval()(*arguments)) if isinstance(x, torch.Tensor)]


def _same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_a_hard_model_converts_unchanged_trains_and_bakes(name):
    build, arguments, sites = CASES[name]
    model, arguments = _wake(build()), arguments()
    before = _predict(model, arguments)
    plan = find_activations(model, arguments)
    convert(model, plan=plan)
    units = dict(gated_activations(model))
    assert len(units) == sites
    assert _same(_predict(model, arguments), before)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    _loss(model.train()(*arguments)).backward()
    called = {site.path for site in plan if "train" in site.modes}
    for path, unit in units.items():
        if path in called:
            assert unit.log_alpha.grad is not None, path
            assert unit.log_alpha.grad.isfinite().all(), path
    optimizer.step()

    for unit in units.values():
        unit.log_alpha.data.copy_(torch.randn_like(unit.log_alpha).sign() * 8)
    gated = _predict(model, arguments)
    assert not _same(gated, before)
    assert _same(_predict(bake(model), arguments), gated)


def test_a_site_in_torchvision_is_known_by_its_place_in_the_code():
    plan = find_activations(torchvision.models.resnet18(), torch.zeros(2, 3, 64, 64))
    functions = {site.key.location[0][0] for site in plan if site.way == "edit"}
    assert functions == {"BasicBlock.forward"}
