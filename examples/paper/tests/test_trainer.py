"""A training is section 4.2's loop to the bit, and neither a kill nor an end of time loses it."""

import json
import math
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from machine import Machine
from networks import ResNet, Row, find_row, gate_of, initialise, perceptron
from protocol import Protocol
from tasks import Bessel, Classification, Images, Task
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from trainer import Training

from transfer_surgery import convert, get_activation, structural_risk
from transfer_surgery.activations import ActivationModule
from transfer_surgery.cli.finetuning.images import crop_and_flip
from transfer_surgery.units import gated_activations

NOW = 0.0  # as `until`: time is up after one epoch
BESSEL = Protocol(epochs=5, batch_size=64, lr=0.05, restart=1, restart_factor=2, clip=0.1)
PHOTOS = Protocol(epochs=4, batch_size=8, lr=0.05, weight_decay=0.01, clip=1.0)
MIXED = replace(PHOTOS, init="alpha", gamma=0.1)  # gates start between 0 and 1


class SmallBessel(Bessel):
    def network(self, activation: str) -> nn.Module:
        return perceptron(activation, width=16, layers=2)


def bessel() -> SmallBessel:
    return SmallBessel(torch.device("cpu"))


def photos() -> Classification:
    """A task with batch norm, augmentation and a last batch that is left out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (40, 3, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (40,), generator=generator)
    look = torch.full((3, 1, 1), 0.5)
    images = Images((x[:20], y[:20]), (x[20:], y[20:]), look, look, crop_and_flip)
    return Classification("photos", images, lambda activation: ResNet(activation, 8))


def training(row: str, task: Task, protocol: Protocol, seed: int = 3, **machine: Any) -> Training:
    return Training(find_row(row), task, protocol, Machine(**machine), seed)


def trained(row: str, task: Task, protocol: Protocol, folder: Path, **machine: Any) -> Training:
    result = training(row, task, protocol, **machine)
    assert result.run(folder / "whole.pt")
    return result


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


# ---- the loop


def explicit(task: Task, protocol: Protocol, row: Row) -> nn.Module:
    """The loop of section 4.2 with the risk in the loss, Copy without gates, all spelled out."""
    torch.manual_seed(3)
    model = task.network(row.source)
    initialise(model, row.source, protocol)
    model.to(memory_format=torch.channels_last)
    gates: list[Tensor] = []
    if row.learned:
        gate = gate_of(row.gate, init=protocol.init, noise=protocol.noise)
        convert(model, gate=gate, example_input=task.example)
        gates = [unit.log_alpha for _, unit in gated_activations(model)]
    held = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if id(p) not in held]
    decay = protocol.gate_weight_decay
    own = {
        "lr": protocol.gate_lr * protocol.lr,
        "weight_decay": protocol.weight_decay if decay is None else decay,
    }
    groups = [{"params": weights}] + [{"params": gates, **own}] * bool(gates)
    how = {"momentum": 0.9, "weight_decay": protocol.weight_decay, "nesterov": True}
    optimizer = SGD(groups, lr=protocol.lr, **how)
    steps = task.steps(protocol.batch_size)
    cycle = (protocol.restart or protocol.epochs) * steps
    scheduler = CosineAnnealingWarmRestarts(optimizer, cycle, protocol.restart_factor)
    for step in range(protocol.epochs * steps):
        if step % steps == 0:
            batches = task.batches(protocol.batch_size)
        if row.gate == "copy" and 2 * step >= protocol.epochs * steps:
            for module in model.modules():
                if isinstance(module, ActivationModule):
                    module.activation = get_activation("sin")
        risk = protocol.gamma * structural_risk(model, protocol.reduction) if gates else 0.0
        optimizer.zero_grad()
        (task.loss(model.train(), *next(batches)) + risk).backward()
        nn.utils.clip_grad_norm_(weights, protocol.clip)
        optimizer.step()
        scheduler.step()
    return model.eval()


@pytest.mark.parametrize(
    ("row", "task", "protocol"),
    [
        ("tanh", bessel(), BESSEL),
        ("sin", photos(), PHOTOS),
        ("Copy", photos(), replace(PHOTOS, epochs=3)),
        ("tanh->sin", photos(), MIXED),
        ("Bern", photos(), replace(MIXED, reduction="neurons", gamma=1e-3)),
        ("relu->sin", bessel(), replace(BESSEL, init="alpha", gate_lr=5.0, gate_weight_decay=0.3)),
    ],
)
def test_a_network_is_trained_as_section_4_2_says(row, task, protocol, tmp_path):
    expected = explicit(task, protocol, find_row(row))
    found = trained(row, task, protocol, tmp_path)
    state = found.model.state_dict()
    if row == "Copy":
        progress = [state.pop(key) for key in list(state) if "gate" in key]
        assert all(value == 1 for value in progress)
        assert found.curve["mean_gate"] == [1, 0, 0]
    torch.testing.assert_close(state, expected.state_dict(), rtol=1e-5, atol=1e-6)
    assert found.curve["score"][-1] == pytest.approx(task.score(expected), rel=1e-3)


def test_every_setting_matters_in_these_comparisons(tmp_path):
    whole = trained("relu->sin", bessel(), replace(BESSEL, init="alpha"), tmp_path)
    assert whole.curve["lr"] == pytest.approx([0.05, 0.05, 0.025, 0.05, 0.05 * 0.8536], rel=1e-3)
    settings = {"clip": 0.0, "restart": 0, "restart_factor": 1, "weight_decay": 0.0, "gamma": 9.0}
    for name, value in (settings | {"gate_lr": 5.0, "gate_weight_decay": 0.3}).items():
        protocol = replace(BESSEL, init="alpha", **{name: value})
        other = trained("relu->sin", bessel(), protocol, tmp_path).model
        assert not torch.equal(whole.model[1].log_alpha, other[1].log_alpha), name


def test_line_falls_linearly_from_1_to_0(tmp_path):
    found = trained("Line", photos(), PHOTOS, tmp_path)
    assert found.curve["mean_gate"] == [0.75, 0.5, 0.25, 0.0]


def test_gates_start_from_the_seed_and_so_do_weights():
    task = photos()
    one, same, other = (training("relu->sin", task, PHOTOS, seed).model for seed in (1, 1, 2))
    plain = training("relu", task, PHOTOS, 1).model
    assert_same(one.state_dict(), same.state_dict())
    assert not torch.equal(one.act1.log_alpha, other.act1.log_alpha)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert torch.equal(one.conv1.weight, plain.conv1.weight)


# ---- interruptions and results


@pytest.mark.parametrize("row", ["relu", "Copy", "Bern", "relu->sin"])
def test_a_training_stopped_after_every_epoch_goes_on_bit_for_bit(row, tmp_path):
    protocol = replace(MIXED, noise="example", restart=1, restart_factor=2)
    whole = trained(row, photos(), protocol, tmp_path)
    after = torch.rand(3)
    checkpoint, ends, told = tmp_path / "part.pt", [], []
    for part in range(protocol.epochs):
        now = training(row, photos(), protocol, seed=3 + part)  # nothing of a later start is left
        ends.append(now.run(checkpoint, lambda t: told.append(t.epoch), until=NOW))
    assert ends == [False, False, False, True]
    assert told == [1, 2, 3, 4]
    assert torch.equal(torch.rand(3), after)
    assert_same(now.model.state_dict(), whole.model.state_dict())
    assert now.curve == whole.curve
    groups = now.optimizer.state_dict()["param_groups"]
    assert groups == whole.optimizer.state_dict()["param_groups"]
    # A checkpoint of a GPU goes on on a CPU, where nobody can use its second random state.
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"random_cuda": torch.zeros(16, dtype=torch.uint8)}, checkpoint)
    assert training(row, photos(), protocol).run(checkpoint)


@pytest.mark.parametrize("row", ["relu", "resin->sin"])
def test_a_diverging_training_is_reported_and_leaves_no_checkpoint(row, tmp_path):
    found = training(row, bessel(), Protocol(epochs=30, batch_size=32, lr=1e9))
    assert found.run(tmp_path / "checkpoint.pt", until=time.time() + 600)
    result = found.result()
    assert 1 <= result["diverged"] == found.epoch < 30
    assert (result["conv"], result["best"], result["sites"]) == (None, None, [])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_last_step_ruined_has_diverged(tmp_path, monkeypatch):
    monkeypatch.setattr(SmallBessel, "score", lambda task, model: math.inf)
    assert trained("relu", bessel(), BESSEL, tmp_path).result()["diverged"] == 1


@pytest.mark.parametrize("row", ["tanh", "relu->sin"])
def test_a_result_is_small_json_of_plain_numbers(row, tmp_path):
    result = trained(row, photos(), MIXED, tmp_path).result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["row"], result["diverged"]) == (row, None)
    scores = result["curve"]["score"]
    assert (result["conv"], result["best"]) == (scores[-1], min(scores))
    assert result["curve"]["epoch"] == [1, 2, 3, 4]
    gated = row == "relu->sin"
    assert [site["gates"] for site in result["sites"]] == [16, 16, 16, 32, 32, 64, 64] * gated
    if gated:
        total = sum(site["gates"] * site["mean_gate"] for site in result["sites"])
        assert result["curve"]["mean_gate"][-1] == pytest.approx(total / 240, rel=1e-3)


def test_of_a_long_training_200_moments_are_kept_at_most_and_the_last_one(tmp_path):
    found = trained("sin", bessel(), Protocol(epochs=401, batch_size=200, lr=0.01), tmp_path)
    assert found.curve["epoch"] == [*range(3, 401, 3), 401]
    assert len(json.dumps(found.result())) < 20_000


# ---- machines


def test_in_bfloat16_a_training_agrees_to_rounding_and_activations_see_float32(tmp_path):
    full = trained("tanh->sin", photos(), MIXED, tmp_path)
    half, seen = training("tanh->sin", photos(), MIXED, precision="bf16"), set()
    half.model.conv1.register_forward_hook(lambda _, x, y: seen.add(y.dtype))
    for _, unit in gated_activations(half.model):
        unit.register_forward_hook(lambda _, x, y: seen.update([x[0].dtype, y.dtype]))
    half.run(tmp_path / "half.pt")
    assert seen == {torch.float32} == {p.dtype for p in half.model.parameters()}
    assert half.curve["loss"] == pytest.approx(full.curve["loss"], rel=0.03)
    assert half.curve["loss"] != full.curve["loss"]  # products are rounded


@pytest.fixture
def settings_of_torch():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
def test_compiled_trainings_agree_with_eager_ones_and_go_on_bit_for_bit(
    tmp_path, settings_of_torch
):
    protocol = Protocol(epochs=2, batch_size=100, lr=0.05, init="alpha", gamma=0.1, noise="none")
    eager = trained("resin->sin", bessel(), protocol, tmp_path)
    with torch._dynamo.config.patch(error_on_recompile=True):  # as a new network would be
        Machine(compile=True).prepare()
        whole = trained("resin->sin", bessel(), protocol, tmp_path, compile=True)
        for seed in (3, 4):
            Machine(compile=True).prepare()
            part = training("resin->sin", bessel(), protocol, seed=seed, compile=True)
            part.run(tmp_path / "part.pt", until=NOW)
    assert_same(part.model.state_dict(), whole.model.state_dict())
    for name, values in eager.curve.items():
        assert whole.curve[name] == pytest.approx(values, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
def test_a_machine_is_chosen_and_sets_the_process_up(settings_of_torch):
    assert Machine.choose() == Machine("cpu", "fp32", compile=False, threads=1)
    assert Machine.choose(precision="bf16", compile=True) == Machine("cpu", "bf16", compile=True)
    for wrong in ({"precision": "fp16"}, {"device": "gpu"}, {"threads": 0}, {"device": "cuda"}):
        with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
            Machine(**wrong)
    Machine(threads=2, precision="tf32").prepare()
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "high")
    Machine().prepare()
    assert torch.get_float32_matmul_precision() == "highest"
