"""A baked network as a file that runs without this library: ONNX, or a torch.export program."""

from __future__ import annotations

import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from transfer_surgery._messages import check_arguments, listed
from transfer_surgery._running import explained, predict, prediction_mode, to_device_of
from transfer_surgery.files.polynomial_graph import check_polynomial
from transfer_surgery.files.replacing import check_replaceable, replace_file
from transfer_surgery.sites import example_arguments, fake_arguments, trying
from transfer_surgery.surgery import MixedActivation, check_no_gates

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def export_program(
    model: nn.Module, example_input: Any, path: str | os.PathLike[str]
) -> ExportedProgram:
    """Write a baked network with `torch.export.save`; ``torch.export.load(path).module()`` runs it.

    It computes what the model does in eval mode, for batches of any size. To load it, torch is
    enough: neither this library nor the model's code is needed.

    Args:
        model: a model after `transfer_surgery.bake`; it is not changed.
        example_input: a batch of its input: a tensor, a tuple of arguments or a dict of keyword
            arguments. It fixes all sizes but the number of examples.
        path: the output file, usually ``.pt2``; folders on the way to it are made. A file that is
            there is replaced only if it is empty or a program of torch.export.

    Returns:
        The program that was written.

    Raises:
        ValueError: the model still has gates or does not run on `example_input`, no tensor in this
            has an axis of examples, or the file exists and is something else.
        RuntimeError: torch.export cannot follow the model, or the model fixes the batch size.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import bake, convert, swap_targets
        >>> x = torch.randn(2, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = bake(swap_targets(convert(model, "sin", example_input=x)))
        >>> with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        ...     _ = export_program(model, x, file.name)
        ...     program = torch.export.load(file.name).module()
        >>> program(torch.randn(5, 4)).shape
        torch.Size([5, 2])
    """
    check_arguments(export_program, locals())
    path = Path(path)
    check_replaceable(path, _check_program)
    program = _trace(model, *_arguments(model, example_input))
    data = io.BytesIO()  # torch ends the process where it cannot write to a file
    torch.export.save(program, data)
    replace_file(path, lambda new: new.write_bytes(data.getbuffer()))
    return program


def export_onnx(
    model: nn.Module,
    example_input: Any,
    path: str | os.PathLike[str],
    *,
    polynomial: bool = False,
) -> torch.onnx.ONNXProgram:
    """Write a baked network as ONNX, which onnxruntime and other programs run.

    It computes what the model does in eval mode, for batches of any size. Weights of more than
    about 2 GB go into a second file beside it, because the format demands it.

    Args:
        model: a model after `transfer_surgery.bake`; it is not changed.
        example_input: as for `export_program`.
        path: the output file, usually ``.onnx``; folders on the way to it are made. A file that is
            there is replaced only if it is empty or an ONNX file of torch.
        polynomial: refuse a network with sites that keep a part of their source, or with nodes that
            are no polynomials of its input, before anything is written. What is left is sums and
            products, as for encrypted computing.

    Returns:
        The program that was written.

    Raises:
        ImportError: onnx or onnxscript is not installed.
        ValueError: the model still has gates or does not run on `example_input`, no tensor in this
            has an axis of examples, or the file exists and is something else. With `polynomial`: a
            site keeps a part of its source, a node is no polynomial, or the model has bfloat16
            numbers.
        RuntimeError: torch cannot export the model, or the model fixes the batch size.
    """
    check_arguments(export_onnx, locals())
    path = Path(path)
    check_replaceable(path, _check_onnx)
    arguments = _arguments(model, example_input)
    if polynomial:
        _check_sums_and_products(model)
    try:
        import onnx  # noqa: F401 - torch imports both, and names neither when it cannot
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "ONNX needs onnx and onnxscript: pip install 'transfer-surgery[onnx]'"
        ) from error
    traced = _trace(model, *arguments)
    names = [shape for shape in _axes(arguments, "batch") if shape is not None]
    with _explained(model), warnings.catch_warnings():
        # Several inputs share the axis: torch says so for each, and calls all of them "batch".
        warnings.filterwarnings("ignore", message=".*shares the same shape constraints")
        program = torch.onnx.export(traced, dynamic_shapes=names, dynamo=True, verbose=False)
    assert program is not None
    if polynomial:
        check_polynomial(program.model.graph)
    replace_file(path, program.save)
    return program


def _check_sums_and_products(model: nn.Module) -> None:
    """Raise ValueError where a baked model cannot become sums and products of usual numbers."""
    kept = [path for path, part in model.named_modules() if isinstance(part, MixedActivation)]
    if kept:
        raise ValueError(
            f"{listed(kept)}: each of these sites chooses between two activations by its gates, "
            "which is no sum or product. Convert the original network, and swap all gates before "
            "bake, or leave out polynomial=True."
        )
    if any(tensor.dtype == torch.bfloat16 for tensor in model.state_dict().values()):
        raise ValueError(
            "the model has bfloat16 numbers, with which few programs run the sums and products of "
            "ONNX: call model.float(), and give a float32 example_input."
        )


def _check_program(file: Path) -> None:
    """Raise ValueError where a file is no archive as `torch.export.save` writes it."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith("/archive_format")]
            if any(archive.read(name) == b"pt2" for name in names):
                return
    raise ValueError(f"{file} is not a program of torch.export.")


def _check_onnx(file: Path) -> None:
    """Raise ValueError where a file does not start as ONNX files of torch do.

    The version comes first, in two bytes, and then the name of the producer.
    """
    with file.open("rb") as opened:
        start = opened.read(11)
    if start[:1] != b"\x08" or start[2:] != b"\x12\x07pytorch":
        raise ValueError(f"{file} is not an ONNX file of torch.")


def _arguments(model: nn.Module, example_input: Any) -> _Arguments:
    """Positional and keyword arguments; a single example is doubled.

    `torch.export` takes an axis of length 1 in the example for one that always has this length.
    """
    check_no_gates(model)
    batch = to_device_of(model, example_input)
    args, kwargs = fake_arguments(example_arguments(batch), None, True)
    return args, kwargs


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    structure = pytree.tree_structure((*args, *kwargs.values()))
    shapes = pytree.tree_unflatten(_axes((args, kwargs), Dim.DYNAMIC), structure)
    # What does not run at all is no matter of torch.export.
    with prediction_mode(model), trying(), explained(model, "example_input", kwargs or args):
        predict(model, kwargs or args)
    with _explained(model), prediction_mode(model), trying():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)


def _axes(arguments: _Arguments, axis: Any) -> list[dict[int, Any] | None]:
    """How the first axis of each tensor is given to torch; None for other arguments."""
    leaves = pytree.tree_leaves(arguments)
    sizes = [len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not sizes:
        raise ValueError(
            "no tensor in example_input has an axis of examples: give the model's input as a batch."
        )

    def first_axis(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        return {0: axis} if leaf.dim() > 0 and len(leaf) == sizes[0] else {}

    return [first_axis(leaf) for leaf in leaves]


@contextmanager
def _explained(model: nn.Module) -> Iterator[None]:
    """Turn what torch says about a model that it cannot export into one line with advice."""
    try:
        yield
    except Exception as error:
        first = str(error.__cause__ or error).strip().partition("\n")[0]
        raise RuntimeError(
            f"torch cannot export this {type(model).__name__} for batches of any size "
            f"({type(error).__name__}: {first}). Where torch.export.export(model, (x,), "
            "dynamic_shapes=({0: Dim.DYNAMIC},)) fails for the original model too, its own code "
            "is the reason. Where an input that is no batch has as many rows as there are "
            "examples, give an example_input with another number of examples."
        ) from error
