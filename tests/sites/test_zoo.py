"""Real timm and torchvision models: bit-identical, complete, trainable."""

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
    "timm:resnet50": 49,
    "timm:resnet50d": 51,
    "timm:efficientnet_b0": 65,
    "timm:mobilenetv3_large_100": 48,
    "timm:convnext_tiny": 18,
    "timm:vit_tiny_patch16_224": 12,
    "timm:swin_tiny_patch4_window7_224": 12,
    "timm:densenet121": 121,
    "timm:levit_128s": 25,
    "torchvision:resnet18": 17,
    "torchvision:resnet50": 49,
    "torchvision:densenet121": 121,
    "torchvision:inception_v3": 94,
    "torchvision:googlenet": 57,
    "torchvision:mobilenet_v3_small": 42,
}


def build(name):
    zoo, name = name.split(":")
    if zoo == "timm":
        return timm.create_model(name)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    return torchvision.models.get_model(name, **options)


def images(name, dtype=torch.float32):
    size = 299 if "inception" in name else 224
    return torch.randn(2, 3, size, size, dtype=dtype)


@pytest.mark.parametrize("name", SITES)
def test_every_call_site_is_found(name):
    plan = find_activations(build(name))
    assert sum(site.calls for site in plan if "eval" in site.modes) == SITES[name]
    assert not plan.notes


@pytest.mark.parametrize("name", SITES)
@torch.no_grad()
def test_outputs_stay_bit_for_bit_in_float32_and_bfloat16(name):
    model, cls = build(name).eval(), None
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        x = images(name, dtype)
        before, keys, cls = model(x), list(model.state_dict()), type(model)
        convert(model)
        assert torch.equal(model(x), before)
        fresh = convert(build(name).to(dtype).eval(), seed=5)
        fresh.load_state_dict(model.state_dict())
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
            assert torch.equal(clone(x), before)
        revert(model)
        assert type(model) is cls
        assert list(model.state_dict()) == keys
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("name", SITES)
def test_a_training_step_reaches_every_gate_and_every_parameter(name):
    model = build(name).train()
    x = images(name)

    def loss(net):
        output = net(x)
        outputs = output if isinstance(output, tuple) else (output,)
        return sum(one.square().mean() for one in outputs if one is not None)

    loss(model).backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    convert(model)
    loss(model).backward()
    for key, parameter in model.named_parameters():
        if key in reached or key.endswith("log_alpha"):
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
@torch.no_grad()
def test_a_transferred_model_bakes_compiles_and_exports(name):
    model = convert(build(name).eval())
    x = torch.randn(2, 3, 64, 64)
    for key, parameter in model.named_parameters():
        if key.endswith("log_alpha"):
            parameter.copy_(torch.randn_like(parameter).sign() * 8)
    before = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), before)
    baked = bake(model)
    assert torch.equal(baked(x), before)
    torch.testing.assert_close(torch.export.export(baked, (x,)).module()(x), before)
