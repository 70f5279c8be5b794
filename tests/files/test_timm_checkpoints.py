"""Checkpoints of converted models by timm and safetensors, and of the models before and after."""

from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import load_model, save_file, save_model
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from tests.helpers.kinds import KINDS, become, keep, mix, transfer
from tests.helpers.promises import units
from transfer_surgery import convert, report, revert, wrap_optimizer

NAMES = ("test_resnet", "test_vit")
GATES = {"gates": (keep, transfer, mix), "matched": KINDS}


def fresh(name, seed=0):
    """A new model with weights of its own, converted."""
    torch.manual_seed(seed)
    return convert(timm.create_model(name, num_classes=10), seed=seed).eval()


def original(name):
    torch.manual_seed(9)
    return timm.create_model(name, num_classes=10).eval()


@torch.no_grad()
def assert_same(model, expected):
    """The same gates, and the same outputs bit for bit."""
    x = torch.randn(2, *expected.default_cfg["input_size"])
    assert torch.equal(model.eval()(x), expected.eval()(x))
    assert list(units(model)) == list(units(expected))
    if units(expected):
        assert report(model).to_json() == report(expected).to_json()


def trained(name, kinds):
    """A model, its optimizer and its average after a step."""
    model = become(fresh(name), *kinds)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1)
    wrap_optimizer(optimizer, model, gamma=0.1)
    ema = ModelEmaV3(model, decay=0.5)
    x = torch.randn(2, *model.default_cfg["input_size"])
    nn.functional.cross_entropy(model.train()(x), torch.tensor([1, 2])).backward()
    optimizer.step()
    ema.update(model)
    return model, optimizer, ema


@pytest.mark.parametrize(("name", "kinds"), [*zip(NAMES, GATES, strict=True)])
def test_what_timm_saved_loads_into_a_freshly_converted_model(name, kinds, tmp_path):
    model, optimizer, ema = trained(name, GATES[kinds])
    args = Namespace(model="some", lr=1e-3)  # train.py keeps its arguments, too
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.0)
    for average, expected in ((False, model), (True, ema.module)):
        again = fresh(name, seed=1)
        load_checkpoint(again, str(tmp_path / "last.pth.tar"), use_ema=average)  # strictly
        assert_same(again, expected)


@pytest.mark.parametrize(("name", "kinds"), [*zip(NAMES, GATES, strict=True)])
def test_what_safetensors_saved_loads_into_a_freshly_converted_model(name, kinds, tmp_path):
    model = become(fresh(name), *GATES[kinds])
    file = tmp_path / "model.safetensors"
    save_model(model, file)
    again = fresh(name, seed=1)
    assert load_model(again, file) == (set(), [])
    assert_same(again, model)
    save_file(model.state_dict(), file)
    again = fresh(name, seed=1)
    load_checkpoint(again, str(file))
    assert_same(again, model)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoint_of_the_original_lacks_the_gates_alone(name, suffix, tmp_path):
    model, file = original(name), str(tmp_path / f"model{suffix}")
    (torch.save if suffix == ".pth" else save_file)(model.state_dict(), file)
    converted = fresh(name)
    found = load_checkpoint(converted, file, strict=False)
    assert found.missing_keys == [f"{path}.gate.log_alpha" for path in units(converted)]
    assert not found.unexpected_keys
    with torch.no_grad():
        x = torch.randn(2, *model.default_cfg["input_size"])
        assert torch.equal(converted(x), model(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*gate\.log_alpha"):
        load_checkpoint(converted, file)


@pytest.mark.parametrize(("name", "kinds"), [*zip(NAMES, GATES, strict=True)])
def test_a_converted_models_checkpoint_loads_back_into_the_original(name, kinds, tmp_path):
    model, file = become(fresh(name), *GATES[kinds]), str(tmp_path / "model.pth")
    torch.save(model.state_dict(), file)
    base = original(name)
    found = load_checkpoint(base, file, strict=False)
    assert not found.missing_keys
    assert all(".gate." in key or ".fitted." in key for key in found.unexpected_keys)
    dropped = original(name)
    load_checkpoint(dropped, file, filter_fn=lambda state, m: {k: state[k] for k in m.state_dict()})
    revert(model)
    torch.save(model.state_dict(), file)
    strictly = original(name)
    load_checkpoint(strictly, file)
    for loaded in (base, dropped, strictly):
        assert_same(loaded, model)
