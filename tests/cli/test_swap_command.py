"""``transfer-surgery swap``: what it writes and prints, beside plain torch, and its errors."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms.functional import to_tensor

from tests.helpers.photos import draw_photos
from tests.helpers.shell import in_process, invoke, shell
from transfer_surgery import load_baked
from transfer_surgery.cli.swapping.folders import read_labels

NETS = """
from torch import nn

def make(classes=2, act=nn.SiLU):
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act(), nn.Conv2d(8, 8, 3), act()
    head = nn.Conv2d(8, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, *head)

class Conv(nn.Module):
    default_act = nn.SiLU(inplace=True)  # one object for all, as in YOLO

    def __init__(self, before, after):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(before, after, 3), nn.BatchNorm2d(after)
        self.act = self.default_act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

def yolo():
    return nn.Sequential(Conv(3, 6), Conv(6, 6), nn.Conv2d(6, 4, 1))

def gray():
    layers = nn.Conv2d(1, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    return nn.Sequential(*layers)

def prediction():
    return make().half().requires_grad_(False)

def yes_or_no():
    return nn.Sequential(make(), nn.Linear(2, 1))

def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14 * 14, 2))
"""
IMAGES = ("--images", "train", "--input-size", "3x16x16", "--mean", "0.5", "--std", "0.25")
SWAP = ("swap", "nets.py:make", *IMAGES, "-o", "model.safetensors")


def make(**arguments: Any) -> nn.Sequential:
    names: dict[str, Any] = {}
    exec(NETS, names)
    model: nn.Sequential = names["make"](**arguments)
    return model


def read(folder: Path) -> tuple[Tensor, Tensor]:
    images = [
        (path, label)
        for label, name in enumerate(("dark", "light"))
        for path in sorted((folder / name).iterdir())
    ]
    pixels = torch.stack([to_tensor(Image.open(path)) for path, _ in images])
    return (pixels - 0.5) / 0.25, torch.tensor([label for _, label in images])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a network that has learned them, and its checkpoint as timm's train.py writes it."""
    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    (folder / "nets.py").write_text(NETS)
    draw_photos(folder / "train", 32)
    draw_photos(folder / "val", 30)
    model, (x, y) = make(), read(folder / "train")
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    saver = CheckpointSaver(
        make(),
        optimizer,
        args=Namespace(model="make", lr=0.1),
        model_ema=ModelEmaV3(model),
        checkpoint_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=98.0)
    return folder


