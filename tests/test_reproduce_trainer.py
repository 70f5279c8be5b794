"""A training is section 4.2's loop to the bit, and neither a kill nor an end of time loses it."""

import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from transfer_surgery import convert, get_activation, structural_risk
from transfer_surgery.activations import ActivationModule
from transfer_surgery.reproduce.images import Images, crop_and_flip
from transfer_surgery.reproduce.initialise import initialise
from transfer_surgery.reproduce.jobs import Job, run_jobs
from transfer_surgery.reproduce.machine import Machine
from transfer_surgery.reproduce.networks import ResNet, perceptron
from transfer_surgery.reproduce.protocol import Protocol
from transfer_surgery.reproduce.rows import ROWS, find_row
from transfer_surgery.reproduce.tasks import Bessel, Classification, Task
from transfer_surgery.reproduce.trainer import Training
from transfer_surgery.units import gated_activations

PLAIN = [row.name for row in ROWS if row.gate is None]
LEARNED = [row.name for row in ROWS if row.learned]
NOW = 0.0  # as `until`: time is up after one epoch


class SmallBessel(Bessel):
    def network(self, activation: str) -> nn.Module:
        return perceptron(activation, width=16, layers=2)


def photos(number: int = 20) -> Classification:
    """A task with batch norm, augmentation and a last batch that is left out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (2 * number, 3, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.randint(10, (2 * number,), generator=generator)
    look = torch.full((3, 1, 1), 0.5)
    images = Images(x[:number], y[:number], x[number:], y[number:], look, look, crop_and_flip)
    return Classification("photos", images, lambda activation: ResNet(activation, 8))


def bessel() -> SmallBessel:
    return SmallBessel(torch.device("cpu"))


BESSEL = Protocol(epochs=5, batch_size=64, lr=0.05, restart=1, restart_factor=2, clip=0.1)
PHOTOS = Protocol(epochs=4, batch_size=8, lr=0.05, weight_decay=0.01, clip=1.0)
EVEN = Protocol(epochs=2, batch_size=100, lr=0.05, init="alpha", gamma=0.1)
MIXED = dataclasses.replace(PHOTOS, init="alpha", gamma=0.1)  # gates start between 0 and 1


def training(row: str, task: Task, protocol: Protocol, seed: int = 3, **machine: Any) -> Training:
    return Training(find_row(row), task, protocol, Machine(**machine), seed)


def trained(row: str, task: Task, protocol: Protocol, folder: Path, **how: Any) -> Training:
    result = training(row, task, protocol, **how)
    assert result.run(folder / "whole.pt")
    return result


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []


# ---- plain networks, Copy and Line


def by_hand(
    task: Task, protocol: Protocol, seed: int, activation: Callable[[float], str]
) -> nn.Module:
    """SGD with Nesterov's momentum, decay, clipping, cosine and restarts, without torch.optim.

    Args:
        activation: of the network, from the share of the steps that were taken.
    """
    torch.manual_seed(seed)
    model = task.network(activation(0.0))
    initialise(model, activation(0.0), protocol)
    model.to(memory_format=torch.channels_last).train()
    velocity: list[Tensor] = []
    steps = task.steps(protocol.batch_size)
    taken, cycle, phase = 0, (protocol.restart or protocol.epochs) * steps, 0
    for _ in range(protocol.epochs):
        for inputs, targets in task.batches(protocol.batch_size):
            for module in model.modules():
                if isinstance(module, ActivationModule):
                    share = taken / (protocol.epochs * steps)
                    module.activation = get_activation(activation(share))
            parameters = list(model.parameters())
            grads = torch.autograd.grad(task.loss(model, inputs, targets), parameters)
            if protocol.clip:
                norms = torch.stack([torch.linalg.vector_norm(grad) for grad in grads])
                factor = protocol.clip / (torch.linalg.vector_norm(norms) + 1e-6)
                grads = tuple(grad * factor.clamp(max=1.0) for grad in grads)
            lr = protocol.lr * (1 + math.cos(math.pi * phase / cycle)) / 2
            with torch.no_grad():
                sums = [
                    g.add(p, alpha=protocol.weight_decay)
                    for g, p in zip(grads, parameters, strict=True)
                ]
                old = velocity or [torch.zeros_like(g) for g in sums]
                velocity = [v.mul(0.9).add(g) for v, g in zip(old, sums, strict=True)]
                for p, g, v in zip(parameters, sums, velocity, strict=True):
                    p.add_(g.add(v, alpha=0.9), alpha=-lr)
            taken, phase = taken + 1, phase + 1
            if phase == cycle:
                cycle, phase = cycle * protocol.restart_factor, 0
    return model


@pytest.mark.parametrize("row", PLAIN)
@pytest.mark.parametrize(("task", "protocol"), [(bessel(), BESSEL), (photos(), PHOTOS)])
def test_a_plain_network_is_trained_as_by_hand_bit_for_bit(row, task, protocol, tmp_path):
    expected = by_hand(task, protocol, 3, lambda share: row)
    found = trained(row, task, protocol, tmp_path)
    assert_same(found.model.state_dict(), expected.state_dict())
    expected.eval()
    assert found.curve["score"][-1] == pytest.approx(task.score(expected), rel=1e-4)


def test_clipping_and_restarts_matter_in_these_comparisons(tmp_path):
    task = bessel()
    whole = trained("tanh", task, BESSEL, tmp_path)
    for change in ({"clip": 0.0}, {"restart": 0}, {"restart_factor": 1}, {"weight_decay": 0.0}):
        other = trained("tanh", task, dataclasses.replace(BESSEL, **change), tmp_path)
        assert not torch.equal(whole.model[0].weight, other.model[0].weight)
    assert whole.curve["lr"] == pytest.approx([0.05, 0.05, 0.025, 0.05, 0.05 * 0.8536], rel=1e-3)


@pytest.mark.parametrize("epochs", [4, 3])
@pytest.mark.parametrize(("task", "protocol"), [(bessel(), BESSEL), (photos(), PHOTOS)])
def test_copy_is_resin_for_half_of_the_steps_and_sin_then_bit_for_bit(
    epochs, task, protocol, tmp_path
):
    protocol = dataclasses.replace(protocol, epochs=epochs)
    expected = by_hand(task, protocol, 3, lambda share: "resin" if share < 0.5 else "sin")
    found = trained("Copy", task, protocol, tmp_path)
    state = found.model.state_dict()
    progress = [state.pop(key) for key in list(state) if "gate" in key]
    assert all(value == 1 for value in progress)
    assert_same(state, expected.state_dict())
    assert found.curve["mean_gate"] == ([1, 0, 0, 0] if epochs == 4 else [1, 0, 0])


def test_line_falls_linearly_from_1_to_0(tmp_path):
    found = trained("Line", photos(), PHOTOS, tmp_path)
    assert found.curve["mean_gate"] == [0.75, 0.5, 0.25, 0.0]
    by_step: list[float] = []
    again = training("Line", photos(), PHOTOS)
    unit = next(unit for _, unit in gated_activations(again.model))
    unit.register_forward_pre_hook(lambda *_: by_step.append(unit.gate.predict().max().item()))
    again._train_epoch()
    assert by_step[:2] == [1.0, 1 - 1 / 8]


# ---- learned gates


@pytest.mark.parametrize("row", LEARNED)
@pytest.mark.parametrize(
    "changes",
    [{}, {"reduction": "neurons", "gamma": 1e-3}, {"gate_lr": 5.0, "gate_weight_decay": 0.3}],
    ids=["plain", "neurons", "own settings"],
)
def test_gates_follow_the_loss_plus_gamma_times_the_risk(row, changes, tmp_path):
    protocol, task = dataclasses.replace(MIXED, **changes), photos()
    found = trained(row, task, protocol, tmp_path)

    torch.manual_seed(3)
    source = find_row(row).source
    model = task.network(source)
    initialise(model, source, protocol)
    model.to(memory_format=torch.channels_last)
    convert(model, gate=find_row(row).gate, init="alpha", example_input=task.example)
    start = {path: unit.log_alpha.detach().clone() for path, unit in gated_activations(model)}
    gates = [unit.log_alpha for _, unit in gated_activations(model)]
    held = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if id(p) not in held]
    decay = protocol.gate_weight_decay
    own = {
        "lr": protocol.gate_lr * protocol.lr,
        "weight_decay": protocol.weight_decay if decay is None else decay,
    }
    optimizer = SGD(
        [{"params": weights}, {"params": gates, **own}],
        lr=protocol.lr,
        momentum=0.9,
        weight_decay=protocol.weight_decay,
        nesterov=True,
    )
    scheduler = CosineAnnealingWarmRestarts(optimizer, protocol.epochs * 2)
    for _ in range(protocol.epochs):
        for inputs, targets in task.batches(protocol.batch_size):
            risk = protocol.gamma * structural_risk(model, protocol.reduction)
            optimizer.zero_grad()
            (task.loss(model.train(), inputs, targets) + risk).backward()
            nn.utils.clip_grad_norm_(weights, protocol.clip)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(found.model.state_dict(), model.state_dict(), rtol=1e-5, atol=1e-6)
    for path, unit in gated_activations(found.model):
        assert not torch.allclose(unit.log_alpha, start[path], atol=1e-3)


def test_gates_start_from_the_seed_and_so_do_weights():
    task = photos()
    one, same, other = (training("relu->sin", task, PHOTOS, seed).model for seed in (1, 1, 2))
    plain = training("relu", task, PHOTOS, 1).model
    assert_same(one.state_dict(), same.state_dict())
    assert not torch.equal(one.act1.log_alpha, other.act1.log_alpha)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)
    assert torch.equal(one.conv1.weight, plain.conv1.weight)


# ---- interruptions


@pytest.mark.parametrize("row", [row.name for row in ROWS])
def test_a_training_stopped_after_every_epoch_goes_on_bit_for_bit(row, tmp_path):
    protocol = dataclasses.replace(MIXED, noise="example", restart=1, restart_factor=2)
    task = photos()
    whole = trained(row, task, protocol, tmp_path)
    after = torch.rand(3)
    checkpoint, ends, told = tmp_path / "part.pt", [], []
    for part in range(protocol.epochs):
        now = training(row, task, protocol, seed=3 + part)  # nothing of a later start may be left
        ends.append(now.run(checkpoint, lambda t: told.append(t.epoch), until=NOW))
    assert ends == [False, False, False, True]
    assert told == [1, 2, 3, 4]
    assert torch.equal(torch.rand(3), after)
    assert_same(now.model.state_dict(), whole.model.state_dict())
    assert now.curve == whole.curve
    assert (
        now.optimizer.state_dict()["param_groups"] == whole.optimizer.state_dict()["param_groups"]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["part.pt"]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path):
    task, file = photos(), tmp_path / "gpu.pt"
    training("relu", task, PHOTOS).run(file, until=NOW)
    state = torch.load(file, weights_only=True)
    torch.save(state | {"random_cuda": torch.zeros(16, dtype=torch.uint8)}, file)
    found = training("relu", task, PHOTOS)
    assert found.run(file)
    assert found.curve == trained("relu", task, PHOTOS, tmp_path).curve


# ---- results


@pytest.mark.parametrize("row", ["relu", "Line", "Bern", "resin->sin"])
def test_a_diverging_training_is_reported_and_leaves_no_checkpoint(row, tmp_path):
    protocol = Protocol(epochs=30, batch_size=32, lr=1e9)
    found = training(row, bessel(), protocol)
    assert found.run(tmp_path / "checkpoint.pt", until=time.time() + 600)
    result = found.result()
    assert 1 <= result["diverged"] == found.epoch < 30
    assert (result["conv"], result["best"], result["sites"]) == (None, None, [])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert all(math.isfinite(value) for value in result["curve"]["score"])
    assert not list(tmp_path.iterdir())


def test_a_network_that_the_last_step_ruined_has_diverged(tmp_path):
    class Ruined(SmallBessel):
        def score(self, model: nn.Module) -> float:
            return math.inf

    found = trained("relu", Ruined(torch.device("cpu")), BESSEL, tmp_path)
    assert found.result()["diverged"] == 1
    json.dumps(found.result(), allow_nan=False)


@pytest.mark.parametrize("row", ["tanh", "relu->sin"])
def test_a_result_is_small_json_of_plain_numbers(row, tmp_path):
    found = trained(row, photos(), MIXED, tmp_path)
    result = found.result()
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["row"] == row
    assert result["diverged"] is None
    scores = result["curve"]["score"]
    assert (result["conv"], result["best"]) == (scores[-1], min(scores))
    assert result["curve"]["epoch"] == [1, 2, 3, 4]
    gated = row == "relu->sin"
    assert [site["gates"] for site in result["sites"]] == [16, 16, 16, 32, 32, 64, 64] * gated
    assert ("mean_gate" in result["curve"]) == gated
    if gated:
        total = sum(site["gates"] * site["mean_gate"] for site in result["sites"])
        assert result["curve"]["mean_gate"][-1] == pytest.approx(total / 240, rel=1e-3)


def test_of_a_long_training_200_moments_are_kept_at_most_and_the_last_one(tmp_path):
    protocol = Protocol(epochs=401, batch_size=200, lr=0.01)
    found = trained("sin", bessel(), protocol, tmp_path)
    epochs = found.curve["epoch"]
    assert epochs == [*range(3, 401, 3), 401]
    assert len(json.dumps(found.result())) < 20_000


# ---- machines


@pytest.fixture
def settings_of_torch():
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("row", ["relu", "tanh->sin"])
def test_bfloat16_agrees_to_its_rounding(row, tmp_path):
    full = trained(row, photos(), MIXED, tmp_path)
    half = trained(row, photos(), MIXED, tmp_path, precision="bf16")
    assert half.curve["loss"] == pytest.approx(full.curve["loss"], rel=0.03)
    assert half.curve["loss"] != full.curve["loss"]
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}


def test_in_bfloat16_activations_still_see_and_return_float32():
    seen, narrow = [], training("relu->sin", photos(), MIXED, precision="bf16")
    for _, unit in gated_activations(narrow.model):
        unit.register_forward_hook(lambda _, x, y: seen.extend([x[0].dtype, y.dtype]))
    narrow._train_epoch()
    assert set(seen) == {torch.float32}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
@pytest.mark.parametrize(("row", "noise"), [("resin->sin", "none"), ("Copy", "batch")])
def test_compiled_steps_agree_with_eager_ones(row, noise, tmp_path, settings_of_torch):
    protocol = dataclasses.replace(EVEN, noise=noise)
    eager = trained(row, bessel(), protocol, tmp_path)
    Machine(compile=True).prepare()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = trained(row, bessel(), protocol, tmp_path, compile=True)
    for name, values in eager.curve.items():
        assert found.curve[name] == pytest.approx(values, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
def test_compiled_trainings_with_noise_go_on_bit_for_bit_also_in_one_process(
    tmp_path, settings_of_torch
):
    with torch._dynamo.config.patch(error_on_recompile=True):  # as a new network would be
        Machine(compile=True).prepare()
        whole = trained("resin->sin", bessel(), EVEN, tmp_path, compile=True)
        for seed in (3, 4):
            Machine(compile=True).prepare()
            part = training("resin->sin", bessel(), EVEN, seed=seed, compile=True)
            part.run(tmp_path / "part.pt", until=NOW)
    assert_same(part.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"precision": "fp16"}, "use 'fp32', 'tf32' or 'bf16'"),
        ({"device": "gpu"}, "use 'cpu' or 'cuda'"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_machines_that_there_are_not_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Machine(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
def test_without_cuda_the_cpu_is_the_fastest_and_cuda_is_refused():
    assert Machine.fastest() == Machine("cpu", "fp32", compile=False, threads=1)
    assert Machine(threads=2).name == "CPU, 2 threads"
    with pytest.raises(ValueError, match="torch sees no CUDA device; use 'cpu'"):
        Machine("cuda")


def test_a_machine_sets_the_process_up(settings_of_torch):
    assert Machine(threads=2, precision="tf32").prepare() == torch.device("cpu")
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.allow_tf32
    Machine().prepare()
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.allow_tf32


# ---- jobs

SHORT = Protocol(epochs=6, batch_size=128, lr=0.01, gamma=0.1, init="alpha")


def job(folder: Path, row: str = "resin->sin", protocol: Protocol = SHORT, **more: Any) -> Job:
    return Job("bessel", row, 1, protocol, Machine(), folder, **more)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_job_leaves_its_result_and_nothing_else(tmp_path, settings_of_torch):
    folder = tmp_path / "new" / "folder"
    result = job(folder).run()
    assert names(folder) == ["resin-to-sin-1.json"]
    assert json.loads(job(folder).file.read_text()) == result == job(folder).finished()
    assert result["settings"] == {"task": "bessel", "limit": None} | SHORT.to_dict()
    assert (result["seed"], result["machine"]["device"]) == (1, "cpu")
    assert result["curve"]["epoch"] == [1, 2, 3, 4, 5, 6]


def test_finished_jobs_are_yielded_first_and_not_done_again(tmp_path, settings_of_torch):
    jobs = [job(tmp_path, row) for row in ("Copy", "sin", "resin->sin")]
    done = jobs[2].run()
    written = jobs[2].file.stat()
    results = list(run_jobs(jobs, workers=1))
    assert results[0] == done
    assert [result["row"] for result in results] == ["resin->sin", "Copy", "sin"]
    assert names(tmp_path) == ["copy-1.json", "resin-to-sin-1.json", "sin-1.json"]
    again = jobs[2].file.stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert list(run_jobs(jobs, workers=1, minutes=0)) == [results[1], results[2], results[0]]


def test_results_of_other_settings_are_refused_before_anything_is_run(tmp_path, settings_of_torch):
    job(tmp_path).run()
    for other in (
        job(tmp_path, protocol=dataclasses.replace(SHORT, gamma=0.2)),
        job(tmp_path, limit=7),
    ):
        with pytest.raises(ValueError, match=r"resin-to-sin-1\.json was made with other settings"):
            next(run_jobs([job(tmp_path, "relu"), other], workers=1))
    assert names(tmp_path) == ["resin-to-sin-1.json"]
    faster = dataclasses.replace(job(tmp_path), machine=Machine(threads=2))
    assert faster.finished() is not None


@pytest.mark.slow
def test_when_the_time_is_up_nothing_is_begun(tmp_path):
    assert list(run_jobs([job(tmp_path / "none"), job(tmp_path / "none", "sin")], 1, 0)) == []
    assert not (tmp_path / "none").exists()


def test_a_job_whose_time_is_up_keeps_a_checkpoint_for_its_own_settings(
    tmp_path, settings_of_torch
):
    long = dataclasses.replace(SHORT, epochs=100_000)
    first = job(tmp_path, protocol=long, until=time.time() + 2)
    assert first.run() is None
    assert first.checkpoint.exists()
    assert not first.file.exists()
    epoch = torch.load(first.checkpoint, weights_only=True)["epoch"]
    assert 1 <= epoch < 100_000
    assert f"epoch {epoch} of 100000" in first.file.with_suffix(".log").read_text()
    other = job(tmp_path)
    assert other.run()["curve"]["epoch"] == [1, 2, 3, 4, 5, 6]
    assert first.checkpoint.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from transfer_surgery.reproduce import trainer
from transfer_surgery.reproduce.jobs import Job
from transfer_surgery.reproduce.machine import Machine
from transfer_surgery.reproduce.protocol import Protocol

save = trainer.Training.save

def save_or_die(training, file):
    if training.epoch == 4:
        file.with_suffix(".part").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(training, file)

trainer.SAVE_EVERY = 0.0
trainer.Training.save = save_or_die
protocol = Protocol(epochs=6, batch_size=128, lr=0.01, gamma=0.1, init="alpha")
Job("bessel", "resin->sin", 1, protocol, Machine(), Path(sys.argv[1])).run()
"""


def test_a_job_killed_while_it_writes_goes_on_from_its_last_checkpoint(tmp_path, settings_of_torch):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")])
    assert killed.returncode == -signal.SIGKILL
    again, whole = job(tmp_path / "killed"), job(tmp_path / "whole")
    assert torch.load(again.checkpoint, weights_only=True)["epoch"] == 3
    resumed, expected = again.run(), whole.run()
    for key in ("curve", "sites", "fit", "conv", "best", "diverged", "settings"):
        assert resumed[key] == expected[key]
    assert again.finished() == resumed
    assert not again.checkpoint.exists()
