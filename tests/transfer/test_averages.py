"""Averaged models: gates are averaged like weights, and the average evaluates, reports and bakes.

`torch.optim.swa_utils` and timm's `ModelEmaV3`. Create an average after `convert`: a copy that was
made before has no gates.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.helpers.explicit_loss import batch, gated_cnn, gates, mid_transfer, plain
from transfer_surgery import (
    GatedActivation,
    TransferSchedule,
    bake,
    convert,
    report,
    revert,
    wrap_optimizer,
)

STEPS = 12  # the transfer ends at step 6


Average = Callable[[nn.Module], nn.Module]
AVERAGES: dict[str, Average] = {
    "swa": AveragedModel,
    "swa-buffers": lambda m: AveragedModel(m, use_buffers=True),
    "ema": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "timm": lambda m: ModelEmaV3(m, decay=0.5),
    "timm-one-by-one": lambda m: ModelEmaV3(m, decay=0.5, foreach=False, use_warmup=True),
    "timm-no-buffers": lambda m: ModelEmaV3(m, decay=0.5, exclude_buffers=True),
}
averages = pytest.mark.parametrize("name", AVERAGES)


def follow(average: nn.Module, model: nn.Module) -> None:
    if isinstance(average, AveragedModel):
        average.update_parameters(model)
    else:
        average.update(model)


def train(model: nn.Module, average: nn.Module, start: int) -> list[list[Tensor]]:
    """A whole transfer, averaged from a step on; returns the gates that were averaged."""
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(STEPS, start=0, end=0.5))
    seen = []
    for step in range(1, STEPS + 1):
        plain(model, optimizer, False, step)
        if step >= start:
            follow(average, model)
            seen.append([gate.detach().clone() for gate in gates(model)])
    return seen


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("swa", lambda step: 1 / (step + 1)),
        ("ema", lambda step: 0.5 if step else 1.0),  # the first one is copied
        ("timm", lambda step: 0.5),
    ],
)
def test_gates_are_averaged_like_weights(name: str, share: Callable[[int], float]) -> None:
    model = gated_cnn()
    average = AVERAGES[name](model)
    expected = [gate.detach().clone() for gate in gates(model)]
    for step, current in enumerate(train(model, average, start=1)):
        for old, new in zip(expected, current, strict=True):
            old += share(step) * (new - old)
    torch.testing.assert_close([gate.detach() for gate in gates(average)], expected)


@averages
def test_averaging_does_not_disturb_the_training(name: str) -> None:
    model, alone = gated_cnn(), gated_cnn()
    train(model, AVERAGES[name](model), start=1)
    train(alone, nn.Module(), start=STEPS + 1)
    torch.testing.assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)


@averages
@torch.no_grad()
def test_an_average_from_after_the_transfer_is_transferred_and_bakes(name: str) -> None:
    model = gated_cnn()
    average = AVERAGES[name](model)
    with torch.enable_grad():
        train(model, average, start=1 if name == "ema" else 7)
    if "timm" in name:
        for _ in range(5):  # the copy of the first gates has faded
            follow(average, model)
    average.eval()
    assert report(average).total.transferred == 1
    x, _ = batch(0)
    before = average(x)
    assert not torch.equal(before, model.eval()(x))
    inner = bake(average).module
    assert not any(isinstance(module, GatedActivation) for module in average.modules())
    assert torch.equal(average(x), before)
    assert torch.equal(inner(x), before)
    assert isinstance(next(iter(gates(model))), nn.Parameter)  # the model is not baked with it


@averages
@torch.no_grad()
def test_an_average_from_the_middle_evaluates_reports_bakes_and_reverts(name: str) -> None:
    model = mid_transfer(gated_cnn())
    average = AVERAGES[name](model)
    follow(average, model)
    average.eval()
    model.eval()
    x, _ = batch(0)
    before = average(x)
    torch.testing.assert_close(before, model(x))
    assert report(average).total.gates == report(model).total.gates
    torch.testing.assert_close(bake(copy.deepcopy(average))(x), before)
    revert(average)
    assert not torch.equal(average(x), before)
    assert len(average.module.state_dict()) == len(model.state_dict()) - len(gates(model))


@pytest.mark.parametrize("kind", ["torch", "timm"])
def test_gates_of_a_bfloat16_model_are_averaged_in_float32(kind: str) -> None:
    model = mid_transfer(gated_cnn()).to(torch.bfloat16)
    ema = AVERAGES["ema" if kind == "torch" else kind](model)
    start = [gate.detach().clone() for gate in gates(model)]
    follow(ema, model)
    with torch.no_grad():
        for gate in gates(model):
            gate += 1e-3
    follow(ema, model)
    for gate, old in zip(gates(ema), start, strict=True):
        assert gate.dtype == torch.float32
        torch.testing.assert_close(
            gate.detach() - old, torch.full_like(old, 5e-4), rtol=1e-2, atol=0
        )


@pytest.mark.parametrize("kind", ["line", "copy"])
def test_the_place_of_gates_without_parameters_is_that_of_the_model(kind: str) -> None:
    model = convert(nn.Sequential(nn.Linear(2, 4), nn.ReLU()), gate=kind)
    average = AveragedModel(model)
    for progress in (0.0, 0.25, 1.0):
        model[1].gate.progress.fill_(progress)
        average.update_parameters(model)
    assert average.module[1].gate.progress == 1.0
    assert report(average).total.transferred == 1
