"""int8: by torch's FX graphs, by exported programs, by onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tool_checks.comparing import WrongError
from tool_checks.networks import Case


def expect_as_good(quantize: Callable[[nn.Module], Callable[[Tensor], Tensor]], case: Case) -> None:
    """Raise where int8 costs more than for the reference, beyond a rounding step of the output."""
    expected = case.reference(case.images)
    found, usual = (
        float((quantize(one)(case.images) - expected).norm() / expected.norm())
        for one in (case.network, case.reference)
    )
    if not found <= 1.5 * usual + 1 / 256:
        raise WrongError(f"{found:.1%} off, the reference {usual:.1%}")


def fx_quantization(case: Case) -> None:
    expect_as_good(lambda one: _by_fx(one, case.images), case)


def _by_fx(network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    prepared = prepare_fx(network, get_default_qconfig_mapping("x86"), (images,))
    prepared(images)
    quantized: Callable[[Tensor], Tensor] = convert_fx(prepared)
    return quantized


def pt2e_quantization(case: Case) -> None:
    expect_as_good(lambda one: _by_program(one, case.images), case)


def _by_program(network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(network, (images,)).module(), quantizer)
    prepared(images)
    quantized: Callable[[Tensor], Tensor] = convert_pt2e(prepared)
    return quantized


def onnxruntime_int8(case: Case) -> None:
    """Static, with pairs of quantize and dequantize."""
    expect_as_good(lambda one: _by_onnxruntime(one, case.images), case)


def _by_onnxruntime(network: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: images.numpy()}])

        def get_next(self):
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder, "whole.onnx"), Path(folder, "small.onnx")
        torch.onnx.export(network, (images,), whole, dynamo=True, verbose=False)
        name = onnxruntime.InferenceSession(whole).get_inputs()[0].name
        quantize_static(whole, small, Images(name))
        session = onnxruntime.InferenceSession(small)
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
