"""``transfer-surgery finetune``: of a folder or a model, killed and resumed, and its errors."""

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

from tests.helpers.shell import in_process, invoke
from transfer_surgery import ModelSpec, convert, load_baked, load_model, save_model
from transfer_surgery.cli.finetuning.checkpoint import Checkpoint
from transfer_surgery.units import gated_activations

DIGITS = ("--set", "in_chans=1", "--input-size", "1x24x24")
TRAINING = ("--data", "digits", "--epochs", 2, "--batch-size", 200, "--schedule", "back_to_front")


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


def assert_same(folder: str, expected: str) -> None:
    """Two folders hold models with the same values bit for bit, and the same way to make them."""
    states = load_model(folder).state_dict(), load_model(expected).state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[0][key]) for key, value in states[1].items())
    assert Path(folder, "model.json").read_text() == Path(expected, "model.json").read_text()


def pictures(folder: Path, classes: tuple[str, ...]) -> Path:
    for part in ("train", "val"):
        for label in classes:
            (folder / part / label).mkdir(parents=True)
            for i in range(3):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / part / label / f"{i}.png")
    return folder


# --- a model by name -----------------------------------------------------------------------------


def test_from_a_checkpoint_of_timm_to_a_baked_network_in_two_lines(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    nn.init.constant_(model.fc.bias, 3.0)  # by which it is known later
    args = Namespace(model="test_resnet", lr=0.1)  # as train.py keeps them
    saver = CheckpointSaver(model, torch.optim.SGD(model.parameters()), args)
    saver.checkpoint_dir = str(tmp_path)
    saver.save_checkpoint(0, metric=50.0)
    command = ("finetune", "timm:test_resnet", *DIGITS, "--weights", "last.pth.tar")
    command += ("--target", "snake(a=0.5)", "--granularity", "layer", "--lr", 0, *TRAINING)
    told = in_process(*command, "-o", "run")
    assert told.stderr == "run: 12 sites, 12 gates, relu -> snake(a=0.5)\n"
    assert told.stdout.splitlines()[-1].startswith("run: test accuracy ")
    assert told.stdout.splitlines()[-1].endswith("%, 100.0% transferred")
    in_process("bake", "run", "-o", "model.safetensors")
    assert torch.equal(load_baked("model.safetensors").fc.bias, model.fc.bias)


@pytest.mark.parametrize("name", ["test_resnet", "nets.py:make"])
def test_it_does_what_convert_and_finetune_do_bit_for_bit(name: str) -> None:
    Path("nets.py").write_text(
        "import timm\n"
        "def make(num_classes=7, in_chans=1):\n"
        "    return timm.create_model('test_resnet', num_classes=num_classes, in_chans=in_chans)\n"
    )
    outputs = ("--set", "num_classes=10")
    invoke("convert", name, *DIGITS, *outputs, "--seed", 3, "-o", "two")
    invoke("finetune", "two", *TRAINING, "--seed", 3)
    once = ("finetune", name, *DIGITS, *TRAINING, "--seed", 3, "-o", "one")
    if name == "test_resnet":
        invoke(*once)
    else:  # a function may call the number of outputs otherwise
        message = invoke(*once, fails=1)
        assert "has 7 outputs, the data 10 classes: convert it with --set num_cl" in message
        invoke(*once, *outputs)
    assert_same("one", "two")


@pytest.mark.parametrize("name", ["test_resnet", "torchvision:squeezenet1_1"])
def test_a_model_of_a_zoo_gets_an_output_per_class(name: str, tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", ("cat", "dog", "eel"))
    command = ("finetune", name, "--input-size", "3x64x64", "--data", data, "--epochs", 1)
    invoke(*command, "--batch-size", 4, "-o", "run")
    assert load_model("run").num_classes == 3
    message = invoke(*command, "--set", "num_classes=4", "-o", "other", fails=1)
    assert "the model has 4 outputs, the data 3 classes" in message
    assert not Path("other").exists()


# --- killed and resumed --------------------------------------------------------------------------


def test_a_training_that_was_killed_goes_on_bit_for_bit(kill: Kill) -> None:
    for folder in ("whole", "killed"):
        invoke("convert", "test_resnet", *DIGITS, "--set", "num_classes=10", "-o", folder)
    invoke("finetune", "whole", *TRAINING)
    kill("finetune", "killed", *TRAINING)
    assert "killed was trained: --resume" in invoke("finetune", "killed", *TRAINING, fails=2)
    changed = invoke("finetune", "killed", *TRAINING, "--resume", "--lr", 1, fails=1)
    assert "lr was 0.01, is 1.0 now. Go on with the same settings" in changed
    invoke("finetune", "killed", *TRAINING, "--resume")
    assert_same("killed", "whole")
    invoke("convert", "test_resnet", *DIGITS, "-o", "killed", "--force")
    assert not Path("killed/training.pt").exists()


def test_a_model_by_name_goes_on_by_the_same_command_or_by_its_folder(kill: Kill) -> None:
    trained = timm.create_model("test_resnet", in_chans=1, num_classes=10)
    torch.save(trained.state_dict(), "trained.pth")
    command = ("finetune", "test_resnet", *DIGITS, *TRAINING, "--weights", "trained.pth")
    command += ("--target", "snake", "--match")
    invoke(*command, "-o", "whole", "--resume")  # of nothing: it begins
    for folder, again in (
        ("one", (*command, "-o", "one")),
        ("two", ("finetune", "two", *TRAINING)),
    ):
        kill(*command, "-o", folder)
        assert f"{folder} was trained: --resume" in invoke(*again, fails=2)
        invoke(*again, "--resume")
        assert_same(folder, "whole")


def test_a_model_by_name_does_not_go_on_as_another(kill: Kill) -> None:
    command = ("finetune", "test_resnet", *TRAINING, "-o", "run", "--resume")
    kill(*command, *DIGITS)
    for options, message in (
        (["--target", "cos"], "target was sin, is cos now. Go on with the same options"),
        (["--granularity", "layer"], "granularity was channel, is layer now"),
        (["--set", "base_width=32"], "arguments was {'in_chans': 1, 'num_classes': 10}, is {"),
        (["--input-size", "1x32x32"], "input_size was (1, 24, 24), is (1, 32, 32) now"),
    ):
        assert message in invoke(*command, *DIGITS, *options, fails=1)
    message = invoke("finetune", "resnet18", *DIGITS, *TRAINING, "-o", "run", "--resume", fails=1)
    assert "name was test_resnet, is resnet18 now" in message


def test_a_folder_of_mixed_sites_does_not_go_on_as_one_that_has_one_kind() -> None:
    spec = ModelSpec("test_resnet", {"in_chans": 1, "num_classes": 10}, (1, 24, 24))
    model = spec.build()
    granularity = {"act1": "channel", "*": "layer"}
    convert(model, "sin", example_input=spec.example_input(model), granularity=granularity)
    save_model(model, "run", spec)
    command = ("finetune", "test_resnet", *DIGITS, *TRAINING, "-o", "run", "--resume")
    message = "granularity was layer and channel, is channel now"
    assert message in invoke(*command, fails=1)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "there is no folder rum. If it is a model, say with -o DIR where it goes."),
        (["test_resnet"], "there is no folder test_resnet. If it is a model, say with -o DIR"),
        (["resnet18", "--pretrained"], "If it is a model, say with -o DIR where it goes."),
        (["resnt50", "-o", "new"], "there is no model 'resnt50'. Did you mean resnet50 or"),
        (["test_resnet", "-o", "new", "--target", "sine"], "unknown activation 'sine'"),
        (["test_resnet", "-o", "new", "--weights", "no.pth"], "'no.pth' does not exist"),
        (["test_resnet", "-o", "new", "--match"], "give --weights or --pretrained, too"),
        (["test_resnet", "-o", "new", "--set", "size=3"], "unexpected keyword argument 'size'"),
        (["test_resnet", "-o", "run"], "run holds a model: --resume, or another folder"),
        (["run", "-o", "new"], "trained there as it was converted: leave out --output. If a model"),
        (["run", "--set", "a=1", "--target", "sin"], "leave out --target, --set. If a model of"),
    ],
)
def test_what_there_is_not_ends_with_status_2(arguments: list[str], message: str) -> None:
    invoke("convert", "test_resnet", *DIGITS, "-o", "run")
    assert message in invoke("finetune", *arguments, "--data", "digits", fails=2)
    assert [path.name for path in Path().iterdir()] == ["run"]
    assert not Path("run/training.pt").exists()


