"""Real timm and torchvision models: bit-identical, complete, trainable.

`benchmarks/zoo_coverage.py` checks the same for every model of the zoos; here are the networks that
are unlike each other. Each is built and planned once.
"""

import copy
import pickle

import pytest
import timm
import torch
import torchvision

from transfer_surgery import bake, convert, find_activations, revert

# Call sites in eval mode; counts measured independently where the model is in the zoo's oracle.
SITES = {
    "timm:resnet18": 17,
    "timm:efficientnet_b0": 65,
    "timm:convnext_tiny": 18,
    "timm:vit_tiny_patch16_224": 12,
    "timm:swin_tiny_patch4_window7_224": 12,
    "timm:levit_128s": 25,
    "torchvision:densenet121": 121,
    "torchvision:googlenet": 57,
    "torchvision:mobilenet_v3_small": 42,
}
SLOW = {
    "timm:resnet50d": 51,
    "timm:mobilenetv3_large_100": 48,
    "torchvision:resnet50": 49,
    "torchvision:inception_v3": 94,
}
BFLOAT16 = ("timm:resnet18", "timm:convnext_tiny", "torchvision:mobilenet_v3_small")
NAMES = [*SITES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
SIZED = ("timm:vit", "timm:swin")  # models that are built for one image size


def images(name, dtype=torch.float32):
    size = 299 if "inception" in name else 224 if "levit" in name else 64
    return torch.randn(2, 3, size, size, dtype=dtype)


@pytest.fixture(scope="module", params=NAMES)
def built(request):
    """A model's name, the model, and its plan."""
    zoo, name = request.param.split(":")
    if zoo == "timm":
        options = {"img_size": 64} if request.param.startswith(SIZED) else {}
        model = timm.create_model(name, **options)
    else:
        options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
        model = torchvision.models.get_model(name, **options)
    return request.param, model, find_activations(model)


def test_every_call_site_is_found(built):
    name, _, plan = built
    assert sum(site.calls for site in plan if "eval" in site.modes) == (SITES | SLOW)[name]
    assert not plan.unexamined


@torch.no_grad()
def test_outputs_stay_bit_for_bit_in_float32_and_bfloat16(built):
    name, original, plan = built
    for dtype in (torch.float32, torch.bfloat16)[: 1 + (name in BFLOAT16)]:
        model = copy.deepcopy(original).to(dtype).eval()
        fresh = copy.deepcopy(model)
        x = images(name, dtype)
        before, keys, cls = model(x), list(model.state_dict()), type(model)
        convert(model, plan=plan)
        assert torch.equal(model(x), before)
        convert(fresh, plan=plan, seed=5).load_state_dict(model.state_dict())
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            assert torch.equal(clone(x), before)
        revert(model)
        assert type(model) is cls
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), before)


def test_a_training_step_reaches_every_gate_and_every_parameter(built):
    name, original, plan = built
    model = copy.deepcopy(original).train()
    x = images(name)

    def loss(net):
        output = net(x)
        outputs = output if isinstance(output, tuple) else (output,)
        return sum(one.square().mean() for one in outputs if one is not None)

    loss(model).backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    convert(model, plan=plan)
    loss(model).backward()
    for key, parameter in model.named_parameters():
        if key in reached or key.endswith("log_alpha"):
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("built", ["timm:resnet18"], indirect=True)
@torch.no_grad()
def test_a_transferred_model_bakes_compiles_and_exports(built):
    _, original, plan = built
    model = convert(copy.deepcopy(original).eval(), plan=plan)
    x = torch.randn(2, 3, 64, 64)
    for key, parameter in model.named_parameters():
        if key.endswith("log_alpha"):
            parameter.copy_(torch.randn_like(parameter).sign() * 8)
    before = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), before)
    baked = bake(model)
    assert torch.equal(baked(x), before)
    torch.testing.assert_close(torch.export.export(baked, (x,)).module()(x), before)
