"""Units in training use the Triton kernels where these are trusted, and then compute the same."""

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from transfer_surgery import (
    HardConcrete,
    convert,
    match_targets,
    recompute_activations,
    wrap_optimizer,
)
from transfer_surgery.units import gated_activation as unit_module
from transfer_surgery.units import trusted_kernels
from transfer_surgery.units.kernels.triton import choice
from transfer_surgery.units.kernels.triton.choice import KernelWarning, triton_kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, in its interpreter"
)
CPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
X = torch.randn(6, 2, 7, 7, generator=torch.Generator().manual_seed(1)).to(CPU)


@pytest.fixture
def on_triton(monkeypatch):
    """As on a GPU: the inputs that the kernels were called with."""
    kernels = trusted_kernels(CPU)
    seen = []
    original = kernels.gated_triton

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(x)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(kernels, "gated_triton", counted)
    monkeypatch.setattr(unit_module, "triton_kernels", lambda x: kernels)
    return seen


class _Checkpoint(torch.autograd.graph.saved_tensors_hooks):
    """Counts what is saved, as `torch.utils.checkpoint` does."""

    def __init__(self) -> None:
        self.packed = 0
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self.packed += 1
        return tensor

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        assert self.packed == 0


def network(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)]
    layers += [nn.GELU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 3)]
    model = nn.Sequential(*layers)
    convert(model, example_input=X[:2].cpu(), **how)
    for name, parameter in model.named_parameters():
        if name.endswith("log_alpha"):
            parameter.data.normal_()
    for name, buffer in model.named_buffers():
        if name.endswith("progress"):
            buffer.fill_(0.4)
    return model.to(CPU)


def step(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(3)  # of the noise
    y = model(X)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize(
    ("how", "recompute"),
    [
        ({"granularity": "channel", "gate": HardConcrete()}, True),
        ({"granularity": "layer", "gate": HardConcrete(noise="none")}, False),
        ({"granularity": "neuron", "gate": HardConcrete(noise="example")}, False),
        ({"gate": "line"}, False),
    ],
)
def test_a_training_step_is_that_of_the_eager_kernels(on_triton, monkeypatch, how, recompute):
    model = recompute_activations(network(**how), enabled=recompute)
    other = copy.deepcopy(model)
    found = step(model)
    assert len(on_triton) == (3 if recompute else 2)
    monkeypatch.setattr(unit_module, "triton_kernels", lambda x: None)
    torch.testing.assert_close(found, step(other), rtol=1e-4, atol=1e-4)


def test_matched_targets_are_trained_by_the_kernels(on_triton, monkeypatch):
    model = network()
    match_targets(model, [X])
    other = copy.deepcopy(model)
    found = step(model)
    assert len(on_triton) == 2
    monkeypatch.setattr(unit_module, "triton_kernels", lambda x: None)
    torch.testing.assert_close(found, step(other), rtol=1e-4, atol=1e-4)


def test_evaluation_keeps_the_bits_of_the_original(on_triton):
    model = network().eval()
    model(X)
    assert not on_triton


@pytest.mark.parametrize(
    "how", [{"gate": "bernoulli"}, {"target": "clamp(min=-1.0, max=1.0)"}], ids=str
)
def test_what_the_kernels_do_not_know_goes_the_eager_way(on_triton, how):
    step(network(**how))
    assert not on_triton


def test_a_custom_sample_is_not_bypassed(on_triton, monkeypatch):
    model = network()
    gate = model[2].gate

    class Fixed(type(gate)):
        def sample(self, batch: int) -> Tensor:
            return torch.full(self.shape, 0.25, device=CPU)

    gate.__class__ = Fixed
    x = torch.randn(2, 6, 5, 5, device=CPU)
    expected = 0.25 * x.relu() + 0.75 * x.sin()
    torch.testing.assert_close(model[2](x), expected)
    assert len(on_triton) == 1


def test_a_schedule_moves_gates_that_the_kernels_train(on_triton):
    from transfer_surgery import TransferSchedule, report

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(6, start=0, end=1.0))
    for _ in range(6):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert report(model).total.transferred == 1
    assert len(on_triton) == 12


def test_kernels_that_fail_or_differ_are_left_with_a_warning(monkeypatch):
    kernels = trusted_kernels(CPU)
    original = kernels.gated_triton
    for broken in (
        lambda *args, **kwargs: 1.01 * original(*args, **kwargs),
        lambda *args, **kwargs: 1 / 0,
    ):
        monkeypatch.setattr(kernels, "gated_triton", broken)
        trusted_kernels.cache_clear()
        with pytest.warns(KernelWarning, match="TRANSFER_SURGERY_KERNELS=eager"):
            assert trusted_kernels(CPU) is None
    monkeypatch.undo()
    trusted_kernels.cache_clear()
    assert trusted_kernels(CPU) is kernels


def test_without_triton_the_eager_kernels_run_and_nobody_is_warned(monkeypatch):
    trusted_kernels.cache_clear()
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    assert trusted_kernels(CPU) is None
    trusted_kernels.cache_clear()


def test_a_cpu_has_the_eager_kernels():
    assert triton_kernels(torch.zeros(3)) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_environment_has_a_say_on_a_gpu(monkeypatch):
    assert triton_kernels(X) is not None
    monkeypatch.setenv("TRANSFER_SURGERY_KERNELS", "eager")
    assert triton_kernels(X) is None


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, _Checkpoint])
def test_the_trial_works_wherever_a_unit_asks_for_it_and_nobody_notices(around):
    trusted_kernels.cache_clear()
    with around():
        assert trusted_kernels(CPU) is not None


def test_fake_tensors_cause_no_trial():
    trusted_kernels.cache_clear()
    with FakeTensorMode():
        assert triton_kernels(torch.zeros(3, device="cuda")) is None
    assert trusted_kernels.cache_info().misses == 0
