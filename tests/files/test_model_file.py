"""Converted models in folders and baked ones in files come back with the outputs that they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.kinds import KINDS, become, match, mix, transfer
from transfer_surgery import (
    ModelSpec,
    convert,
    load_baked,
    load_model,
    report,
    save_baked,
    save_gates,
    save_model,
)
from transfer_surgery.files import read_gates

SIZE = (3, 32, 32)
NETS = Path(__file__).parents[1] / "helpers" / "compiled.py"
MODELS = {
    "timm": ModelSpec("timm:test_resnet", {"num_classes": 10}, SIZE),
    "no prefix": ModelSpec("test_efficientnet", {"num_classes": 10}, SIZE),
    "torchvision": ModelSpec("torchvision:squeezenet1_1", {}, (3, 64, 64)),
    "rewritten": ModelSpec(f"{NETS}:Functional", {}, (2, 5, 5)),
    "overwriting": ModelSpec(f"{NETS}:InPlace", {}, (2, 5, 5)),
    "root": ModelSpec(f"{NETS}:modules", {}, (2, 5, 5)),
}


def converted(name: str, *kinds: Any) -> tuple[nn.Module, ModelSpec, Tensor]:
    spec = MODELS[name]
    model = spec.build().eval()
    convert(model, example_input=spec.example_input(model))
    assert spec.input_size is not None
    return become(model, *kinds), spec, torch.randn(3, *spec.input_size)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_folder_gives_back_the_converted_model(name: str, tmp_path: Path) -> None:
    model, spec, x = converted(name, *KINDS)
    save_model(model, tmp_path, spec)
    again = load_model(tmp_path)
    assert torch.equal(again.eval()(x), model(x))
    assert str(report(read_gates(tmp_path))) == str(report(model))
    become(again, transfer)
    save_model(again, tmp_path)  # as after training: how it is made is known
    assert torch.equal(load_model(tmp_path).eval()(x), again(x))


@pytest.mark.parametrize("options", [{}, {"harden": True}])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_gives_back_the_baked_model(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, spec, x = converted(name, *KINDS)
    save_baked(model, tmp_path / "baked", spec, **options)
    again = load_baked(tmp_path / "baked").eval()
    assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_a_folded_model_comes_back_without_the_numbers_that_are_gone(tmp_path: Path) -> None:
    model, spec, x = converted("root", match)
    before = sum(p.numel() for p in model.parameters())
    save_baked(model, tmp_path / "baked", spec, fold=x)
    again = load_baked(tmp_path / "baked").eval()
    assert torch.equal(again(x), model(x))
    assert sum(p.numel() for p in again.parameters()) < before


def test_the_tensors_of_a_transferred_model_have_the_names_of_the_original(tmp_path: Path) -> None:
    model, spec, _ = converted("timm", transfer)
    save_baked(model, tmp_path / "baked", spec)
    spec.build().load_state_dict(load_file(tmp_path / "baked"))


# --- how models are made -------------------------------------------------------------------------


def test_a_name_without_prefix_is_timm_s_then_torchvision_s() -> None:
    assert type(ModelSpec("resnet18").build()).__module__ == "timm.models.resnet"
    torchvision = ModelSpec("squeezenet1_0", {"num_classes": 7}).build()
    assert type(torchvision).__module__ == "torchvision.models.squeezenet"
    assert torchvision(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_spec_survives_json() -> None:
    for spec in MODELS.values():
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


# --- what is refused -----------------------------------------------------------------------------


def refuse(error: type[Exception], match: str, load: Any, path: Path) -> None:
    with pytest.raises(error, match=match):
        load(path)


def test_damaged_foreign_newer_and_unfinished_folders_are_refused(tmp_path: Path) -> None:
    refuse(FileNotFoundError, "is no folder", load_model, tmp_path / "nowhere")
    refuse(FileNotFoundError, r"holds no model\.json.*It holds: nothing", load_model, tmp_path)
    model, spec, _ = converted("root", mix)
    with pytest.raises(FileNotFoundError, match=r"holds no model\.json"):
        save_model(model, tmp_path)
    save_model(model, tmp_path, spec)
    for name, text, error in (
        ("model.json", "{", r"model\.json: Expecting"),
        ("model.json", "{}", "written by another program"),
        ("model.json", '{"format": "transfer_surgery.model", "version": 2}', "up to 1: upgrade"),
        ("model.json", '{"format": "transfer_surgery.model", "version": 1}', "how a model is made"),
        ("config.json", "{}", "no checkpoint of gates"),
        ("gates.safetensors", "{}", "gates.safetensors is damaged"),
        ("model.safetensors", "{}", "model.safetensors is damaged"),
    ):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(text)
        refuse(ValueError, error, load_model, tmp_path)
        (tmp_path / name).write_bytes(good)
    load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuse(FileNotFoundError, "never finished", load_model, tmp_path)


def test_gates_and_weights_of_different_saves_are_refused(tmp_path: Path) -> None:
    model, spec, _ = converted("root", mix)
    save_model(model, tmp_path, spec)
    save_gates(become(model, transfer), tmp_path)
    refuse(ValueError, "are of different saves", load_model, tmp_path)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "baked"
    refuse(FileNotFoundError, "there is no file", load_baked, file)
    file.write_text("nothing")
    refuse(ValueError, "is damaged, or no safetensors file", load_baked, file)
    tensors = {"x": torch.zeros(1)}
    newer = {"format": "transfer_surgery.baked", "version": 2}
    unfinished = {**newer, "version": 1, **MODELS["root"].to_dict()}
    for metadata, error in (
        (None, "written by another program"),
        (newer, "up to 1: upgrade"),
        (unfinished, "no baked network of this library: 'gates'"),
    ):
        save_file(tensors, file, metadata and {"transfer_surgery": json.dumps(metadata)})
        refuse(ValueError, error, load_baked, file)


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path) -> None:
    model, _, _ = converted("root", mix)
    save_model(model, tmp_path, MODELS["rewritten"])
    refuse(ValueError, r"does not fit this Functional \(19 of 6 ", load_model, tmp_path)
