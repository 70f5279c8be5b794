"""The examples run in tiny settings and print what they promise."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from cifar_resnet import ResNet
from typer.testing import CliRunner

from transfer_surgery import find_activations
from transfer_surgery.cli.finetuning.images import MemoryLoader, Preprocessing

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs an example in this process, where a warning is an error; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(name: str, *arguments: object) -> str:
        app = typer.Typer()
        app.command()(importlib.import_module(name).main)
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def stages(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in figures["stages"]}


@pytest.mark.filterwarnings("ignore:distill did not bring")  # in so few steps
def test_the_demo_matches_swaps_distils_bakes_and_folds(
    run_example: Callable[..., str], tmp_path: Path
) -> None:
    printed = run_example(
        *("finetune_timm", "--pretrain-epochs", 1, "--epochs", 1),
        *("--batch-size", 240, "--image-size", 24, "--output", tmp_path),
    )
    assert "convert: outputs bit-identical" in printed
    assert "bake: outputs bit-identical" in printed
    assert "layer4.0.act2" in printed  # the table, site by site
    assert "periods" in printed  # that of the fits
    assert "parameters before" in printed  # that of the folding
    found = stages(json.loads((tmp_path / "figures.json").read_text()))
    assert list(found) == ["trained", "converted", "matched", "distilled", "baked", "folded"]
    assert found["converted"]["change"] == found["baked"]["change"] == 0
    assert found["folded"]["change"] < 1e-3
    assert found["converted"]["accuracy"] == found["trained"]["accuracy"]
    assert found["matched"]["transferred"] == found["distilled"]["transferred"] == 1
    assert found["matched"]["accuracy"] > found["trained"]["accuracy"] - 0.1
    assert (tmp_path / "match.png").read_bytes().startswith(b"\x89PNG")
    baked = torch.load(tmp_path / "baked.pt", weights_only=False)
    assert not [name for name, _ in baked.named_parameters() if "log_alpha" in name]


def test_the_paper_s_method_is_one_argument_away(
    run_example: Callable[..., str], tmp_path: Path
) -> None:
    printed = run_example(
        *("finetune_timm", "--no-match", "--pretrain-epochs", 1, "--epochs", 1),
        *("--batch-size", 240, "--image-size", 24, "--output", tmp_path),
    )
    assert "periods" not in printed
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "history.json").read_text())["total"]["transferred"][-1] == 1
    found = stages(json.loads((tmp_path / "figures.json").read_text()))
    assert list(found) == ["trained", "converted", "transferred", "baked"]
    baked = torch.load(tmp_path / "baked.pt", weights_only=False)
    assert not [name for name, _ in baked.named_parameters() if "fitted" in name]


@pytest.mark.filterwarnings("ignore:distill did not bring")  # in so few steps
def test_an_image_folder_and_a_checkpoint_with_other_classes(
    run_example: Callable[..., str], tmp_path: Path
) -> None:
    import timm
    from PIL import Image

    for part, number in (("train", 4), ("val", 2)):
        for label in ("cat", "dog"):
            folder = tmp_path / part / label
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    checkpoint = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), checkpoint)
    printed = run_example(
        *("finetune_timm", "--data", tmp_path, "--weights", checkpoint, "--opt", "adamw"),
        *("--pretrain-epochs", 1, "--epochs", 1, "--batch-size", 4, "--amp", "--gamma", 0.1),
        *("--granularity", "layer", "--target", "snake", "--output", tmp_path / "out"),
        "--no-match",
    )
    assert "convert: outputs bit-identical" in printed
    report = json.loads((tmp_path / "out" / "figures.json").read_text())["report"]
    assert report["total"]["granularity"] == "layer"
    assert report["total"]["target"].startswith("snake")
    assert report["total"]["transferred"] == 0  # two steps of a small gamma


@pytest.mark.slow
def test_the_trained_cifar_resnet_keeps_its_error_and_transfers_all(
    run_example: Callable[..., str], data_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"
    printed = run_example("cifar_resnet", *("--epochs", 1, "--images", 1024, "--output", output))
    assert "ResNet-20 as trained: test error 8.27%" in printed
    assert "converted: test error 8.27%" in printed
    assert "convert: outputs bit-identical" in printed
    assert "transferred: asked for 100.0%, reached 100.0%" in printed
    assert "bake: outputs bit-identical" in printed
    found = stages(json.loads(output.read_text()))
    assert found["ResNet-20, ReLU"]["accuracy"] == found["converted"]["accuracy"] == 0.9173
    assert found["baked"]["accuracy"] == found["transferred"]["accuracy"]


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_the_cifar_resnet_is_that_of_he_et_al(depth: int, parameters: int) -> None:
    model = ResNet(depth)
    assert sum(p.numel() for p in model.parameters()) == parameters
    plan = find_activations(model, torch.zeros(1, 3, 32, 32))
    assert len(plan) == depth - 1
    assert {(site.kind, site.way) for site in plan} == {("function", "edit")}


def test_loaders_show_every_image_once_and_only_training_changes_the_order() -> None:
    images, labels = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10)
    preprocessing = Preprocessing(CPU, size=16, mean=(0.5,), std=(0.5,))
    test = MemoryLoader(images, labels, 4, preprocessing)
    assert torch.equal(torch.cat([y for _, y in test]), labels)
    assert len(list(test)) == len(test) == 3
    train = MemoryLoader(images, labels, 4, preprocessing, training=True)
    seen = torch.cat([y for _, y in train])
    assert len(seen) == len(seen.unique()) == 8  # two whole batches
    x, _ = next(iter(train))
    assert x.shape == (4, 1, 16, 16)
    assert torch.equal(x, torch.full_like(x, -1))


@pytest.mark.parametrize(
    "options",
    [
        ["--fsdp", "--order", "front_to_back"],
        pytest.param([], marks=pytest.mark.long),  # DDP: also in tests/test_distributed.py
    ],
)
@pytest.mark.slow
def test_two_processes_transfer_everything_and_go_on_where_they_were(
    options: list[str], tmp_path: Path
) -> None:
    def trained(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        script = [EXAMPLES / "distributed.py", "--epochs", 3, "--batch-size", 120, *options]
        command = [sys.executable, *launcher, *map(str, script), "--checkpoint", str(folder)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, capture_output=True, text=True, env=one_thread)
        assert result.returncode == 0, result.stderr
        model = torch.load(folder / "baked.pt", weights_only=False)
        return result.stdout, dict(model.named_parameters())

    printed, weights = trained(tmp_path)
    assert "epoch 3: 100.0% transferred" in printed
    assert "baked: test accuracy" in printed
    (tmp_path / "latest").write_text("1")  # as if it had been killed in the second epoch
    printed, again = trained(tmp_path)
    assert "resumed after epoch 1\nepoch 2: " in printed
    torch.testing.assert_close(again, weights, rtol=0, atol=0)
