"""save_pretrained and from_pretrained after bake: the same network, or a warning."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from transfer_surgery import bake, convert, swap_targets

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = SIZES | {"intermediate_size": 32, "vocab_size": 99}
IMAGES = SIZES | {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
IDS = {"input_ids": torch.arange(2, 10).reshape(2, 4)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}

MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TOKENS), IDS),
    "bert": (BertForMaskedLM, BertConfig(**TOKENS), IDS),
    "vit": (ViTForImageClassification, ViTConfig(**IMAGES), PIXELS),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2),
        IDS | {"decoder_input_ids": IDS["input_ids"]},
    ),
    "clip": (
        CLIPModel,
        CLIPConfig(text_config=TOKENS, vision_config=IMAGES, projection_dim=8),
        IDS | PIXELS,
    ),
}


def make(name):
    torch.manual_seed(0)
    cls, config, inputs = MODELS[name]
    return cls(type(config)(**config.to_dict())).eval(), inputs


def reloaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def first(output):
    return output[0].detach()


@pytest.mark.parametrize("target", ["relu", "hardswish"])
@pytest.mark.parametrize("name", MODELS)
def test_the_config_follows_where_one_function_stands_at_all_sites(name, target, tmp_path):
    if (name, target) == ("t5", "relu"):
        pytest.skip("it has ReLU already")
    model, inputs = make(name)
    bake(swap_targets(convert(model, target, example_input=inputs)))
    again = reloaded(model, tmp_path)
    torch.testing.assert_close(first(again(**inputs)), first(model(**inputs)))


@pytest.mark.parametrize(
    "options", [{"target": "sin"}, {"target": "relu", "include": "*layers.0*"}], ids=str
)
def test_a_warning_says_that_loading_would_bring_activations_back(options, tmp_path):
    model, inputs = make("llama")
    swap_targets(convert(model, example_input=inputs, **options))
    with pytest.warns(
        RuntimeWarning, match="hidden_act='silu'.* does not say what .* activations"
    ) as told:
        bake(model)
    assert told[0].filename == __file__
    assert model.config.hidden_act == "silu"
    again = reloaded(model, tmp_path)
    assert not torch.allclose(first(again(**inputs)), first(model(**inputs)))


def test_a_network_that_is_back_at_its_sources_is_described_already(tmp_path):
    model, inputs = make("bert")
    before = first(model(**inputs))
    bake(convert(model, "sin", example_input=inputs))
    assert torch.equal(first(reloaded(model, tmp_path)(**inputs)), before)


def test_a_model_inside_another_one_is_described_too(tmp_path):
    class Around(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make("llama")[0]

        def forward(self, input_ids):
            return self.inner(input_ids).logits

    model = Around()
    bake(swap_targets(convert(model, "relu", example_input=IDS["input_ids"])))
    assert model.inner.config.hidden_act == "relu"
