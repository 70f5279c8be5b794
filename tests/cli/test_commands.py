"""``transfer-surgery`` from a shell, from a plan to files that run elsewhere, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from tests.helpers.kinds import KINDS, become, match
from tests.helpers.shell import in_process, invoke, shell
from transfer_surgery import (
    Bernoulli,
    PerLayer,
    bake,
    load_baked,
    load_model,
    save_gates,
    save_model,
)
from transfer_surgery.files import read_gates
from transfer_surgery.units import VARIABLE

NETS = Path(__file__).parents[1] / "helpers" / "networks.py"


@pytest.fixture(autouse=True)
def _somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `convert`, after "training"."""
    file = tmp_path_factory.mktemp("run") / "run.safetensors"
    size = ("--set", "num_classes=10", "--input-size", "3x32x32")
    invoke("convert", "test_resnet", *size, "-o", file)
    save_model(become(load_model(file), *KINDS), file)
    return file


# --- from a shell --------------------------------------------------------------------------------


def test_from_a_checkpoint_to_files_that_run_elsewhere(tmp_path: Path) -> None:
    lines = in_process("plan", "test_resnet").stdout.splitlines()
    row = " ".join(lines[2].split())
    assert row.startswith("conv1.2 relu module (in place) hidden 2x16x80x80 1 1 ")
    assert row.endswith(" child")
    assert lines[-1].startswith("12 of 12 sites would be converted; gates: 12 per layer, 704 per")

    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "best.pth")
    options = ("--set", "num_classes=10", "--set", "in_chans=1", "--input-size", "1x24x24")
    options += ("--weights", "best.pth")
    said = in_process("convert", "test_resnet", *options, "-o", "run").stderr
    assert said == "run: 12 sites, 704 gates, relu -> sin\n"
    x = torch.randn(5, 1, 24, 24)
    converted = load_model(tmp_path / "run").eval()
    assert torch.equal(converted(x), model(x))

    told = in_process("finetune", "run", "--data", "digits", "--epochs", 1)
    assert "transferred, test accuracy" in told.stderr
    assert told.stdout.startswith("run: test accuracy ")
    assert told.stdout.endswith("%, 100.0% transferred\n")
    converted = become(load_model(tmp_path / "run").eval(), *KINDS)
    save_model(converted, tmp_path / "run")
    told = in_process("report", "run", "--by", "stage", "--plot", "gates.png")
    assert told.stdout.splitlines()[2].startswith("stem   ")
    assert told.stderr == "wrote gates.png\n"
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")

    in_process("bake", "run", "-o", "model.safetensors")
    with torch.no_grad():
        expected = bake(converted)(x)
        assert torch.equal(load_baked(tmp_path / "model.safetensors").eval()(x), expected)
        in_process("export", "run", "-o", "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # two processes; in this one, what they print is tested below
def test_the_installed_command_has_a_status_for_mistakes_and_failures(tmp_path: Path) -> None:
    _, said = shell("plan", "resnt50", folder=tmp_path, fails=2)
    assert "there is no model 'resnt50'. Did you mean resnet50 or" in said
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign")
    printed, said = shell("report", "foreign", folder=tmp_path, fails=1)
    assert not printed
    assert said.startswith("Error: foreign was written by another program, not by transfer_surgery")
    assert said.count("\n") == 1


# --- plan and convert ----------------------------------------------------------------------------


def test_a_plan_as_json_has_every_site_and_whether_it_would_be_converted() -> None:
    sites = planned("test_efficientnet")
    assert len(sites) == 13
    assert {site["role"] for site in sites if site["reason"] is None} == {"hidden"}
    assert sites[0]["shape"] == [2, 24, 80, 80]
    chosen = ("--source", "silu", "--include", "blocks.3", "--exclude", "*.se")
    paths = [site["path"] for site in planned("test_efficientnet", *chosen)]
    assert paths == ["blocks.3.0.bn1.act", "blocks.3.0.bn2.act"]
    gating = planned("test_efficientnet", "--role", "gating")
    assert {site["source"] for site in gating} == {"sigmoid"}


def planned(*arguments: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(invoke("plan", *arguments, "--json"))["rows"]
    return rows


def test_a_plan_says_why_sites_stay() -> None:
    printed = invoke("plan", "test_efficientnet")
    assert "not converted: role gating" in printed
    assert "11 of 13 sites would be converted" in printed
    (Path() / "nets.py").write_text("from torch.nn import *\ndef make(): return LSTM(4, 4)\n")
    printed = invoke("plan", "nets.py:make", "--input-size", "5x4", fails=1)
    assert "Error: no activation left to convert" in printed
    assert "not converted: " in printed


PRINTING = """
import atexit, ctypes, logging, os, subprocess, sys
from torch import nn

print("imported")
atexit.register(print, "ended")
logging.basicConfig(stream=sys.stdout, level=logging.INFO)

class Net(nn.ReLU):
    def forward(self, x):
        print("runs")
        ctypes.CDLL(None).puts(b"in C")
        return super().forward(x) + 1

def make():
    logging.info("made")
    os.write(1, b"written\\n")
    subprocess.run(["echo", "program"])
    return nn.Sequential(Net(), nn.ReLU(), nn.Linear(4, 4))
"""


def test_what_a_model_prints_in_any_way_is_not_among_the_results(tmp_path: Path) -> None:
    Path("nets.py").write_text(PRINTING)
    command = ("plan", "nets.py:make", "--input-size", 4, "--json")
    printed, said = shell(*command, folder=tmp_path)
    assert [site["path"] for site in json.loads(printed)["rows"]] == ["0.relu_0", "1"]
    everything = {"imported", "ended", "runs", "in C", "INFO:root:made", "written", "program"}
    assert everything <= set(said.splitlines())


def test_a_model_whose_code_fails_ends_with_a_line() -> None:
    Path("nets.py").write_text("def make(): return {}['name']\n")
    message = invoke("plan", "nets.py:make", fails=1)
    assert "nets.py:make raised KeyError: 'name'" in message
    Path("nets.py").write_text("def make(): raise SystemExit('no data')\n")
    assert "nets.py:make raised SystemExit: no data" in invoke("plan", "nets.py:make", fails=1)
    Path("nets.py").write_text("def make(:\n")
    assert "nets.py raised SyntaxError" in invoke("plan", "nets.py:make", fails=1)


def test_all_ways_to_name_a_model() -> None:
    for name in ("timm:resnet18", "torchvision:resnet18", "resnet18.a1_in1k", f"{NETS}:small_cnn"):
        size = "2x5x5" if name.endswith("small_cnn") else "3x32x32"
        assert "sites would be converted" in invoke("plan", name, "--input-size", size)


def test_options_of_convert_reach_the_gates_and_files_are_not_replaced() -> None:
    options = ("--input-size", "2x5x5", "--granularity", "layer", "--gate", "bernoulli")
    options += ("--target", "snake(a=0.5)", "--noise", "none", "--source", "gelu")
    convert = ("convert", f"{NETS}:functional", *options, "-o", "run")
    printed = invoke(*convert)
    assert f"The weights are those that {NETS}:functional makes: neither --weights" in printed
    assert "run: 1 sites, 1 gates, gelu -> snake(a=0.5)" in printed
    assert "run exists already" in invoke(*convert, fails=2)
    Path("run.training.pt").touch()
    assert "is the state of a training" in invoke(*convert[:-1], "run.pt", fails=2)
    invoke(*convert, "--force")
    assert not Path("run.training.pt").exists()
    Path("other.training.pt").write_text("of another program")
    assert "other.training.pt is not the state" in invoke(*convert[:-1], "other", fails=1)
    assert Path("other.training.pt").read_text() == "of another program"
    (unit,) = read_gates("run").values()
    assert (unit.granularity, unit.gate.settings) == (PerLayer(), Bernoulli(noise="none"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "timm:resnet_50"], "timm: there is no model 'resnet_50'. Did you mean resnet50"),
        (["plan", "torchvision:resnet5"], "torchvision: there is no model 'resnet5'. Did you mean"),
        (["plan", "zoo:resnet50"], "write timm:NAME, torchvision:NAME or FILE.py:FUNCTION"),
        (["plan", "resnet50.mine"], "there are the weights resnet50.a1_in1k, "),
        (["plan", "missing.py:make"], "missing.py."),
        (["plan", f"{NETS}:small_cn"], "has no function 'small_cn'. Did you mean small_cnn"),
        (["plan", "test_vit", "--set", "size=3"], "unexpected keyword argument 'size'"),
        (["plan", "test_vit", "--set", "size"], "'size': write NAME=VALUE"),
        (["plan", "test_vit", "--input-size", "3,32"], "write a shape such as 3x64x64"),
        (["plan", "test_vit", "--input-size", f"3x{10**6}x{10**6}"], "give a shape such as"),
        (["plan", "test_vit", "--include", "[x]"], "include='[x]' matches none of the 6 sites"),
        (["plan", "test_vit", "--role", "hiden"], "unknown role 'hiden'; known: hidden, "),
        (["convert", "test_vit"], "Missing option '--output' / '-o'"),
        (["convert", "test_vit", "-o", "run", "--target", "sine"], "unknown activation 'sine'"),
        (["convert", "test_vit", "-o", "run", "--target", "snake(a='x')"], "a='x' cannot take"),
        (["convert", "test_vit", "-o", "run", "--gate", "hard"], "unknown gate 'hard'. Known: "),
        (["convert", "test_vit", "-o", "run", "--granularity", "row"], "'row' is not one of"),
        (["convert", "test_vit", "-o", "run", "--weights", "no.pth"], "'no.pth' does not exist"),
        (["convert", f"{NETS}:small_cnn", "-o", "run", "--pretrained"], "a zoo's weights are for"),
        (["report", "nowhere"], "'nowhere' does not exist"),
        (["export", "nowhere", "-o", "model.onnx"], "'nowhere' does not exist"),
        (["export", __file__, "-o", "model", "--format", "tflite"], "'tflite' is not one of"),
    ],
)
def test_what_there_is_not_ends_with_status_2(arguments: list[str], message: str) -> None:
    assert message in invoke(*arguments, fails=2)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", f"{NETS}:functional", "--input-size", "3x5x5"], "does not run on the example in"),
        (["plan", f"{NETS}:functional"], "Pass example_input"),
        (["convert", "test_vit", "-o", "run", "--seed", str(10**30)], "Error: "),
        (["report", __file__], "is damaged, or is not a safetensors file"),
        (["bake", __file__, "-o", "model"], "is damaged, or is not a safetensors file"),
        (["export", __file__, "-o", "model"], "is damaged, or is not a safetensors file"),
    ],
)
def test_what_cannot_be_done_ends_with_status_1(arguments: list[str], message: str) -> None:
    assert message in invoke(*arguments, fails=1)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.pth", b"nothing", "cannot be read as a checkpoint of tensors alone"),
        ("weights.pth", b"hello", "weights.pth cannot be read as a checkpoint of tensors alone"),
        ("weights.safetensors", b"nothing", "is damaged, or is not a safetensors file"),
        ("weights.pth", {"lr": 0.1}, "holds a dict, which is not a state dict"),
        ("weights.pth", [NETS], "cannot be read as a checkpoint of tensors alone (it holds a path"),
        ("weights.pth", {"fc.weight": torch.zeros(3)}, "does not fit this VisionTransformer"),
    ],
)
def test_checkpoints_that_are_none_are_refused(name: str, content: object, message: str) -> None:
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        torch.save(content, name)
    convert = ("convert", "test_vit", "--weights", name, "-o", "run")
    assert message in invoke(*convert, fails=1)
    assert not Path("run").exists()


