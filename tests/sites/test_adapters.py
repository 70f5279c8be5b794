"""Adapters: what the zoos supply, and the recipe of CONTRIBUTING.md for a zoo of one's own."""

import doctest
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from tests.helpers.promises import assert_every_promise, units
from transfer_surgery import convert, find_activations, report
from transfer_surgery.sites import Adapter, example_arguments, find_example_input, probe_copy
from transfer_surgery.sites import zoo as adapters
from transfer_surgery.sites.zoo import find_adapter

os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # it remarks on tiny vocabularies
RECIPES = Path(__file__).parents[2] / "CONTRIBUTING.md"

MY_ZOO = """
import torch.nn.functional as F
from torch import nn


def crop_to_even(x):
    return x[..., : x.shape[-1] - x.shape[-1] % 2] if x.shape[-1] % 2 else x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 2)

    def forward(self, x):
        return crop_to_even(F.relu(self.conv(x)))


class FusedBlock(Block):
    pass


class TokenMixer(nn.Module):
    def forward(self, x):
        return F.gelu(x.permute(0, 2, 3, 1))


class Net(nn.Module):
    image_size = 16

    def __init__(self):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(3, 4, 3), nn.ReLU()
        self.blocks = nn.Sequential(Block(), FusedBlock())
        self.mixer, self.fc, self.head = TokenMixer(), nn.Linear(4, 2), nn.Tanh()

    def forward(self, x):
        x = self.mixer(self.blocks(self.act1(self.conv1(x)))).mean((1, 2))
        return self.head(self.fc(x)) * 2
"""


@pytest.fixture
def fresh_adapters():
    """Entry points are read once per process: forget them before and after."""
    cached = adapters._adapters
    cached.cache_clear()
    yield
    cached.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] in ("my_zoo", "my_package")]:
        del sys.modules[name]


def install(folder, monkeypatch, code, value="my_package.adapter:MyZooAdapter"):
    """A package with an adapter, as pip would leave it in site-packages."""
    (folder / "my_package").mkdir()
    (folder / "my_package" / "adapter.py").write_text(f"import torch\n{code}")
    (folder / "my_zoo.py").write_text(MY_ZOO)
    metadata = folder / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[transfer_surgery.adapters]\nmy_zoo = {value}\n")
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def recipe():
    """The code of the section "A zoo", and the entry point that it tells to write."""
    section = RECIPES.read_text().split("### A zoo")[1]
    examples = doctest.DocTestParser().get_examples(section)
    (value,) = re.findall(r'^my_zoo = "(.*)"$', section, flags=re.MULTILINE)
    return "".join(example.source for example in examples), value


@pytest.fixture
def my_model(tmp_path, monkeypatch, recipe, fresh_adapters):
    install(tmp_path, monkeypatch, *recipe)
    import my_zoo

    return my_zoo.Net().eval()


def test_the_recipe_is_found_through_its_entry_point_before_the_generic_adapter(my_model):
    assert type(find_adapter(my_model)).__name__ == "MyZooAdapter"
    assert find_example_input(my_model).shape == (2, 3, 16, 16)


def test_the_recipe_decides_about_sites(my_model):
    plan = find_activations(my_model)
    assert {site.caller or site.path: site.role for site in plan if site.role != "hidden"} == {
        "head": "output"
    }
    assert plan["mixer.gelu_0"].channel_axis == -1
    assert plan["blocks.0.relu_0"].way == "edit"
    assert plan["blocks.1.relu_0"].reason == "MyZooAdapter leaves FusedBlock as it is"


