"""What layers inside of two networks return, compared layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._running import hooked
from transfer_surgery.matching.answers import logits_of
from transfer_surgery.matching.refit.linear_maps import LAYERS


def layers_to_compare(
    model: nn.Module, teacher: nn.Module, features: Sequence[str] | None
) -> tuple[str, ...]:
    """Paths of the modules whose outputs are compared.

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
        return tuple(path for path in layers if isinstance(theirs.get(path), LAYERS))
    for network, modules in ((model, ours), (teacher, theirs)):
        if missing := [path for path in features if path not in modules]:
            raise ValueError(
                f"features={missing}: {type(network).__name__} has no such modules; take paths "
                "from named_modules() that the model and its teacher both have."
            )
    return tuple(features)


def _as_written(network: nn.Module) -> nn.Module:
    """The network that `torch.compile` has put a module around, by which its paths go."""
    inside: nn.Module = getattr(network, "_orig_mod", network)
    return inside


class LayerOutputs:
    """The last output of some modules of a network, while it is watched."""

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        modules = dict(_as_written(network).named_modules())
        self._modules = {modules[path]: path for path in paths}
        self._last: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, outputs are kept."""

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # A copy: an activation in place behind the layer writes into its output.
            self._last[self._modules[module]] = logits_of(output).clone()

        with hooked(*(module.register_forward_hook(keep) for module in self._modules)):
            yield
        self._last.clear()

    def error(self, wanted: LayerOutputs) -> Tensor:
        """The mean relative squared error of the outputs; of none it is 0."""
        errors = []
        for path, theirs in wanted._last.items():
            ours = self._last.get(path)
            if ours is not None and ours.shape == theirs.shape:
                theirs = theirs.detach().float()
                error = (ours.float() - theirs).square().mean()
                errors.append(error / theirs.square().mean().clamp_min(1e-12))
        return torch.stack(errors).mean() if errors else torch.zeros(())
