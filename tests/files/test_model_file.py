"""Converted and baked models in files come back with the outputs that they had."""

from __future__ import annotations

import copy
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.helpers.kinds import KINDS, become, match, mix, transfer
from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    ModelSpec,
    bake,
    convert,
    fold_targets,
    load_baked,
    load_model,
    report,
    save_baked,
    save_gates,
    save_model,
)
from transfer_surgery.files import read_gates

SIZE = (3, 32, 32)
NETS = Path(__file__).parents[1] / "helpers" / "networks.py"
MODELS = {
    "timm": ModelSpec("timm:test_resnet", {"num_classes": 10}, SIZE),
    "no prefix": ModelSpec("test_efficientnet", {"num_classes": 10}, SIZE),
    "torchvision": ModelSpec("torchvision:squeezenet1_1", {}, (3, 64, 64)),
    "rewritten": ModelSpec(f"{NETS}:functional", {}, (2, 5, 5)),
    "overwriting": ModelSpec(f"{NETS}:in_place", {}, (2, 5, 5)),
    "root": ModelSpec(f"{NETS}:small_cnn", {}, (2, 5, 5)),
}


def converted(name: str, *kinds: Any) -> tuple[nn.Module, ModelSpec, Tensor]:
    spec = MODELS[name]
    model = spec.build().eval()
    convert(model, example_input=spec.example_input(model))
    assert spec.input_size is not None
    return become(model, *kinds), spec, torch.randn(3, *spec.input_size)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_gives_back_the_converted_model(name: str, file: Path) -> None:
    model, spec, x = converted(name, *KINDS)
    save_model(model, file, spec)
    again = load_model(file)
    assert torch.equal(again.eval()(x), model(x))
    assert str(report(read_gates(file))) == str(report(model))
    become(again, transfer)
    save_model(again, file)  # as after training: how it is made is known
    assert torch.equal(load_model(file).eval()(x), again(x))


