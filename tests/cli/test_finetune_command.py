"""``transfer-surgery finetune``: trained, killed and resumed, and its errors."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.utils import CheckpointSaver
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from tests.helpers.same_bits import assert_same_bits
from tests.helpers.shell import in_process, invoke
from transfer_surgery import load_model
from transfer_surgery.cli.finetuning.checkpoint import Checkpoint
from transfer_surgery.cli.finetuning.images import ImageData, MemoryLoader, Preprocessing
from transfer_surgery.cli.finetuning.training import Machine, train
from transfer_surgery.units import gated_activations

DIGITS = ("--set", "in_chans=1", "--input-size", "1x24x24")
TEN_DIGITS = (*DIGITS, "--set", "num_classes=10")
TRAINING = ("--data", "digits", "--epochs", 2, "--batch-size", 200, "--order", "back_to_front")


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


Kill = Callable[..., None]


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Kill:
    """Runs a command and kills it after the state of the first epoch, before its model."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    def save(checkpoint: Checkpoint, *args: Any, save: Any = Checkpoint.save) -> None:
        checkpoint.saved = interrupt
        save(checkpoint, *args)

    def run(*command: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save)
            invoke(*command, fails=130)

    return run


def pictures(folder: Path, classes: tuple[str, ...]) -> Path:
    for part in ("train", "val"):
        for label in classes:
            (folder / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


# --- trained, killed and resumed -----------------------------------------------------------------


def test_a_checkpoint_of_timm_is_converted(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    args = Namespace(model="test_resnet", lr=0.1)  # as train.py keeps them
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters()), args)
    saver.checkpoint_dir = str(tmp_path)
    saver.save_checkpoint(0, metric=50.0)
    command = ("convert", "timm:test_resnet", *TEN_DIGITS, "--weights", "last.pth.tar")
    command += ("--target", "snake(a=0.5)", "--granularity", "layer", "-o", "run")
    assert in_process(*command).stderr == "run: 12 sites, 12 gates, relu -> snake(a=0.5)\n"
    assert torch.equal(load_model("run").fc.bias, model.fc.bias)


def test_a_training_that_was_killed_goes_on_bit_for_bit(kill: Kill) -> None:
    trained = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    torch.save(trained.state_dict(), "trained.pth")
    for file in ("whole", "killed"):
        invoke("convert", "test_resnet", *TEN_DIGITS, "--weights", "trained.pth", "-o", file)
    training = (*TRAINING, "--match")
    invoke("finetune", "whole", *training, "--resume")  # there is nothing yet: it begins
    kill("finetune", "killed", *training)
    assert "killed was trained: continue with --resume" in invoke(
        "finetune", "killed", *training, fails=2
    )
    changed = invoke("finetune", "killed", *training, "--resume", "--lr", 1, fails=1)
    assert "lr was 0.01 and is 1.0 now. Continue with the same settings" in changed
    invoke("finetune", "killed", *training, "--resume")
    assert_same_bits(load_model("killed"), load_model("whole"))
    state = torch.load("killed.training.pt", weights_only=True)
    for damaged in (b"damaged", state | {"model": {}}, {"settings": state["settings"]}):
        torch.save(damaged, "killed.training.pt")
        said = invoke("finetune", "killed", *training, "--resume", fails=1)
        assert "is damaged, or is not the state of a training" in said


def test_a_long_training_of_short_epochs_goes_on_between_two_records(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """416 epochs of one step, of which every third would be recorded, and the 364th is tested."""
    images, labels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    loader = MemoryLoader(images, labels, 4, Preprocessing(torch.device("cpu"), 2, (0.5,), (0.5,)))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint = Checkpoint(Path("state"), model, {}, lambda: None)
    checkpoint.save(363, optimizer, OneCycleLR(optimizer, 0.1, total_steps=416))
    data, machine = ImageData(loader, loader, classes=2), Machine(torch.device("cpu"))
    train(model, data, optimizer, machine, epochs=416, title="long", checkpoint=checkpoint)
    assert "epoch 364: loss 0." in capsys.readouterr().out


# --- mistakes ------------------------------------------------------------------------------------


def test_what_is_no_converted_model_is_refused(tmp_path: Path) -> None:
    message = invoke("finetune", "resnet18", "--data", "digits", fails=2)
    assert "'resnet18' does not exist" in message
    (tmp_path / "file").write_text("other")
    message = invoke("finetune", "file", "--data", "digits", fails=1)
    assert "file is damaged, or is not a safetensors file" in message


@pytest.mark.parametrize(
    ("data", "convert", "message"),
    [
        ("mnist", ["--input-size", "3x32x32"], "Known data: digits, cifar10, or a folder"),
        ("digits", ["--input-size", "3x32x32"], "takes 3 channels, the data has 1: convert it"),
        ("digits", DIGITS, "convert it with --set num_classes=10"),
        ("digits", [*DIGITS, "--set", "num_classes=0", "--set", "global_pool=''"], "classifiers"),
    ],
)
def test_data_that_does_not_fit_is_said_before_training(
    data: str, convert: list[str], message: str
) -> None:
    invoke("convert", "test_resnet", *convert, "-o", "run")
    assert message in invoke("finetune", "run", "--data", data, fails=1)
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_a_model_of_other_inputs_than_images_is_refused(tmp_path: Path) -> None:
    make = tmp_path / "nets.py"
    make.write_text(
        "from torch import nn\ndef net(): return nn.Sequential(nn.Linear(4, 3), nn.ReLU())"
    )
    invoke("convert", f"{make}:net", "--input-size", "4", "-o", "run")
    message = invoke("finetune", "run", "--data", "digits", fails=1)
    assert "the model takes (4,), and this command trains on images" in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--fraction", 0, "lies in (0, 1]"),
        ("--opt", "best", "best"),
        ("--device", "here", "here"),
        ("--lr", 1e30, "is not finite (nothing was updated). Lower the learning rate"),
    ],
)
def test_settings_that_cannot_be_end_with_a_line(option: str, value: Any, message: str) -> None:
    invoke("convert", "test_resnet", *TEN_DIGITS, "-o", "run")
    assert message in invoke("finetune", "run", *TRAINING, option, value, fails=1)
    assert not Path("run.training.pt").exists()


@pytest.mark.filterwarnings("ignore:a gate saw fewer than 30 values")  # of some ten pictures
def test_targets_are_matched_to_images_of_a_folder(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", ("cat", "dog"))
    invoke("convert", "test_resnet", "--set", "num_classes=2", "--input-size", "3x32x32", "-o", "r")
    options = ("--epochs", 1, "--batch-size", 3, "--match", "--opt", "adamw")
    assert "periods" in invoke("finetune", "r", "--data", data, *options)
    assert all(unit.fitted is not None for _, unit in gated_activations(load_model("r")))
