"""Run a network on batches that a user gives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Lock
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transfer_surgery._randomness import RandomnessKept
from transfer_surgery._tensors import map_tensors

T = TypeVar("T")


@contextmanager
def prediction_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; then modes and random streams are as they were.

    Tensors that are made are ordinary ones also in `torch.inference_mode`, and compiled modules run
    as written: compiled code may leave out hooks.
    """
    with modes_kept(model), RandomnessKept():
        model.eval()
        with as_written(), torch.inference_mode(False), torch.no_grad():
            yield


_as_written, _lock = list[AbstractContextManager[Any]](), Lock()


@contextmanager
def as_written() -> Iterator[None]:
    """What torch.compile has made runs as it was written.

    That holds for all threads. Where several ask for it, the last one to leave ends it: each would
    otherwise put back what the one before has set, and nothing would ever be compiled again.
    """
    with _lock:
        stance = _as_written[0] if _as_written else torch.compiler.set_stance("force_eager")
        if not _as_written:
            stance.__enter__()
        _as_written.append(stance)
    try:
        yield
    finally:
        with _lock:
            _as_written.pop()
            if not _as_written:
                stance.__exit__(None, None, None)


@contextmanager
def compiled_nonetheless() -> Iterator[None]:
    """What this library itself has compiled runs compiled inside of `as_written`, too."""
    if not _as_written:
        yield
        return
    try:
        with torch.compiler.set_stance("default"):
            yield
    finally:
        with _lock:
            if not _as_written:  # another thread has ended it meanwhile
                torch.compiler.set_stance("default")


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Afterwards every module is in the training or evaluation mode in which it was."""
    # By weak references: whoever counts those to a module does not meet ours.
    modes = [(ref(module), module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if (there := module()) is not None:
                there.training = training


@contextmanager
def hooked(*handles: RemovableHandle) -> Iterator[None]:
    """Hooks that are there for a while: they are removed at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_batches(batches: Any, model: nn.Module) -> list[Any]:
    """Batches on the device of the model.

    Raises:
        ValueError: there are none, or one is a list, as a DataLoader yields images and labels.
    """
    found = [batches] if isinstance(batches, Tensor) else list(batches)
    if not found:
        raise ValueError("batches: there are none; give some batches of the model's input.")
    return [to_device_of(model, batch) for batch in found]


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """A batch where the model's parameters are.

    Raises:
        ValueError: it is a list, as a DataLoader yields images and labels, or has no tensors, or
            one without examples.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, batch)
    if isinstance(batch, list) or not tensors:
        raise ValueError(
            f"a batch is a {type(batch).__name__}"
            f"{'' if tensors else ', in which no tensor is found'}; give tensors, tuples of "
            "arguments or dicts of keyword arguments, without labels: "
            "[images for images, _ in loader]."
        )
    if all(x.numel() == 0 for x in tensors):
        raise ValueError(f"a batch has no examples: shapes {[tuple(x.shape) for x in tensors]}.")
    device = device_of(model)
    return map_tensors(lambda x: x.to(device), batch)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are, by the first of them."""
    return next(model.parameters(), torch.zeros(())).device


def arguments_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of the call for a batch.

    A named tuple is the only argument, as a packed sequence is.
    """
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (batch if type(batch) is tuple else (batch,)), {}


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output for a tensor, a tuple of arguments or a mapping of keyword arguments."""
    arguments, keywords = arguments_of(batch)
    return model(*arguments, **keywords)


def with_gradients_if_needed(use: Callable[[bool], T]) -> tuple[T, bool]:
    """Call something that runs a network; if it fails, once more with gradients.

    Some networks need them for their output, as a potential for its forces.

    Args:
        use: is told whether gradients are to be recorded.

    Returns:
        What it returns, and whether it needed gradients.
    """
    try:
        return use(False), False
    except Exception:
        with suppress(Exception):
            return use(True), True
        raise


def predict(model: nn.Module, batch: Any) -> tuple[Any, bool]:
    """The output without gradients; with them where the network needs some for its output.

    Returns:
        The output, and whether it needed gradients.
    """

    def run(gradients: bool) -> Any:
        with torch.set_grad_enabled(gradients):
            return call_model(model, batch)

    return with_gradients_if_needed(run)


@contextmanager
def explained(model: nn.Module, name: str, batch: Any) -> Iterator[None]:
    """Say which batch it is that a model does not run on.

    Raises:
        ValueError: the model raises something on the batch, which is the cause.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        has: list[str] = []
        map_tensors(lambda x: has.append(f"{str(x.dtype)[6:]} {tuple(x.shape)}"), batch)
        keys = f", with the keys {', '.join(batch)}" if isinstance(batch, Mapping) else ""
        raise ValueError(
            f"{type(model).__name__} does not run on {name}{keys}: {', '.join(has)} "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}). It takes "
            f"{_signature(model)}, and its parameters are "
            f"{str(next(model.parameters(), torch.zeros(())).dtype)[6:]}. Give batches that "
            "model(...) runs on in evaluation mode."
        ) from error


def _signature(model: nn.Module) -> str:
    """The names and defaults of a model's arguments."""
    arguments = inspect.signature(model.forward).parameters.values()
    empty = inspect.Parameter.empty
    return f"({', '.join(str(one.replace(annotation=empty)) for one in arguments)})"


def copied(model: nn.Module, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A deep copy of a model; also where a weight is computed, which torch alone cannot copy.

    Old weight norm and pruning keep such weights as attributes, and compute them anew when called.

    Args:
        model: the model.
        shared: tensors that the copy has in common with it.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, memo)