@pytest.mark.parametrize("options", [{}, {"harden": True}])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_file_gives_back_the_baked_model(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model, spec, x = converted(name, *KINDS)
    save_baked(model, tmp_path / "baked", spec, **options)
    again = load_baked(tmp_path / "baked").eval()
    bake(model, **options)
    assert torch.equal(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()


@torch.no_grad()
def test_a_folded_model_comes_back_without_the_numbers_that_are_gone(tmp_path: Path) -> None:
    model, spec, x = converted("root", match)
    before = sum(p.numel() for p in model.parameters())
    found = save_baked(model, tmp_path / "baked", spec, fold=x)
    again = load_baked(tmp_path / "baked").eval()
    expected = fold_targets(bake(model), x)
    assert found == expected
    assert [row.path for row in expected] == ["2", "3.1"]
    assert torch.equal(again(x), model(x))
    assert [type(module) for module in again.modules()] == [type(m) for m in model.modules()]
    assert sum(p.numel() for p in again.parameters()) == expected.parameters_after < before


@torch.no_grad()
def test_a_model_keeps_gates_and_values_when_it_is_saved_baked_or_cannot_be(file: Path) -> None:
    model, spec, x = converted("root", match)
    before = copy.deepcopy(model)
    tensors = [id(parameter) for parameter in model.parameters()]
    foreign = file.with_name("foreign")
    foreign.write_bytes(b"other program")
    with pytest.raises(ValueError, match="It is not replaced"):
        save_baked(model, foreign, spec)
    with pytest.raises(ValueError, match="does not run on the example input"):
        save_baked(model, file, spec, fold=torch.zeros(2, 7, 5, 5))
    assert not file.exists()
    save_baked(model, file, spec, fold=x)
    assert [id(parameter) for parameter in model.parameters()] == tensors
    assert_same_bits(model, before)


def test_the_tensors_of_a_transferred_model_have_the_names_of_the_original(tmp_path: Path) -> None:
    model, spec, _ = converted("timm", transfer)
    save_baked(model, tmp_path / "baked", spec)
    spec.build().load_state_dict(load_file(tmp_path / "baked"))


@pytest.mark.parametrize("load", [load_model, load_baked])
def test_a_file_is_opened_once(load: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, spec, _ = converted("root", *KINDS)
    (save_model if load is load_model else save_baked)(model, file, spec)
    opened = []

    def watched(*args: Any, **options: Any) -> Any:
        opened.append(args[0])
        return safe_open(*args, **options)

    monkeypatch.setattr("safetensors.safe_open", watched)
    load(file)
    assert opened == [file]


# --- how models are made -------------------------------------------------------------------------


def test_a_file_may_have_dataclasses_and_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "widths_beside.py").write_text("WIDTH = 3\n")
    (tmp_path / "copy.py").write_text(  # named like a module that is loaded
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "@dataclass\n"
        "class Config:\n"
        "    inputs: int = 4\n"
        "def net():\n"
        "    from widths_beside import WIDTH\n"
        "    return nn.Linear(Config().inputs, WIDTH)\n"
    )
    before = list(sys.path)
    model = ModelSpec(f"{tmp_path}/copy.py:net").build()
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (3, 4)
    assert sys.path == before
    assert sys.modules["copy"] is copy


def test_a_name_without_prefix_is_timm_s_then_torchvision_s() -> None:
    assert type(ModelSpec("resnet18").build()).__module__ == "timm.models.resnet"
    torchvision = ModelSpec("squeezenet1_0", {"num_classes": 7}).build()
    assert type(torchvision).__module__ == "torchvision.models.squeezenet"
    assert torchvision(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_torchvision_is_enough_where_timm_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    model = ModelSpec("squeezenet1_0").build()
    assert type(model).__module__ == "torchvision.models.squeezenet"
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="models by name need timm or torchvision"):
        ModelSpec("squeezenet1_0").build()


def test_a_spec_survives_json() -> None:
    for spec in MODELS.values():
        assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


# --- what is refused -----------------------------------------------------------------------------


def refuse(error: type[Exception], match: str, load: Any, path: Path) -> None:
    with pytest.raises(error, match=match):
        load(path)


def rewrite(file: Path, change: Any) -> None:
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["transfer_surgery"])
    change(about)
    save_file(load_file(file), file, {"transfer_surgery": json.dumps(about)})


def test_foreign_and_damaged_files_of_models_are_refused(file: Path) -> None:
    refuse(FileNotFoundError, "does not exist", load_model, file)
    model, spec, _ = converted("root", mix)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_model(model, file)
    save_gates(model, file)
    refuse(ValueError, "holds 'gates', not model", load_model, file)
    file.unlink()
    save_model(model, file, spec)
    for size in ([3, 10**6, 10**6], [3, -1, 4], ["3", 8, 8], "3x8x8"):
        rewrite(file, lambda about, size=size: about["made_by"].update(input_size=size))
        refuse(ValueError, "does not say how a model is made", load_model, file)
    rewrite(file, lambda about: about.pop("made_by"))
    refuse(ValueError, "does not say how a model is made", load_model, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [10**13]}, r"shape \[10000000000000\] in the file, \[6\] here"),
        ({"outcome": "gone"}, "the site '2' has the outcome 'gone'"),
        ({"target": "sine"}, "the site '2' cannot be built: unknown activation 'sine'"),
        ({"source": "silu"}, "2: source silu in the file, relu here"),
        ({"call": [1, 2]}, r"2: call \[1, 2\] in the file, None here"),
    ],
)
def test_sites_of_baked_files_that_cannot_be_are_refused(
    change: dict[str, Any], message: str, file: Path
) -> None:
    refuse(FileNotFoundError, "does not exist", load_baked, file)
    model, spec, _ = converted("root", mix)
    save_baked(model, file, spec)
    rewrite(file, lambda about: about["sites"]["2"].update(change))
    refuse(ValueError, message, load_baked, file)


def test_a_baked_mixture_of_values_that_are_none_is_refused(file: Path) -> None:
    model, spec, _ = converted("root", mix)
    save_baked(model, file, spec)
    for value in (float("nan"), 1.5):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(file) | {"2.z": torch.full((6,), value)}, file, metadata)
        refuse(ValueError, "saved.safetensors: 2.z has values outside 0 to 1", load_baked, file)


