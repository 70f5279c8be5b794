"""Activation recomputation draws the same gates again: the gradients stay bit for bit."""

import copy
import inspect
from itertools import cycle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import HardConcrete, RecomputedGatesWarning, convert

X = torch.linspace(-3, 3, 4 * 6).reshape(4, 6)


class Block(nn.Module):
    """A child, a functional and a re-used activation, and dropout, which draws noise as well."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)

    def forward(self, x):
        return x + self.act(self.second(F.gelu(self.drop(self.act(self.first(x))))))


class Stack(nn.Module):
    def __init__(self, how="plain"):
        super().__init__()
        self.how, self.blocks = how, nn.Sequential(Block(), Block(), Block())

    def forward(self, x):
        if self.how == "sequential":
            return checkpoint_sequential(self.blocks, 2, x, use_reentrant=False)
        for block in self.blocks:
            if self.how == "plain":
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.how == "reentrant")
        return x


def mid_transfer(model, seed=3):
    """Gates where the noise decides: some samples are 0, some 1, many between."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model.train()


def gradients(model, x):
    """The loss and the gradient of everything; the copy keeps running statistics as they were."""
    model = copy.deepcopy(model)
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    loss = model(x).square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.endswith("log_alpha") and grad.any() for name, grad in found.items())
    return {"loss": loss.detach(), "input": x.grad} | found


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_in_another_random_state_warns(reentrant):
    """Without dropout a user may say that no state is to be kept; gates need it."""
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
    mid_transfer(convert(model, "relu", example_input=X, seed=1))
    x = X.clone().requires_grad_()

    def run(**options):
        return checkpoint(model, x, use_reentrant=reentrant, **options).sum()

    (run() + run()).backward()  # two forward passes before both recomputations
    loss = run(preserve_rng_state=False)
    with pytest.warns(RecomputedGatesWarning, match="another random state"):
        loss.backward()
    for parameter in model[1].parameters():
        parameter.data.fill_(30.0)  # no gate is drawn
    run(preserve_rng_state=False).backward()


@pytest.mark.parametrize("noise", ["batch", "example"])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "sequential"])
def test_a_checkpointed_block_recomputes_with_the_same_gates(how, noise):
    """Set before the conversion or after it."""
    model, early = Stack(), Stack(how)
    early.load_state_dict(model.state_dict())
    for each in (model, early):
        mid_transfer(convert(each, example_input=X, gate=HardConcrete(noise=noise), seed=1))
    expected = gradients(model, X)
    model.how = how
    assert_same_bits(expected, gradients(model, X))
    assert_same_bits(expected, gradients(early, X))


ZOO = {
    "resnet18": {"drop_path_rate": 0.1},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "test_efficientnet": {"drop_path_rate": 0.1},
    "convnext_atto": {"drop_path_rate": 0.1},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3, "drop_path_rate": 0.1},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "embed_dim": 24,
        "depths": (1, 1, 1, 1),
    },
}


@pytest.mark.parametrize(("name", "noise"), [*zip(ZOO, cycle(("batch", "example")))])
def test_timm_grad_checkpointing_recomputes_with_the_same_gates(name, noise):
    """Set before the conversion or after it: one result, that without checkpointing."""
    size = ZOO[name].get("img_size", 32)
    x = torch.randn(2, 3, size, size)
    model = timm.create_model(name, num_classes=10, **ZOO[name])
    early = copy.deepcopy(model)
    early.set_grad_checkpointing(True)
    mid_transfer(convert(model, example_input=x, gate=HardConcrete(noise=noise), seed=1))
    expected = gradients(model, x)
    mid_transfer(convert(early, example_input=x, gate=HardConcrete(noise=noise), seed=1))
    assert_same_bits(expected, gradients(early, x))
    model.set_grad_checkpointing(True)
    assert_same_bits(expected, gradients(model, x))


class OwnCheckpoint(nn.Module):
    """Calls functions inside a checkpoint in its own forward."""

    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(6, 6), reentrant

    def body(self, x):
        return F.gelu(torch.tanh(self.linear(x)))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_an_edited_forward_gives_the_gradients_of_the_plain_one(reentrant):
    model = mid_transfer(convert(OwnCheckpoint(reentrant), example_input=X, seed=1))
    found = gradients(model, X)
    torch.manual_seed(7)
    model.gelu_0(model.tanh_0(model.linear(X))).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, found[name]), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_inside_an_intercepted_forward_is_refused_when_it_trains(reentrant):
    without_source = dict(globals())
    exec(compile(inspect.getsource(OwnCheckpoint), "<no file>", "exec"), without_source)
    model = without_source["OwnCheckpoint"](reentrant).eval()
    with torch.no_grad():
        before = model(X)
        assert torch.equal(convert(model, example_input=X)(X), before)
    with pytest.raises(RuntimeError, match=r"^tanh_0: .* inside torch\.utils\.checkpoint"):
        mid_transfer(model)(X.clone().requires_grad_())
