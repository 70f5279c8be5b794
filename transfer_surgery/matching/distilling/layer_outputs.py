"""What layers inside of two networks return, compared layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import hooked
from transfer_surgery.matching.answers import logits_of
from transfer_surgery.matching.refit.linear_maps import LAYERS

Layers = Mapping[str, nn.Module]
"""Modules of a network by their paths."""

Outputs = Mapping[str, Tensor]
"""What modules of a network have returned, by their paths."""


def layers_to_compare(
    model: nn.Module, teacher: nn.Module, features: Sequence[str] | None
) -> tuple[Layers, Layers]:
    """The modules of each network whose outputs are compared.

    Args:
        model: the network that learns.
        teacher: the one that teaches.
        features: paths that both have; None: all linear layers and convolutions.

    Raises:
        ValueError: a network lacks one of these modules.
    """
    ours, theirs = (dict(_as_written(network).named_modules()) for network in (model, teacher))
    if features is None:
        layers = [path for path, module in ours.items() if isinstance(module, LAYERS)]
        features = [path for path in layers if isinstance(theirs.get(path), LAYERS)]
    for network, modules in ((model, ours), (teacher, theirs)):
        if missing := [path for path in features if path not in modules]:
            raise ValueError(
                f"features={missing}: {type(network).__name__} has no such modules; take paths "
                "from named_modules() that the model and its teacher both have."
            )
    return {path: ours[path] for path in features}, {path: theirs[path] for path in features}


def _as_written(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` has put a module around, by which its paths go."""
    inside: nn.Module = getattr(network, "_orig_mod", network)
    return inside


@contextmanager
def outputs_kept(layers: Layers) -> Iterator[Outputs]:
    """While this lasts, the last output of each layer is kept; one that does not run has none."""
    kept: dict[str, Tensor] = {}
    paths = {module: path for path, module in layers.items()}

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # A copy: an activation in place behind the layer writes into its output.
        kept[paths[module]] = logits_of(output).clone()

    with hooked(*(module.register_forward_hook(keep) for module in paths)):
        try:
            yield kept
        finally:
            kept.clear()  # their graphs are large


def check_compared(features: Iterable[str], ours: Outputs, theirs: Outputs) -> None:
    """Raise where the outputs of modules that the user named cannot be compared.

    Raises:
        ValueError: one does not run on held-out batches, or its outputs differ in shape.
    """
    for path in features:
        for whose, outputs in (("the model", ours), ("its teacher", theirs)):
            if path not in outputs:
                raise ValueError(
                    f"features: {path} of {whose} does not run on the held-out batches, so that "
                    "nothing of it can be compared. Leave it out, or give batches it runs on."
                )
        if ours[path].shape != theirs[path].shape:
            shapes = f"{tuple(ours[path].shape)} and {tuple(theirs[path].shape)}"
            raise ValueError(
                f"features: {path} returns {shapes} in the model and its teacher, which cannot be "
                "compared. Leave it out."
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
