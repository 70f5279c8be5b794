"""A network in onnxruntime, in float and in int8: its error and its time."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from transfer_surgery import export_onnx
from transfer_surgery.cli.finetuning.images import Loader


class Images(CalibrationDataReader):
    """Batches for the calibration of onnxruntime."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._feeds: Iterator[dict[str, Any]] = iter(
            {name: batch.contiguous().numpy()} for batch in batches
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def write_both(model: nn.Module, batches: Sequence[Tensor], stem: Path) -> tuple[Path, Path]:
    """Write STEM.onnx and STEM.int8.onnx.

    The second has activations of 8 bits with one scale for each tensor, and weights of 8 bits with
    one scale for each channel, between pairs of QuantizeLinear and DequantizeLinear. The scales of
    activations come from the least and the highest value of the batches.
    """
    plain, integers = stem.with_name(f"{stem.name}.onnx"), stem.with_name(f"{stem.name}.int8.onnx")
    export_onnx(model.cpu(), batches[0][:2].contiguous(), plain)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(plain, prepared)
        (name,) = (node.name for node in session(plain).get_inputs())
        quantize_static(
            prepared,
            integers,
            Images(name, batches),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return plain, integers


def session(file: Path) -> onnxruntime.InferenceSession:
    """One thread, so that two runs do not disturb each other."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def error_of(file: Path, loader: Loader) -> float:
    """Share of the images with a wrong class."""
    run = session(file)
    (name,) = (node.name for node in run.get_inputs())
    wrong = number = 0
    for images, labels in loader:
        (logits,) = run.run(None, {name: images.contiguous().numpy()})
        wrong += int((np.asarray(logits).argmax(1) != labels.numpy()).sum())
        number += len(labels)
    return wrong / number


def latencies(files: Sequence[Path], images: Tensor, rounds: int) -> list[float]:
    """The median seconds of each network for a batch, taken in turns."""
    runs = [session(file) for file in files]
    feeds = [{run.get_inputs()[0].name: images.contiguous().numpy()} for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 3):
        for run, feed, seen in zip(runs, feeds, times, strict=True):
            begun = time.perf_counter()
            run.run(None, feed)
            if turn >= 3:  # the first calls allocate
                seen.append(time.perf_counter() - begun)
    return [median(seen) for seen in times]
