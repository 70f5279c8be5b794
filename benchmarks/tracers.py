"""Networks of other people, converted, traced by torch.fx, and exported: what is left of each.

    python benchmarks/tracers.py --page docs/tools.md

The networks are tiny, have random weights, and return no caches, which `torch.export` refuses. A
converted one has all gates at the source. Every cell was executed.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from markdown_page import fill_blocks, markdown_table
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from zoo.outputs import equal

from transfer_surgery import convert
from transfer_surgery.units import gated_activations

_SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


class Convolution(nn.Module):
    """As in YOLO: all convolutions share one activation object."""

    default_act = nn.SiLU()

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), self.default_act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Split(nn.Module):
    """As YOLO's C2f: halves, and a list that grows in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = Convolution(8, 16), Convolution(32, 8)
        self.inner = nn.ModuleList([Convolution(8, 8), Convolution(8, 8)])

    def forward(self, x: Tensor) -> list[Tensor] | dict[str, Tensor]:
        parts = list(self.first(x).chunk(2, 1))
        parts.extend(inner(parts[-1]) for inner in self.inner)
        out = self.last(torch.cat(parts, 1))
        return {"one2many": out} if self.training else [out, out.flatten(2)]


def yolo() -> tuple[nn.Module, dict[str, Tensor]]:
    return nn.Sequential(Convolution(3, 8), Split()), {"input": torch.randn(2, 3, 32, 32)}


def detr() -> tuple[nn.Module, dict[str, Tensor]]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
    )
    sizes = {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32, "num_queries": 6}
    sizes |= {"encoder_layers": 2, "decoder_layers": 2, "use_timm_backbone": False}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.DetrConfig(backbone_config=backbone, **sizes, **heads)
    model = transformers.DetrForObjectDetection(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def llama() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.LlamaConfig(**_SMALL, **_HEADS, use_cache=False)
    model = transformers.LlamaForCausalLM(config)
    return model, {"input_ids": torch.randint(3, 100, (2, 12))}


def gemma() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.Gemma2Config(**_SMALL, **_HEADS, use_cache=False)
    model = transformers.Gemma2ForCausalLM(config)
    return model, {"input_ids": torch.randint(3, 100, (2, 12))}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100}
    sizes |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 50}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1)
    config = transformers.WhisperConfig(
        **sizes, **tokens, decoder_start_token_id=2, use_cache=False
    )
    inputs = {
        "input_features": torch.randn(2, 8, 100),
        "decoder_input_ids": torch.ones(2, 4).long(),
    }
    return transformers.WhisperForConditionalGeneration(config), inputs


def converted(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    twin = convert(copy.deepcopy(model), example_input=inputs)
    for _, unit in gated_activations(twin):
        nn.init.constant_(unit.log_alpha, 100.0)  # drawn gates are at the source, too
    return twin


def traced(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    return fx.symbolic_trace(copy.deepcopy(model))


def exported(model: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """With sizes that may vary."""
    sizes = {
        name: dict.fromkeys(range(x.dim()), torch.export.Dim.AUTO) for name, x in inputs.items()
    }
    program = torch.export.export(copy.deepcopy(model), (), inputs, dynamic_shapes=sizes)
    return program.module()


NETWORKS = {"YOLO, shared SiLU": yolo, "DETR": detr, "Llama": llama, "Gemma 2": gemma}
NETWORKS["Whisper"] = whisper
TOOLS: dict[str, Callable[[nn.Module, dict[str, Tensor]], nn.Module]] = {
    "`convert`": converted,
    "`torch.fx.symbolic_trace`": traced,
    "`torch.export`": exported,
}


class Promise(NamedTuple):
    """What the result of a tool and the original are both asked for."""

    name: str
    answer: Callable[[nn.Module, dict[str, Tensor]], Any]


@torch.no_grad()
def _output(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs)


@torch.no_grad()
def _output_of_three(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return model(**{name: torch.cat([x, x[:1]]) for name, x in inputs.items()})


def _training(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)
    model.train()
    try:
        return pytree.tree_map_only(Tensor, Tensor.detach, model(**inputs))
    finally:
        model.eval()


def _text(model: Any, inputs: dict[str, Tensor]) -> Any:
    given = {name: x for name, x in inputs.items() if name != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)


PROMISES = (
    Promise("same outputs and types", _output),
    Promise("other batch size", _output_of_three),
    Promise("training mode", _training),
    Promise("same text from `generate`", _text),
)


def rows() -> Iterator[list[str]]:
    for name, build in NETWORKS.items():
        torch.manual_seed(0)
        model, inputs = build()
        model.eval()
        can_generate = getattr(model, "can_generate", bool)()
        for title, tool in TOOLS.items():
            made: nn.Module | Exception
            try:
                made = tool(model, inputs)
            except Exception as error:
                made = error
            cells = [
                ""
                if promise.answer is _text and not can_generate
                else _cell(promise, made, model, inputs)
                for promise in PROMISES
            ]
            yield [name, title, *cells]


def _cell(promise: Promise, made: Any, model: nn.Module, inputs: dict[str, Tensor]) -> str:
    """ "yes", "another" answer, or the name of what is raised."""
    if isinstance(made, Exception):
        return f"not made: {type(made).__name__}"
    expected = promise.answer(model, inputs)
    try:
        found = promise.answer(made, inputs)
    except Exception as error:
        return type(error).__name__
    return "yes" if equal(found, expected) else "another"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, help="write the table into this page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of the tools
    header = ["network", "by", *(promise.name for promise in PROMISES)]
    table = markdown_table(header, list(rows()))
    print(table)
    if options.page is not None:
        options.page.write_text(fill_blocks(options.page.read_text(), {"tracers": table}))


if __name__ == "__main__":
    main()
