"""Baked networks in files that run without this library, with the outputs that they had."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
import sys
import zipfile
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.compiled import NETS
from tests.helpers.kinds import KINDS, Kind, become, match_and_mix, mix, transfer
from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import bake, convert, export_onnx, export_program

# Sizes as small as each model allows.
MODELS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_vit": {"img_size": 64},
    "resnet50": {},
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "efficientnet_b0": {},
    "mobilenetv3_small_100": {},
    "regnety_002": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2},
    "mixer_s32_224": {"img_size": 64},
    "densenet121": {"block_config": (2, 4, 2, 2)},
    "poolformer_s12": {},
}
# In CI the others stand for these.
LONG = ("resnet50", "mobilenetv3_small_100", "regnety_002", "vit_tiny_patch16_224", "mixer_s32_224")
LONG += ("densenet121", "poolformer_s12")


@torch.no_grad()
def baked(model: nn.Module, x: Tensor, *kinds: Kind) -> nn.Module:
    """A baked model whose sites are, in turn, of these kinds."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.uniform_(0.2, 0.8)  # some start at 0 or 1e-6, and hide what is behind them
        elif not parameter.any():
            parameter.normal_(std=0.02)
    return bake(become(convert(model.eval(), example_input=x), *kinds))


def timm_model(name: str) -> nn.Module:
    model: nn.Module = timm.create_model(name, num_classes=10, **MODELS[name])
    return model


def run_onnx(file: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(file)
    names = [given.name for given in session.get_inputs()]
    (found,) = session.run(None, dict(zip(names, [x.numpy() for x in inputs], strict=True)))
    return torch.from_numpy(found)


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of the largest output."""
    assert found.shape == expected.shape
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def assert_both_files_run(model: nn.Module, x: Tensor, folder: Path) -> None:
    export_onnx(model, x, folder / "model.onnx")
    export_program(model, x, folder / "model.pt2")
    program = torch.export.load(folder / "model.pt2").module()
    for size in (1, 5):
        other = torch.randn(size, *x.shape[1:])
        assert_close(run_onnx(folder / "model.onnx", other), model(other))
        assert_close(program(other), model(other))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow, *[pytest.mark.long] * (name in LONG)])
        for name in MODELS
    ],
)
@torch.no_grad()
def test_timm_models_with_sites_of_every_kind_are_exported_compiled_and_traced(
    name: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 64, 64)
    model = baked(timm_model(name), x, *KINDS)
    assert_both_files_run(model, x, tmp_path)
    assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
    with pytest.warns((FutureWarning, torch.jit.TracerWarning)):  # deprecated; sizes are constants
        traced = torch.jit.trace(model, x)  # type: ignore[no-untyped-call]
    assert_close(traced(x), model(x))


def test_each_kind_of_site_at_each_granularity(tmp_path: Path) -> None:
    """One network of all: its sites are of the kinds in turn, each at the next granularity."""
    x = torch.randn(3, 4, 5)
    names, pairs = cycle(("layer", "channel", "neuron")), math.lcm(len(KINDS), 3)
    layers = [layer for _ in range(pairs) for layer in (nn.Conv1d(4, 4, 1), nn.ReLU())]
    granularity = {f"{2 * i + 1}": name for i, name in zip(range(pairs), names, strict=False)}
    model = convert(nn.Sequential(*layers), granularity=granularity, example_input=x).eval()
    model = bake(become(model, *KINDS))
    assert_both_files_run(model, x, tmp_path)


@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")
@torch.no_grad()
def test_inductor_compiles_a_baked_model() -> None:
    x = torch.randn(2, 2, 5, 5)
    model = baked(NETS["modules"](), x, transfer, mix, match_and_mix)
    assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize("name", NETS)
def test_rewritten_and_overwriting_calls_are_exported(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 2, 5, 5)
    assert_both_files_run(baked(NETS[name](), x, mix, transfer), x, tmp_path)


@pytest.mark.slow
def test_files_run_where_the_library_is_not_installed(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = baked(timm_model("test_resnet"), x, *KINDS)
    export_onnx(model, x, tmp_path / "model.onnx")
    export_program(model, x, tmp_path / "model.pt2")
    x = torch.randn(4, 3, 32, 32)
    np.save(tmp_path / "x.npy", x.numpy())
    code = """
import sys
for name in ("transfer_surgery", "zoo_adapters", "timm"):
    sys.modules[name] = None  # importing it is an error
import numpy, onnxruntime
x = numpy.load("x.npy")
numpy.save("onnx.npy", onnxruntime.InferenceSession("model.onnx").run(None, {"x": x})[0])
assert "torch" not in sys.modules
import torch
numpy.save("program.npy", torch.export.load("model.pt2").module()(torch.from_numpy(x)).detach())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        for name in ("onnx", "program"):
            assert_close(torch.from_numpy(np.load(tmp_path / f"{name}.npy")), model(x))


class TwoInputs(nn.Linear):
    def forward(self, x: Tensor, scale: float, *, offset: Tensor, table: Tensor) -> Tensor:
        return (super().forward(x) * scale + offset).relu() @ table


def test_every_input_that_holds_a_batch_has_any_size_and_a_name(tmp_path: Path) -> None:
    arguments = {
        "x": torch.randn(2, 4),
        "scale": 2.0,
        "offset": torch.randn(2, 3),
        "table": torch.randn(3, 5),
    }
    model = bake(convert(TwoInputs(4, 3), example_input=arguments))
    program = export_onnx(model, arguments, tmp_path / "model.onnx")
    shapes = [str(given.shape) for given in program.model.graph.inputs]
    assert shapes == ["[batch,4]", "[batch,3]", "[3,5]"]
    x, offset = torch.randn(7, 4), torch.randn(7, 3)
    with torch.no_grad():
        expected = model(x, 2.0, offset=offset, table=arguments["table"])
    found = run_onnx(tmp_path / "model.onnx", x, offset, torch.as_tensor(arguments["table"]))
    assert_close(found, expected)


def test_what_is_exported_is_the_model_in_eval_mode_which_stays_in_training(tmp_path: Path) -> None:
    x = torch.randn(1, 4)  # a single example
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.BatchNorm1d(8))
    model = bake(convert(model, example_input=x)).train()
    model[3].eval()
    before = copy.deepcopy(model)
    export_program(model, x, tmp_path / "model.pt2")
    assert [m.training for m in model] == [True, True, True, False]
    assert_same_bits(model, before)
    x = torch.randn(6, 4)
    with torch.no_grad():
        assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model.eval()(x))