def test_weights_of_wrapped_models_are_those_of_the_model_inside() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), "averaged.pth")
    prefixes = {"a.pth": "module.", "b.safetensors": "_orig_mod."}
    prefixes |= {"c.pth": "_orig_mod.module.", "d.safetensors": "module._orig_mod."}
    for file, prefix in prefixes.items():
        state = {prefix + key: value for key, value in model.state_dict().items()}
        (torch.save if file.endswith(".pth") else save_file)(state, file)
    for file in (*prefixes, "averaged.pth"):
        options = ("--set", "num_classes=10", "--weights", file, "--force")
        invoke("convert", "test_resnet", *options, "-o", "run")
        assert torch.equal(load_model("run").fc.weight, model.fc.weight)


# --- report, bake and export ---------------------------------------------------------------------


def test_a_report_needs_no_more_than_save_gates_wrote(run: Path, tmp_path: Path) -> None:
    found = json.loads(invoke("report", run, "--json"))
    assert found["total"]["gates"] == 704
    assert 0.2 < found["total"]["transferred"] < 0.8
    save_gates(load_model(run), tmp_path / "gates")
    assert json.loads(invoke("report", tmp_path / "gates", "--json")) == found
    assert "holds 'gates', not model" in invoke("bake", tmp_path / "gates", "-o", "b", fails=1)