def test_a_folder_may_have_the_name_of_a_model() -> None:
    options = (*DIGITS, *TRAINING, "--epochs", 1)
    invoke("finetune", "test_resnet", *options, "-o", "test_resnet")
    message = invoke("finetune", "test_resnet", *options, "-o", "other", fails=2)
    assert "If a model of timm's is meant: timm:test_resnet." in message
    invoke("finetune", "timm:test_resnet", *options, "-o", "other")
    invoke("finetune", "test_resnet", *options, "-o", "test_resnet", "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mnist"], "Known data: digits, cifar10, or a folder"),
        (
            ["--data", "digits"],
            "takes 3 channels, the data has 1: convert it with --set in_chans=1",
        ),
        (["--data", "digits", *DIGITS], "convert it with --set num_classes=10"),
    ],
)
def test_data_that_does_not_fit_is_said_before_training(options: list[str], message: str) -> None:
    size = options[2:] or ("--input-size", "3x32x32")
    invoke("convert", "test_resnet", *size, "-o", "run")
    assert message in invoke("finetune", "run", *options[:2], fails=1)
    if "num_classes" not in message:
        command = ("finetune", "test_resnet", *size, *options[:2])
        assert message in invoke(*command, "-o", "new", fails=1)
        assert not Path("new").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--fraction", 0, "lies in (0, 1]"), ("--opt", "best", "best"), ("--device", "here", "here")],
)
def test_settings_that_cannot_be_leave_no_folder(option: str, value: Any, message: str) -> None:
    command = ("finetune", "test_resnet", *DIGITS, "--data", "digits", "-o", "run")
    assert message in invoke(*command, option, value, fails=1)
    assert not Path("run").exists()


def test_a_training_that_diverges_ends_with_a_line() -> None:
    command = ("finetune", "test_resnet", *DIGITS, *TRAINING, "--lr", 1e30, "-o", "run")
    message = invoke(*command, fails=1)
    assert "is not finite (nothing was updated). Lower the learning rate" in message


@pytest.mark.filterwarnings("ignore:a gate saw fewer than 30 values")  # of some ten pictures
def test_targets_are_matched_to_images_of_a_folder(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data", ("cat", "dog"))
    invoke("convert", "test_resnet", "--set", "num_classes=2", "--input-size", "3x32x32", "-o", "r")
    options = ("--epochs", 1, "--batch-size", 3, "--match", "--gamma", 0.1, "--opt", "adamw")
    assert "periods" in invoke("finetune", "r", "--data", data, *options)
    assert all(unit.fitted is not None for _, unit in gated_activations(load_model("r")))
