"""A training that is resumed in mid-transfer ends as if nothing had happened, bit for bit.

Checkpoints are written in two ways: as one file, and in parts (weights, gates, and the rest).
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    HardConcrete,
    Line,
    TransferSchedule,
    convert,
    load_gates,
    save_gates,
    wrap_optimizer,
)

STEPS, SAVED = 18, 8
PROJECTION = {"transfer": TransferSchedule(STEPS)}
SETTINGS = {
    "sgd": PROJECTION,
    "adamw": PROJECTION,
    "adamw in order": {"transfer": TransferSchedule(STEPS, order="back_to_front")},
    "sgd line": PROJECTION,
    "sgd gamma": {"gamma": 30.0, "gamma_warmup": 14, "gate_lr": 5.0},
    "adamw gamma": {"gamma": 30.0, "gamma_warmup": 14, "gate_lr": 0.5},
}


class Net(nn.Module):
    """A child, a function in an edited forward, dropout, running statistics."""

    def __init__(self):
        super().__init__()
        self.one, self.norm, self.act = nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU()
        self.drop, self.two, self.head = nn.Dropout(0.3), nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.one(x))))
        return self.head(F.gelu(self.two(x)))


X = torch.zeros(2, 6)


def start(setting, seed, model=None):
    """Model, optimizer and scheduler as before the first step."""
    torch.manual_seed(seed)
    gate = Line() if "line" in setting else HardConcrete(noise="example")
    model = convert(Net(), gate=gate, example_input=X) if model is None else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if "sgd" in setting
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    wrap_optimizer(optimizer, model, **SETTINGS[setting])
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train(run, steps):
    model, optimizer, scheduler = run
    for _ in range(steps):
        x = torch.randn(16, 6)
        loss = F.cross_entropy(model.train()(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def save_whole(folder, run):
    torch.save([*(part.state_dict() for part in run), torch.get_rng_state()], folder / "saved.pt")


def load_whole(folder, setting):
    run = start(setting, seed=99)
    *saved, random = torch.load(folder / "saved.pt", weights_only=True)
    for part, state in zip(run, saved, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    return run


def save_parts(folder, run):
    model, *others = run
    weights = {k: v for k, v in model.state_dict().items() if ".gate." not in k}
    save_file(weights, folder / "model.safetensors")
    save_gates(model, folder / "gates")
    torch.save([*(one.state_dict() for one in others), torch.get_rng_state()], folder / "rest.pt")


def load_parts(folder, setting):
    torch.manual_seed(98)
    base = Net()
    base.load_state_dict(load_file(folder / "model.safetensors"))
    run = start(setting, 99, load_gates(base, folder / "gates", example_input=X))
    *saved, random = torch.load(folder / "rest.pt", weights_only=True)
    for part, state in zip(run[1:], saved, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    return run


ROUTES = {"whole": (save_whole, load_whole), "parts": (save_parts, load_parts)}


def end_of(run):
    return [run[0].state_dict(), run[1].state_dict(), torch.get_rng_state()]


def finish(_, folder, setting, route):
    """As a process of its own does: resume, train to the end, keep what there is then."""
    torch.set_num_threads(1)
    run = ROUTES[route][1](folder, setting)
    train(run, STEPS - SAVED)
    torch.save(end_of(run), folder / "end.pt")


@pytest.fixture(autouse=True)
def _one_thread():
    """For so small a network more threads only wait for each other, and round in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


IN_A_NEW_PROCESS = ("sgd gamma", "parts")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_resumes_bit_for_bit_in_mid_transfer(setting, route, tmp_path):
    run = start(setting, seed=0)
    train(run, SAVED)
    ROUTES[route][0](tmp_path, run)
    gates = {name: value.clone() for name, value in run[0].state_dict().items() if "gate" in name}
    # Not at either end, where the gates would draw no noise and the schedule would not move them.
    assert any(((values > -8) & (values < 6)).any() for values in gates.values())
    train(run, STEPS - SAVED)
    end = end_of(run)
    if (setting, route) == IN_A_NEW_PROCESS:
        torch.multiprocessing.spawn(finish, (tmp_path, setting, route))
    else:
        finish(0, tmp_path, setting, route)
    assert_same_bits(torch.load(tmp_path / "end.pt", weights_only=True), end)