@pytest.fixture(autouse=True)
def _there(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in data.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


def original() -> nn.Sequential:
    model = make()
    model.load_state_dict(torch.load("model_best.pth.tar", weights_only=False)["state_dict_ema"])
    return model.eval()


# --- what it writes and prints -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:distill did not bring")
def test_what_is_printed_of_the_original_and_of_the_file_is_what_plain_torch_finds() -> None:
    options = ("--weights", "model_best.pth.tar", "--labels", "val", "--distill-steps", 10)
    told = in_process(*SWAP, *options, "--json")
    assert told.stderr.splitlines()[-1] == "wrote model.safetensors"
    assert "64 images to fit to, 60 to compare on: 16x16 pixels; mean 0.5, 0.5" in told.stderr
    found = json.loads(told.stdout)
    assert found["examples"] == 60
    assert found["numbers"] == {}
    stages = {row["stage"]: row for row in found["rows"]}
    assert [*stages] == [
        "original",
        "swapped alone",
        "matched, refitted",
        "distilled",
        "baked, folded",
    ]

    x, y = read(Path("val"))
    swapped = load_baked("model.safetensors").eval()
    assert [type(swapped[i]) for i in (2, 4)] == [nn.ReLU, nn.ReLU]
    plain = make(act=nn.ReLU).eval()  # an ordinary network with the tensors of the file
    plain.load_state_dict(swapped.state_dict())
    alone = make(act=nn.ReLU).eval()
    alone.load_state_dict(original().state_dict())
    with torch.no_grad():
        wanted = original()(x)
        for name, network in (
            ("original", original()),
            ("swapped alone", alone),
            ("baked, folded", plain),
        ):
            row, output = stages[name], network(x)
            error = (output - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
            assert row["errors"]["output"] == pytest.approx(error.item(), rel=1e-3, abs=1e-9)
            assert row["accuracy"] == (output.argmax(1) == y).double().mean().item()
            changed = (output.argmax(1) != wanted.argmax(1)).double().mean().item()
            assert row["changed"] == changed
            first = network[:3](x)
            zeros = [(h == 0).flatten() for h in (first, network[3:5](first))]
            assert row["zeros"] == pytest.approx(torch.cat(zeros).double().mean().item())
    errors = {name: row["errors"]["output"] for name, row in stages.items()}
    assert errors["matched, refitted"] < 0.5 * errors["swapped alone"]
    assert errors["distilled"] <= errors["swapped alone"]


@pytest.mark.slow  # two processes; warnings are lines for people, without the place in our code
def test_the_installed_command_prints_a_row_for_each_stage(tmp_path: Path) -> None:
    options = ("--weights", "model_best.pth.tar", "--target", "relu6", "--calibration", 20)
    printed, said = shell(*SWAP, *options, folder=tmp_path)
    rows = [line.split("  ")[0] for line in printed.splitlines()]
    assert rows[2:6] == ["original", "swapped alone", "matched, refitted", "baked, folded"]
    assert rows[6] == "Compared on 16 inputs that nothing was fitted to."
    assert "20 images to fit to, 16 to compare on" in said
    yolo = (*IMAGES, "--distill-steps", 1, "-o", "yolo.safetensors")
    _, said = shell("swap", "nets.py:yolo", *yolo, folder=tmp_path)
    assert "\nNote: distill did not bring the outputs nearer to the teacher's in 1 steps" in said


# Random weights: a ReLU without an offset explains little of them.
@pytest.mark.filterwarnings("ignore:less than 50% of the variance")
def test_a_network_for_prediction_is_swapped_in_float32_and_takes_all_numbers() -> None:
    found = json.loads(
        in_process("swap", "nets.py:prediction", *SWAP[2:], "--calibration", 30, "--json").stdout
    )
    assert found["numbers"] == found["left"] == {}
    network = load_baked("model.safetensors")
    assert {p.dtype for p in network.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:less than 50% of the variance")
def test_a_single_logit_answers_yes_or_no() -> None:
    labels = ("--labels", "val", "--no-refit")
    found = json.loads(in_process("swap", "nets.py:yes_or_no", *SWAP[2:], *labels, "--json").stdout)
    assert 0 <= found["rows"][0]["accuracy"] <= 1


@pytest.mark.filterwarnings("ignore:less than 50% of the variance")
def test_one_shared_in_place_activation_becomes_a_module_of_torch_at_each_site() -> None:
    told = invoke("swap", "nets.py:yolo", *IMAGES, "-o", "yolo.safetensors")
    assert "The weights are those that " in told
    network = load_baked("yolo.safetensors")
    assert [m for m in network.modules() if isinstance(m, nn.SiLU)] == []
    sites = [m for m in network.modules() if isinstance(m, nn.ReLU)]
    assert len(sites) == len(set(map(id, sites))) == 2


@pytest.mark.parametrize("target", ["hardswish", "snake", "sin", "polynomial"])
def test_other_targets(target: str) -> None:
    invoke(*SWAP, "--weights", "model_best.pth.tar", "--target", target, "--no-refit")
    assert target in str(load_baked("model.safetensors")).lower()


def test_sites_and_neurons_that_cost_most_are_kept() -> None:
    weights = ("--weights", "model_best.pth.tar", "--json")
    found = json.loads(in_process(*SWAP, *weights, "--keep-sites", 1).stdout)
    (kept,) = found["kept"]
    network = load_baked("model.safetensors")
    other = {"2": "4", "4": "2"}[kept]
    assert isinstance(network.get_submodule(kept), nn.SiLU)
    assert isinstance(network.get_submodule(other), nn.ReLU)
    found = json.loads(in_process(*SWAP, *weights, "--keep", 0.25).stdout)
    assert found["mixed"] != []


def test_images_are_resized_as_in_the_validation_of_timm() -> None:
    """Those of the size of the input stay as they are; half of a larger one is cut out."""
    Path("large").mkdir()
    for i in range(8):
        pixels = torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(f"large/{i}.jpg")
    options = ("--images", "large", "--crop-pct", 0.5, "--interpolation", "bilinear", "--offset")
    said = invoke(*SWAP, *options, "--lr", 0.1)
    assert "--lr: without effect" in said
    assert "6 images to fit to, 2 to compare on: 16x16 pixels, 0.5 of each cropped" in said


def test_labels_are_read_from_folders_and_from_a_file() -> None:
    folders = read_labels(Path("train"), Path("nowhere"))
    assert {(path.parent.name, label) for path, label in folders.items()} == {
        ("dark", 0),
        ("light", 1),
    }
    lines = [f"{path.relative_to('train')},{label}\n" for path, label in folders.items()]
    for heading in ("", "image,label\n", "\ufeff"):  # the last one as spreadsheets write it
        Path("labels.csv").write_text(heading + "".join(lines), encoding="utf-8")
        assert read_labels(Path("labels.csv"), Path("train")) == folders
    said = in_process(*SWAP, "--labels", "labels.csv", "--json")
    assert json.loads(said.stdout)["examples"] == 16


# --- errors, before anything is computed ---------------------------------------------------------


def _bad_folders() -> None:
    Path("empty").mkdir()
    Path("empty", "notes.txt").touch()
    Path("broken").mkdir()
    for i in range(4):
        Path(f"broken/{i}.png").write_bytes(Path("val/dark/0.png").read_bytes()[:200])
    Path("deep").mkdir()
    for i in range(4):
        Image.fromarray(torch.full((16, 16), 40_000).to(torch.uint16).numpy()).save(f"deep/{i}.png")
    Path("numbers").mkdir()
    for i in (1, 2, 10):
        Path(f"numbers/{i}").mkdir()
        Path(f"numbers/{i}/0.png").write_bytes(Path("val/dark/0.png").read_bytes())
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00")
    Path("wrong.csv").write_text("dark/0.png,0\ndark/1.png,light\n")
    Path("twice.csv").write_text("dark/0.png,0\ndark/1.png,1\ndark/0.png,1\n")
    Path("high.csv").write_text("dark/0.png,0\n" * 1 + "dark/1.png,7\nlight/0.png,7\n")
    Path("other.safetensors").write_text("mine")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--images", "nowhere"], 2, "'nowhere' does not exist"),
        (["--images", "empty"], 1, "empty has no images. Known are .jpg"),
        (["--images", "broken"], 1, ".png cannot be read as an image"),
        (["--images", "deep"], 1, "its pixels have more than 8 bits (PIL's mode I;16). Take it aw"),
        (["--input-size", "1x16x16"], 1, "does not run on images of 1x16x16: "),
        (["--mean", "0.5,0.5"], 1, "--mean has 2 numbers, and the model 3 channels"),
        (["--mean", "x"], 2, "--mean x: write numbers such as"),
        (["--std", "0"], 2, "--std 0: give numbers above 0"),
        (["--mean", "124"], 2, "--mean 124: give numbers from 0 to 1, as pixels are here"),
        (["--crop-pct", "0"], 2, "--crop-pct 0.0: give a share above 0"),
        (["--crop-pct", "87.5"], 2, "--crop-pct 87.5: give a share above 0, and 1 at most"),
        (["--interpolation", "cubic"], 2, "'cubic' is not one of 'nearest', 'bilinear', "),
        (["--target", "sine"], 2, "unknown activation 'sine'"),
        (["--source", "gelu"], 2, "matches none of the 2 sites"),
        (["--keep", "1.5"], 2, "write a number of neurons, or a share"),
        (["--keep", "100000"], 1, "keep=100000: give a number of the "),
        (["--keep-sites", "2"], 1, "keep_sites=2: there are 2 sites to swap"),
        (["--keep", "3", "--keep-sites", "1"], 1, "give one of keep=, keep_sites= and keep_point"),
        (["--keep-points", "0.5"], 1, "keep_points= needs labels="),
        (["-o", "missing/model.safetensors"], 2, "there is no folder missing. Make it first"),
        (["-o", "other.safetensors"], 1, "It is not replaced: choose another file"),
        (["-o", "empty"], 1, "empty is a folder"),
        (["--weights", "model_best.pth.tar", "--pretrained"], 2, "give --weights or --pretrained"),
        (["--set", "classes=3", "--weights", "model_best.pth.tar"], 1, "does not fit this Seq"),
        (["--labels", "numbers"], 1, "torchvision and timm number the classes 1, 10, 2 ... diff"),
        (["--labels", "bytes.csv"], 1, "bytes.csv is not a text with lines IMAGE,NUMBER"),
        (["--labels", "wrong.csv"], 1, "wrong.csv, line 2: "),
        (["--labels", "twice.csv"], 1, "twice.csv, line 3: dark/0.png has the class 1, and befo"),
        (["--labels", "val", "--set", "classes=3"], 1, "val has classes from 0 to 1, and the mod"),
        (["--labels", "high.csv"], 1, "high.csv has classes from 0 to 7, and the model re"),
    ],
)
def test_mistakes_end_before_anything_is_fitted(
    arguments: list[str], status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _bad_folders()
    before = sorted(Path().iterdir())
    said = invoke(*SWAP, *arguments, fails=status)
    assert message in said
    assert "swapped alone" not in said
    assert sorted(Path().iterdir()) == before


def test_grey_images_need_a_mean_and_a_deviation() -> None:
    command = ("swap", "nets.py:gray", "--images", "train", "--input-size", "1x16x16", "--offset")
    command = (*command, "-o", "m.safetensors")
    assert "nothing says how they are normalised: give --mean and --std" in invoke(
        *command, fails=1
    )
    assert "mean 0.5; standard deviation 0.25" in invoke(*command, "--mean", 0.5, "--std", 0.25)


def test_a_network_that_has_the_target_already_is_refused() -> None:
    said = invoke("swap", "nets.py:plain", *IMAGES, "-o", "m.safetensors", fails=1)
    assert "every activation selected is relu already" in said
    assert "images to fit to" not in said