def test_bake_hardens_and_folds(run: Path) -> None:
    x = torch.randn(4, 3, 32, 32)
    model = bake(load_model(run), harden=True).eval()
    invoke("bake", run, "--harden", "--fold", "-o", "hard.safetensors")
    folded = load_baked("hard.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in folded.parameters()) < sum(p.numel() for p in model.parameters())


def test_a_model_of_several_inputs_and_of_tokens_is_folded() -> None:
    pytest.importorskip("transformers")
    Path("nets.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n"
        "sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=30)\n"
        "def make(): return BertForSequenceClassification(BertConfig(**sizes))\n"
    )
    invoke("convert", "nets.py:make", "-o", "run")
    model = become(load_model("run"), match).eval()
    save_model(model, "run")
    assert "bert.encoder.layer.0" in invoke("bake", "run", "--fold", "-o", "baked")
    tokens = torch.randint(30, (2, 5))
    with torch.no_grad():
        found, expected = load_baked("baked").eval()(tokens), model(tokens)
    torch.testing.assert_close(found.logits, expected.logits)


def test_a_baked_file_is_exported_like_the_converted_one(run: Path) -> None:
    x = torch.randn(3, 3, 32, 32)
    invoke("bake", run, "-o", "model.safetensors")
    invoke("export", "model.safetensors", "--format", "torch-export", "-o", "model.pt2")
    with torch.no_grad():
        expected = bake(load_model(run)).eval()(x)
        found = torch.export.load("model.pt2").module()(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- the command itself --------------------------------------------------------------------------


def test_help_has_examples_and_completion_is_on() -> None:
    printed = invoke("--help")
    assert "--install-completion" in printed
    for name in ("plan", "convert", "finetune", "report", "bake", "export", "doctor"):
        assert f" {name} " in printed
        assert f"transfer-surgery {name}" in invoke(name, "--help")


def test_the_doctor_names_versions_extras_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "eager")
    found = json.loads(in_process("doctor", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["missing"]["cli"] == []
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["kernels"] == f"eager ({VARIABLE}=eager)"
    printed = invoke("doctor")
    assert "extra cli installed" in printed
    assert f"timm {timm.__version__}" in printed