def test_a_model_of_the_recipe_converts_without_example_input(my_model):
    x = torch.randn(2, 3, 16, 16)
    before = my_model(x)
    assert torch.equal(convert(my_model)(x), before)
    rows = report(my_model, by="stage")
    assert [(row.path, row.gates) for row in rows] == [("stem", 4), ("body", 8)]


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("channel_axis", 4, r"WrongAdapter gives act1 the channel axis 4; its input is \(2, 4, 14"),
        ("channel_axis", 0, "expected 1 to 3, or -1 to -3"),
        ("role", "hiden", "WrongAdapter gives act1 the role 'hiden'; known roles: hidden, "),
    ],
)
def test_an_impossible_override_is_refused_with_adapter_and_site(
    method, value, message, my_model, monkeypatch
):
    wrong = type("WrongAdapter", (Adapter,), {method: lambda self, model, site: value})
    wrong.matches = lambda self, model: True
    monkeypatch.setattr(adapters, "_adapters", lambda: (wrong(),))
    with pytest.raises(ValueError, match=message):
        find_activations(my_model, torch.zeros(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("code", "reason"),
    [("import no_such_zoo", "no_such_zoo"), ("class MyZooAdapter: pass", "no subclass")],
)
def test_a_broken_adapter_is_left_out_with_a_warning(
    code, reason, tmp_path, monkeypatch, fresh_adapters
):
    install(tmp_path, monkeypatch, code)
    with pytest.warns(RuntimeWarning, match=rf"adapter my_zoo \(my_package.*{reason}"):
        adapter = find_adapter(timm.create_model("test_resnet"))
    assert type(adapter).__name__ == "TimmAdapter"


# --- the zoos ----------------------------------------------------------------------------------


def runs(model, training):
    """Whether the adapter's example input suits the model, on fake tensors."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    example = pytree.tree_map_only(torch.Tensor, fake.from_tensor, find_example_input(model))
    args, kwargs = example_arguments(example)
    probe = probe_copy(model, fake).train(training)
    with torch.no_grad(), fake:
        probe(*args, **kwargs)


def built(name, **options):
    zoo, name = name.split(":")
    build = timm.create_model if zoo == "timm" else torchvision.models.get_model
    return build(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm:resnet18", {"in_chans": 1}),
        ("timm:vit_tiny_patch16_224", {"img_size": 96, "in_chans": 4}),
        ("timm:test_mambaout", {}),
        ("timm:test_vit3", {}),
        ("timm:naflexvit_base_patch16_gap", {"in_chans": 2}),
        pytest.param("timm:crossvit_9_240", {"in_chans": 1}, marks=pytest.mark.slow),
        ("timm:test_convnext", {"features_only": True}),
        ("torchvision:mobilenet_v3_small", {}),
        pytest.param("torchvision:vit_b_32", {"image_size": 64}, marks=pytest.mark.slow),
        ("torchvision:lraspp_mobilenet_v3_large", {"weights_backbone": None}),
        ("torchvision:r3d_18", {}),
        ("torchvision:raft_small", {}),
        ("torchvision:quantized_mobilenet_v2", {}),
    ],
)
def test_models_of_zoos_run_on_their_example_input(name, options):
    model = built(name, **options)
    assert type(find_adapter(model)).__name__.lower() == f"{name.split(':')[0]}adapter"
    runs(model, training=False)
    runs(model, training=True)


@torch.no_grad()
def test_detection_models_get_targets_and_run_in_both_modes():
    options = {"weights_backbone": None, "num_classes": 3}
    model = torchvision.models.get_model("fasterrcnn_mobilenet_v3_large_320_fpn", **options)
    args, kwargs = example_arguments(find_example_input(model))
    assert set(model.eval()(*args, **kwargs)[0]) == {"boxes", "labels", "scores"}
    assert "loss_box_reg" in model.train()(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("timm:resnet18", ["stem", "layer1", "layer2", "layer3", "layer4"]),
        ("timm:test_efficientnet", ["stem", *(f"blocks.{i}" for i in range(5)), "bn2"]),
        ("timm:test_vit", [f"blocks.{i}" for i in range(6)]),
        ("timm:poolformerv2_s12", [f"stages.{i}" for i in range(4)]),
        ("torchvision:alexnet", ["features", "classifier"]),
        ("torchvision:swin_t", [f"features.{i}" for i in (1, 3, 5, 7)]),
        ("torchvision:resnet18", ["relu", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_reports_by_stage_follow_the_zoo(name, stages):
    model = convert(built(name), granularity="layer")
    by_stage = report(model, by="stage")
    assert [row.path for row in by_stage] == stages
    assert by_stage.total == report(model).total


def test_channels_of_efficient_channel_attention_are_last():
    plan = find_activations(timm.create_model("test_resnet", block_args={"attn_layer": "eca"}))
    gates = [site for site in plan if site.role == "gating"]
    assert gates
    assert all(site.channel_axis == -1 and site.shape[-1] > 1 for site in gates)


# --- transformers ------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMERS = {  # class, config, sites, stages
    "ViTForImageClassification": (
        {**SMALL, "image_size": 32, "patch_size": 8},
        ["gelu"] * 2,
        ["vit.layers.0", "vit.layers.1"],
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 2, 1], "image_size": 32},
        ["gelu"] * 5,
        [f"convnext.encoder.stages.{i}" for i in range(4)],
    ),
    "SwinForImageClassification": (
        {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4},
        ["gelu"] * 3,
        ["swin.encoder.layers.0", "swin.encoder.layers.1"],
    ),
    "BertForSequenceClassification": (
        {**SMALL, "vocab_size": 30},
        ["gelu"] * 2 + ["tanh"],
        ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert"],
    ),
    "GPT2LMHeadModel": (
        {**TEXT, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        ["gelu"] * 2,
        ["transformer.h.0", "transformer.h.1"],
    ),
    "LlamaForCausalLM": (
        {**SMALL, **TEXT, "intermediate_size": 24},
        ["silu"] * 2,
        ["model.layers.0", "model.layers.1"],
    ),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.filterwarnings("ignore:the config of")  # of sines
def test_transformers_convert_train_and_bake(name):
    transformers = pytest.importorskip("transformers")
    config, sources, stages = TRANSFORMERS[name]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    example = find_example_input(model)
    x = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in example.items()}
    plan = find_activations(model)
    assert [site.source.name for site in plan] == sources
    assert {site.channel_axis for site in plan} <= {-1, len(plan.rows[0].shape) - 1}
    output = type(model(**x))
    assert_every_promise(model, **x)
    assert type(model(**x)) is output
    assert [row.path for row in report(model, by="stage")] == stages
    model.train()(**x).logits.square().mean().backward()
    gates = [unit.log_alpha for unit in units(model).values()]
    assert len(gates) == len(sources)
    assert all(gate.grad is not None and gate.grad.isfinite().all() for gate in gates)


# --- any model ---------------------------------------------------------------------------------


def lenet(channels, features):
    convolutions = (nn.Conv2d(channels, 2, 5), nn.ReLU(), nn.Conv2d(2, 2, 5), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(features, 3))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(10, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, ids, scale=1.0):
        return torch.relu(self.lstm(self.embedding(ids))[0]) * scale


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, y):
        return torch.relu(self.fc(x) + y)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(7, 3), nn.ReLU()), (2, 7)),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 3), nn.ReLU()), (2, 7)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), (2, 1, 224, 224)),
        (nn.Sequential(nn.Conv1d(3, 2, 3), nn.ReLU()), (2, 3, 224)),
        (lenet(3, 2 * 24 * 24), (2, 3, 32, 32)),
        (lenet(1, 2 * 20 * 20), (2, 1, 28, 28)),
        (Tokens(), (2, 16)),
    ],
    ids=["linear", "flatten", "conv2d", "conv1d", "32 pixels", "28 pixels", "tokens"],
)
def test_the_input_of_a_plain_model_is_guessed(model, shape):
    assert tuple(find_example_input(model).shape) == shape
    assert find_activations(model).rows


@pytest.mark.parametrize(
    "model", [lenet(3, 999), TwoInputs(), nn.Sequential(nn.ReLU())], ids=["size", "two", "none"]
)
def test_where_no_guess_fits_the_message_asks_for_an_example_input(model):
    with pytest.raises(ValueError, match=r"no zoo adapter .* Pass example_input="):
        convert(model)