# --- what is refused -----------------------------------------------------------------------------


class FixedBatch(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(2, -1)


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_gates_are_refused_and_nothing_is_written(
    export: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.zeros(2, 4)
    model = convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), example_input=x)
    with pytest.raises(ValueError, match=r"still has gates at 1 sites, such as '1': call bake"):
        export(model, x, tmp_path / "file")
    with pytest.raises(ValueError, match="give tensors, tuples of arguments or dicts"):
        export(bake(model), [x], tmp_path / "file")
    with pytest.raises(ValueError, match="no tensor in example_input has an axis of examples"):
        export(model, torch.tensor(1.0), tmp_path / "file")
    with pytest.raises(RuntimeError, match=r"cannot export this FixedBatch for batches of any"):
        export(FixedBatch(), x, tmp_path / "file")
    with pytest.raises(ValueError, match=r"Linear does not run on example_input: float32 \(2, 4\)"):
        export(nn.Linear(3, 3), x, tmp_path / "file")
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("export", [export_onnx, export_program])
def test_only_an_empty_file_or_one_of_the_same_kind_is_replaced(
    export: Any, tmp_path: Path
) -> None:
    x = torch.zeros(2, 4)
    file, other, foreign = tmp_path / "file", tmp_path / "other", tmp_path / "foreign"
    file.touch()
    file.chmod(0o600)
    for size in (3, 5):  # a smaller network and a larger one
        export(nn.Linear(4, size), x, file)
    assert file.stat().st_mode & 0o777 == 0o600
    (export_program if export is export_onnx else export_onnx)(nn.Linear(4, 3), x, other)
    save_file({"x": x}, foreign)
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("zip/archive_format", b"other")
    (tmp_path / "text").write_text("My thesis")
    for path in (other, foreign, tmp_path / "zip", tmp_path / "text", tmp_path):
        before = path.is_dir() or path.read_bytes()
        with pytest.raises(ValueError, match=f"{path.name} is .* It is not replaced: choose"):
            export(nn.Linear(4, 3), x, path)
        assert before == (path.is_dir() or path.read_bytes())


def test_large_weights_go_beside_an_onnx_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 100)
    model, x = nn.Linear(40, 50), torch.randn(2, 40)
    (tmp_path / "model.onnx.data").write_text("of another program")
    for _ in range(2):
        with pytest.raises(OSError, match=r"model\.onnx\.data goes beside it and exists"):
            export_onnx(model, x, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx.data").read_text() == "of another program"
        (tmp_path / "model.onnx").touch()  # an empty file may be replaced; it has no such part
    (tmp_path / "model.onnx.data").unlink()
    for _ in range(2):
        export_onnx(model, x, tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert_close(run_onnx(tmp_path / "model.onnx", x), model(x).detach())


def test_without_onnx_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[onnx\]'"):
        export_onnx(nn.ReLU(), torch.zeros(2), tmp_path / "model.onnx")