@pytest.mark.parametrize("harden", [False, True])
@pytest.mark.parametrize("gate", ["hard_concrete", "bernoulli"])
def test_gates_that_are_not_a_number_are_neither_baked_nor_saved(
    gate: str, harden: bool, file: Path
) -> None:
    spec = MODELS["root"]
    model = spec.build()
    convert(model, example_input=spec.example_input(model), gate=gate)
    modules = list(model.modules())
    model.get_parameter("3.1.gate.log_alpha").data[2] = torch.nan
    with pytest.raises(ValueError, match=r"^3\.1: its gates have values that are not a number"):
        bake(model, harden)
    assert list(model.modules()) == modules
    with pytest.raises(ValueError, match=r"^3\.1: its gates have values that are not a number"):
        save_baked(model, file, spec, harden=harden)
    assert not file.exists()


def test_code_that_makes_another_model_now_is_refused_with_the_file(file: Path) -> None:
    model, spec, _ = converted("root", mix)
    for save, load in ((save_model, load_model), (save_baked, load_baked)):
        file.unlink(missing_ok=True)
        save(model, file, spec)
        for made_by in (
            {"arguments": {"unknown": 1}},
            {"name": f"{NETS}:gone"},
            {"name": "timm:test_resnet", "arguments": {"num_classes": 10**15}},
        ):
            rewrite(file, lambda about, made_by=made_by: about["made_by"].update(made_by))
            refuse(ValueError, f"{file.name}: ", load, file)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_file_gives_back_the_precision(file: Path, dtype: torch.dtype) -> None:
    model, spec, _ = converted("root", mix)
    model.to(dtype)
    save_model(model, file, spec)
    assert_same_precision(load_model(file), model)
    file.unlink()
    save_baked(model, file, spec)
    assert_same_precision(load_baked(file), bake(model))


def test_a_file_gives_back_the_precision_of_buffers_that_it_leaves_out(
    tmp_path: Path, file: Path
) -> None:
    code = """
        import torch
        from torch import nn

        class Positions(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.act = nn.Linear(4, 4), nn.ReLU()
                self.register_buffer("near", torch.ones(4), persistent=False)
                self.register_buffer("far", torch.ones(4), persistent=False)

            def forward(self, x):
                return self.act(self.linear(x + self.near)) + self.far
    """
    (tmp_path / "positions.py").write_text(textwrap.dedent(code))
    spec = ModelSpec(f"{tmp_path / 'positions.py'}:Positions", {}, (4,))
    model = spec.build().to(torch.bfloat16)
    model.far = model.far.double()
    convert(model, example_input=torch.zeros(2, 4, dtype=torch.bfloat16))
    save_model(model, file, spec)
    again = load_model(file)
    assert (again.near.dtype, again.far.dtype) == (torch.bfloat16, torch.float64)
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(again.eval()(x), model.eval()(x))
    save_baked(model, tmp_path / "baked", spec)
    assert torch.equal(load_baked(tmp_path / "baked").eval()(x), model(x))
    rewrite(file, lambda about: about["buffers"].update(near="int8"))
    refuse(ValueError, "'int8' is no precision of a buffer", load_model, file)


def assert_same_precision(found: nn.Module, wanted: nn.Module) -> None:
    ours, theirs = found.state_dict(), wanted.state_dict()
    assert {key: x.dtype for key, x in ours.items()} == {key: x.dtype for key, x in theirs.items()}
    assert all(torch.equal(x, theirs[key]) for key, x in ours.items())


def test_integers_are_no_weights(file: Path) -> None:
    """As of a network that another library has quantized."""
    model, spec, _ = converted("root", mix)
    model.half()
    save_model(model, file, spec)
    assert_same_precision(load_model(file), model)
    model[0].weight = nn.Parameter(model[0].weight.to(torch.int8), requires_grad=False)
    save_model(model, file)
    message = "0.weight is torch.int8, and torch.float32 in the model"
    refuse(ValueError, message, load_model, file)


def test_a_spec_that_no_file_can_hold_is_refused_when_it_is_made() -> None:
    for size in ((3, -1), (3, 0), (2**20, 2**20)):
        with pytest.raises(ValueError, match=r"input_size=.*: give a shape such as"):
            ModelSpec("resnet18", {}, size)


def test_weights_of_another_model_are_refused_by_name(file: Path) -> None:
    model, _, _ = converted("root", mix)
    save_model(model, file, MODELS["rewritten"])
    refuse(ValueError, r"does not fit this _Functional \(\d+ of \d+ ", load_model, file)
