"""Real timm and torchvision models: complete, bit-identical, trainable, bakeable.

`benchmarks/zoo_coverage.py` checks the same for every model of the zoos; here are networks that are
unlike each other, and those that break surgery elsewhere. Each is built and planned once.
"""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch.utils._pytree import tree_leaves

from transfer_surgery import bake, convert, find_activations, revert
from transfer_surgery.units import gated_activations

# Calls in eval mode; measured independently where the model is in the zoo's oracle.
CALLS = {
    "timm:resnet18": 17,
    "timm:efficientnet_b0": 65,
    "timm:convnext_tiny": 18,
    "timm:vit_tiny_patch16_224": 12,
    "timm:swin_tiny_patch4_window7_224": 12,
    "timm:levit_128s": 25,
    "torchvision:densenet121": 121,
    "torchvision:googlenet": 57,
    "torchvision:mobilenet_v3_small": 42,
    "timm:resnet50d": 51,
    "timm:mobilenetv3_large_100": 48,
    "torchvision:resnet50": 49,
    "torchvision:inception_v3": 94,
}
# Converted sites, and what is hard about the model.
HARD = {
    "timm:hrnet_w18": (284, "changes a list while it runs"),
    "timm:efficientvit_b1": (46, "a branch on the device"),
    "timm:bat_resnext26ts": (59, "control flow in attention"),
    "timm:dm_nfnet_f0": (64, "F.gelu inside a module with a gain"),
    "timm:res2net50_26w_4s": (81, "one ReLU for branches of different width"),
    "timm:coat_tiny": (14, "whole blocks called several times"),
    "timm:sequencer2d_s": (18, "LSTMs"),
    "timm:mobilevitv2_050": (34, "relu(v) * context in attention"),
    "timm:convit_tiny": (12, "sigmoids of parameters"),
    "timm:ghostnetv2_100": (42, "gates that eval does not call"),
    "torchvision:raft_small": (58, "two images, and a loop"),
    "torchvision:fasterrcnn_resnet50_fpn": (52, "lists of images, and targets in training alone"),
}
# They take 3 to 15 seconds each; what is hard about them is in smaller networks of these tests too.
SLOW = {
    *("torchvision:densenet121", "torchvision:googlenet", "timm:bat_resnext26ts"),
    *("timm:res2net50_26w_4s", "timm:mobilevitv2_050", "timm:convit_tiny"),
    *("timm:resnet50d", "timm:mobilenetv3_large_100", "torchvision:resnet50"),
    *("torchvision:inception_v3", "timm:hrnet_w18", "timm:dm_nfnet_f0"),
    *("timm:sequencer2d_s", "torchvision:fasterrcnn_resnet50_fpn"),
}
# Others that are like them stand for these in CI.
LONG = {"timm:resnet50d", "timm:mobilenetv3_large_100", "torchvision:resnet50"}
BFLOAT16 = ("timm:resnet18", "timm:convnext_tiny", "torchvision:mobilenet_v3_small")
SIZES = {"timm:bat_resnext26ts": 256, "torchvision:inception_v3": 299}
SIZES |= dict.fromkeys(("timm:levit_128s", "timm:coat_tiny", "timm:convit_tiny"), 224)
SIZES |= {"timm:sequencer2d_s": 224}
OPTIONS = {
    "timm:vit_tiny_patch16_224": {"img_size": 96},
    "timm:swin_tiny_patch4_window7_224": {"img_size": 96},
    "torchvision:inception_v3": {"init_weights": False},
    "torchvision:googlenet": {"init_weights": False},
    "torchvision:fasterrcnn_resnet50_fpn": {
        **{"weights": None, "weights_backbone": None},
        **{"min_size": 128, "max_size": 160, "box_score_thresh": 0.0},
    },
}


def arguments_of(name):
    if "fasterrcnn" in name:
        box = {"boxes": torch.tensor([[9.0, 9.0, 60.0, 70.0]]), "labels": torch.ones(1).long()}
        return [torch.rand(3, 128, 160), torch.rand(3, 160, 128)], [box] * 2
    if "raft" in name:
        return torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128)
    return (torch.randn(2, 3, *[SIZES.get(name, 96)] * 2),)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name,
            marks=[pytest.mark.slow] * (name in SLOW) + [pytest.mark.long] * (name in LONG),
        )
        for name in (CALLS | HARD)
    ],
)
def built(request):
    """A model's name, the model, its arguments and its plan."""
    zoo, name = request.param.split(":")
    build = timm.create_model if zoo == "timm" else torchvision.models.get_model
    model, arguments = build(name, **OPTIONS.get(request.param, {})), arguments_of(request.param)
    # Noise on constant weights: what starts as zero would hide what it multiplies.
    for parameter in model.parameters():
        if parameter.min() == parameter.max():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return request.param, model, arguments, find_activations(model, arguments)


@torch.no_grad()
def predict(model, arguments):
    torch.manual_seed(0)
    return [x for x in tree_leaves(model.eval()(*arguments)) if isinstance(x, torch.Tensor)]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_every_call_site_is_found(built):
    name, _, _, plan = built
    if name in CALLS:
        assert sum(site.calls for site in plan if "eval" in site.modes) == CALLS[name]
        assert not plan.unexamined
    else:
        assert len(plan.select()) == HARD[name][0]


def test_outputs_stay_bit_for_bit_in_float32_and_bfloat16_and_baked(built):
    name, original, arguments, plan = built
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (name in BFLOAT16)]:
        model = copy.deepcopy(original).to(dtype)
        given = (arguments[0].to(dtype),) if name in BFLOAT16 else arguments
        fresh = copy.deepcopy(model)
        before, keys, cls = predict(model, given), list(model.state_dict()), type(model)
        convert(model, plan=plan)
        assert same(predict(model, given), before)
        convert(fresh, plan=plan, seed=5).load_state_dict(model.state_dict())
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            assert same(predict(clone, given), before)
        for _, unit in gated_activations(clone):
            unit.log_alpha.data.copy_(torch.randn_like(unit.log_alpha).sign() * 8)
        mixed = predict(clone, given)
        assert not same(mixed, before)
        assert same(predict(bake(clone), given), mixed)
        revert(model)
        assert type(model) is cls
        assert list(model.state_dict()) == keys
        assert same(predict(model, given), before)


def test_a_training_step_reaches_every_gate_and_every_parameter(built):
    _, original, arguments, plan = built
    model = copy.deepcopy(original).train()

    def loss():
        torch.manual_seed(0)
        outputs = [x for x in tree_leaves(model(*arguments)) if isinstance(x, torch.Tensor)]
        return sum(x.square().mean() for x in outputs if x.is_floating_point())

    loss().backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    convert(model, plan=plan)
    loss().backward()
    called = {site.path for site in plan if "train" in site.modes}
    reached |= {f"{path}.gate.log_alpha" for path, _ in gated_activations(model) if path in called}
    for key, parameter in model.named_parameters():
        if key in reached:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


def test_a_site_in_torchvision_is_known_by_its_place_in_the_code():
    plan = find_activations(torchvision.models.resnet18(), torch.zeros(2, 3, 64, 64))
    functions = {site.key.location[0][0] for site in plan if site.way == "edit"}
    assert functions == {"BasicBlock.forward"}
