"""What layers inside of two networks return, compared layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transfer_surgery._checkpointing import check_graph_shows
from transfer_surgery._running import hooked
from transfer_surgery.matching.answers import logits_of
from transfer_surgery.matching.refit.linear_maps import LAYERS

Layers = Mapping[str, nn.Module]
"""Modules of a network by their paths."""


class PairedLayers(NamedTuple):
    """Modules of two networks that have the same paths."""

    model: Layers
    teacher: Layers


Outputs = Mapping[str, Tensor]
"""What modules of a network have returned, by their paths."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of that."""


def layers_to_compare(
    model: nn.Module, teacher: nn.Module, features: Sequence[str] | None
) -> PairedLayers:
    """The modules of each network whose outputs are compared.

    Args:
        model: the network that learns.
        teacher: the one that teaches.
        features: paths that both have; None: all linear layers and convolutions.

    Raises:
        ValueError: a network lacks one of these modules.
    """
    ours, theirs = (
        dict(_without_compile_wrapper(network).named_modules()) for network in (model, teacher)
    )
    if features is None:
        layers = [path for path, module in ours.items() if isinstance(module, LAYERS)]
        features = [path for path in layers if isinstance(theirs.get(path), LAYERS)]
    for network, modules in ((model, ours), (teacher, theirs)):
        if missing := [path for path in features if path not in modules]:
            raise ValueError(
                f"features={missing}: {type(network).__name__} has no such modules; take paths "
                "from named_modules() that the model and its teacher both have."
            )
    return PairedLayers(
        {path: ours[path] for path in features}, {path: theirs[path] for path in features}
    )


def _without_compile_wrapper(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` has put a module around, by which its paths go."""
    inside: nn.Module = getattr(network, "_orig_mod", network)
    return inside


@contextmanager
def outputs_kept(layers: Layers, learn: bool = False) -> Iterator[Outputs]:
    """While this lasts, the last output of each layer is kept; one that does not run has none.

    Args:
        layers: the modules.
        learn: whether gradients are to come from the outputs.

    Raises:
        RuntimeError: none can come, in reentrant checkpointing; the network raises it.
    """
    kept: dict[str, Tensor] = {}

    def keep(path: str, output: Tensor) -> None:
        if learn:
            check_graph_shows(path)
        # A copy: an activation in place behind a layer writes into its output.
        kept[path] = output.clone()

    with _shown(layers, keep):
        try:
            yield kept
        finally:
            kept.clear()  # their graphs are large


@contextmanager
def first_shapes(layers: Layers) -> Iterator[Shapes]:
    """While this lasts, the shape of the first output of each layer is kept."""
    shapes: dict[str, tuple[int, ...]] = {}
    with _shown(layers, lambda path, output: shapes.setdefault(path, tuple(output.shape))):
        yield shapes


def _shown(layers: Layers, see: Callable[[str, Tensor], object]) -> AbstractContextManager[None]:
    def show(path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        see(path, logits_of(output))

    return hooked(*(m.register_forward_hook(partial(show, path)) for path, m in layers.items()))


def check_compared(features: Iterable[str], ours: Shapes, theirs: Shapes) -> None:
    """Raise where the outputs of modules that the user named cannot be compared.

    Args:
        features: their paths.
        ours: the shapes of what they return in the network that learns, for held-out batches.
        theirs: the same of the network that teaches.

    Raises:
        ValueError: one does not run on held-out batches, or its outputs differ in shape.
    """
    for path in features:
        for whose, shapes in (("the model", ours), ("its teacher", theirs)):
            if path not in shapes:
                raise ValueError(
                    f"features: {path} of {whose} does not run on the held-out batches, so that "
                    "nothing of it can be compared. Leave it out, or give batches it runs on."
                )
        if ours[path] != theirs[path]:
            raise ValueError(
                f"features: {path} returns {ours[path]} and {theirs[path]} in the model and its "
                "teacher, which cannot be compared. Leave it out."
            )


def layers_error(ours: Outputs, theirs: Outputs) -> Tensor:
    """The mean relative squared error of the layers that ran in both; of none it is 0."""
    errors = []
    for path, wanted in theirs.items():
        now = ours.get(path)
        if now is not None and now.shape == wanted.shape:
            wanted = wanted.detach().float()
            error = (now.float() - wanted).square().mean()
            errors.append(error / wanted.square().mean().clamp_min(1e-12))
    return torch.stack(errors).mean() if errors else torch.zeros(())
