"""A small training that can be killed and resumed; `test_resume` starts it as a process.

python resume_script.py FOLDER SETTING[,SETTING ...] ROUTE [MOMENT]: trains from the last checkpoint
in FOLDER/SETTING, if there is one, and writes final.pt there. ROUTE is how checkpoints are written:
as one `whole` file, in `parts` (weights, gates, the rest), or not at all (`none`). MOMENT is when
it ends by kill -9.
"""

import io
import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from transfer_surgery import (
    HardConcrete,
    Line,
    TransferSchedule,
    convert,
    load_gates,
    save_gates,
    wrap_optimizer,
)

STEPS, EVERY = 18, 4
KILLED_AFTER = 10  # two steps after the second checkpoint
KILLED_WRITING = 8
PROJECTION = {"transfer": TransferSchedule(STEPS)}
SETTINGS = {
    "sgd": ("sgd", PROJECTION),
    "adamw": ("adamw", PROJECTION),
    "adamw in order": ("adamw", {"transfer": TransferSchedule(STEPS, order="back_to_front")}),
    "sgd line": ("sgd", PROJECTION),
    "sgd gamma": ("sgd", {"gamma": 30.0, "gamma_warmup": 14, "gate_lr": 5.0}),
    "adamw gamma": ("adamw", {"gamma": 30.0, "gamma_warmup": 14, "gate_lr": 0.5}),
}


class Net(nn.Module):
    """A child, a function in a rewritten caller, dropout, running statistics."""

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
    kind, how = SETTINGS[setting]
    gate = Line() if "line" in setting else HardConcrete(noise="example")
    model = convert(Net(), gate=gate, example_input=X) if model is None else model
    optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
        if kind == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    wrap_optimizer(optimizer, model, **how)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)


def train_step(model, optimizer, scheduler):
    x = torch.randn(16, 6)
    loss = F.cross_entropy(model.train()(x), x[:, :3].argmax(1))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(io.FileIO):
    """A file whose writer is killed when a part of it is written."""

    def write(self, data):
        if self.tell() > 3000:
            die()
        return super().write(data)


# --- one file ------------------------------------------------------------------------------------


def save_whole(folder, step, run, dying):
    model, optimizer, scheduler = (part.state_dict() for part in run)
    everything = {"step": step, "model": model, "optimizer": optimizer, "scheduler": scheduler}
    temporary = folder / "checkpoint.tmp"
    with (Dying if dying else io.FileIO)(temporary, "w") as file:
        torch.save(everything | {"random": torch.get_rng_state()}, file)
    os.replace(temporary, folder / "checkpoint.pt")


def resume_whole(folder, setting):
    run = start(setting, seed=99)
    if not (folder / "checkpoint.pt").exists():
        return 0, start(setting, seed=0)
    everything = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name, part in zip(("model", "optimizer", "scheduler"), run, strict=True):
        part.load_state_dict(everything[name])
    torch.set_rng_state(everything["random"])
    return everything["step"], run


# --- weights, gates and the rest -----------------------------------------------------------------


def save_parts(folder, step, run, dying):
    model, optimizer, scheduler = run
    unfinished = folder / f"{step:03}.tmp"
    unfinished.mkdir(exist_ok=True)
    state = model.state_dict().items()
    save_file({k: v for k, v in state if ".gate." not in k}, unfinished / "model.safetensors")
    if dying:  # when the gates are to get their name
        sys.addaudithook(lambda event, _: event == "os.rename" and die())
    save_gates(model, unfinished / "gates")
    rest = {"step": step, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(rest | {"random": torch.get_rng_state()}, unfinished / "rest.pt")
    unfinished.rename(unfinished.with_suffix(""))  # a folder of this name is complete


def resume_parts(folder, setting):
    finished = sorted(path for path in folder.iterdir() if path.name.isdigit())
    if not finished:
        return 0, start(setting, seed=0)
    torch.manual_seed(98)
    base = Net()
    base.load_state_dict(load_file(finished[-1] / "model.safetensors"))
    run = start(setting, 99, load_gates(base, finished[-1] / "gates", example_input=X))
    rest = torch.load(finished[-1] / "rest.pt", weights_only=True)
    run[1].load_state_dict(rest["optimizer"])
    run[2].load_state_dict(rest["scheduler"])
    torch.set_rng_state(rest["random"])
    return rest["step"], run


ROUTES = {
    "whole": (save_whole, resume_whole),
    "parts": (save_parts, resume_parts),
    "none": (None, lambda _, setting: (0, start(setting, seed=0))),
}


def main(folder, setting, route, moment=""):
    folder.mkdir(parents=True, exist_ok=True)
    save, resume = ROUTES[route]
    step, run = resume(folder, setting)
    print(f"starts at {step}", flush=True)
    while step < STEPS:
        train_step(*run)
        step += 1
        if step % EVERY == 0 and save is not None:
            save(folder, step, run, dying=moment == "writing" and step == KILLED_WRITING)
        if step == KILLED_AFTER and moment == "outside":
            print("kill me", flush=True)
            sys.stdin.read()  # of a pipe that is never written to
    final = {"model": run[0].state_dict(), "optimizer": run[1].state_dict()["state"]}
    torch.save(final | {"random": torch.get_rng_state()}, folder / "final.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2].split(","):
        main(Path(sys.argv[1]) / name, name, *sys.argv[3:])
