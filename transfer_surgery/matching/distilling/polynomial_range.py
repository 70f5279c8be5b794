"""Polynomials beyond the range of their fit, while a network is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from transfer_surgery._checkpointing import check_graph_shows, recomputes
from transfer_surgery._messages import listed
from transfer_surgery.activations import degree_of
from transfer_surgery.matching.distilling.held_out import Examination
from transfer_surgery.units import GatedActivation, gated_activations, watched_inputs


class FittedRanges:
    """How far inputs leave the range of the polynomials that they go to.

    Args:
        model: a converted model; its sites whose targets are no polynomials are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._paths: dict[GatedActivation, str] = {}
        self.squares: dict[GatedActivation, list[Tensor]] = {}
        """The squared largest distance of each example, for each call since the last penalty."""
        self._bounded = False
        self._unfitted: dict[GatedActivation, str] = {}
        for path, unit in gated_activations(model):
            if degree_of(unit.target):
                (self._unfitted if unit.fitted is None else self._paths)[unit] = path

    def __len__(self) -> int:
        return len(self._paths)

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Polynomials do not grow far beyond the range of their fit, as in training mode."""
        self._bound(True)
        try:
            yield
        finally:
            self._bound(False)

    def _bound(self, bounded: bool) -> None:
        self._bounded = bounded
        for unit in self._paths:
            unit.bounded = bounded

    @contextmanager
    def watched(self) -> Iterator[None]:
        """While this lasts, `penalty` counts what the polynomials get while they are trained.

        Raises:
            ValueError: one that counts and runs was not fitted, so that it has no range.
            RuntimeError: one runs where its inputs have no graph, in reentrant checkpointing.
        """

        def count(unit: GatedActivation, x: Tensor) -> None:
            # What `distill` does inside of a user's own context does not count in the latter.
            if not (unit.training or self._bounded):
                return
            if not torch.is_grad_enabled():
                check_graph_shows(self._paths[unit])
                return
            found = self._largest_distance(unit, x).square()
            if not recomputes():
                self.squares.setdefault(unit, []).append(found)

        def refuse(unit: GatedActivation, x: Tensor) -> None:
            if not torch.compiler.is_compiling() and not bool((unit.gate.predict() == 1).all()):
                raise ValueError(
                    f"{self._unfitted[unit]}: this polynomial was not fitted, so that it has no "
                    "range: call match_targets with batches that come to it first."
                )

        try:
            with watched_inputs(self._paths, count), watched_inputs(self._unfitted, refuse):
                yield
        finally:
            self.squares.clear()

    def penalty(self) -> Tensor:
        """The mean over examples of the squared largest distance from the range, summed over sites.

        It is that since the last call. A site that ran several times has the mean over all of it.
        """
        # A single input far outside makes an example overflow. In a mean over all inputs of images
        # it would count for next to nothing.
        squares = [torch.cat(calls) for calls in self.squares.values()]
        found = [square.sum() / max(len(square), 1) for square in squares]
        self.squares.clear()
        return torch.stack(found).sum() if found else torch.zeros(())

    def why_none_ran(self) -> str:
        """What keeps the polynomials from being counted, as far as their state tells."""
        if all(unit.is_out for unit in self._paths):
            return "bake or revert has taken them out of the model; end the context before."
        if not any(unit.training for unit in self._paths):
            return "they are in evaluation mode: call model.train(), then the model."
        return (
            "call the model, then the penalty, both without torch.no_grad(). A copy of the model "
            "needs a range_penalty of its own, and gradient checkpointing use_reentrant=False."
        )

    def look_within_bounds(self, examination: Examination) -> tuple[float, str]:
        """What bounded polynomials do with held-out inputs, where they overflow without bounds.

        Returns:
            The loss, and for messages the sites whose inputs leave the range furthest, with the
            distances from its middle in halves of it.

        Raises:
            ValueError: the outputs are not finite either, so that polynomials are not the cause.
        """
        furthest = dict.fromkeys(self._paths.values(), 0.0)

        def look(unit: GatedActivation, x: Tensor) -> None:
            if x.numel():
                path = self._paths[unit]
                furthest[path] = max(furthest[path], self._largest_distance(unit, x).max().item())

        with self.bounded(), watched_inputs(self._paths, look):
            loss = examination.loss()
        left = sorted((path for path in furthest if furthest[path] > 0), key=lambda p: -furthest[p])
        if loss == math.inf or not left:
            raise ValueError(
                "the loss of the held-out batches is not finite, and polynomials are not the "
                "cause: look for NaN in the batches, and in what a function as loss= returns."
            )
        return loss, listed(f"{path} ({1 + furthest[path]:.3g})" for path in left)

    def _largest_distance(self, unit: GatedActivation, x: Tensor) -> Tensor:
        """How far each example, along the first axis, is outside of the range, at its furthest.

        In halves of the range; inputs whose source stays count as inside.
        """
        if not x.numel():
            return x.new_zeros(0)
        x = x.reshape(1) if not x.dim() else x
        assert unit.fitted is not None
        _, w, c, *_ = unit.fitted.expand(x)
        z = unit.granularity.expand(unit.gate.predict().detach(), x)
        # Only the furthest inputs need gradients. A compiler makes one pass of all that follows.
        if not torch.compiler.is_compiling():
            place = _place_of_largest(x, *(torch.where(z == 1, 0.0, n.detach()) for n in (w, c)))
            w, c, z, x = (tensor.expand_as(x)[place] for tensor in (w, c, z, x))
        # The range is from -1 to 1.
        distance = torch.where(z == 1, 0.0, (w * x + c).abs() - 1.0).clamp_min(0.0)
        return distance.reshape(len(x), -1).amax(1)


@torch.no_grad()
def _place_of_largest(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Where ``|w*x + c|`` is largest in each example: an index for each axis."""
    largest = torch.finfo(x.dtype).max  # so that w = 0 makes 0 of infinity
    v = (x.clamp(-largest, largest) * w + c).abs_()
    if v.dim() == 1:
        return (torch.arange(len(v), device=x.device),)
    # Go along the memory, in which images may have the channels last. First look for the row, since
    # a maximum is ten times as fast as its index.
    inner = sorted(range(1, v.dim()), key=v.stride, reverse=True)
    rows = v.permute(0, *inner).reshape(len(v), v.shape[inner[0]], -1)
    examples, row = torch.arange(len(v), device=x.device), rows.amax(2).argmax(1)
    flat = row * rows.shape[2] + rows[examples, row].argmax(1)
    found = torch.unravel_index(flat, [v.shape[axis] for axis in inner])
    return (examples, *(found[inner.index(axis)] for axis in range(1, v.dim())))
