"""The polynomials of a baked network as JSON: coefficients and range of each site and gate."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.activations import ActivationModule, degree_of
from transfer_surgery.files.replacing import check_replaceable, replace_file
from transfer_surgery.surgery import MixedActivation, check_no_gates
from transfer_surgery.units import FittedActivation, Polynomial

_KIND = "transfer_surgery polynomials"


def save_polynomials(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the polynomials of a baked network as JSON, for compilers of encrypted computing.

    Under ``"sites"`` the file has, for each path of a polynomial in the model (a site that keeps
    all of its source has none):

    - ``"coefficients"``: those of ``1, x, x**2, ...``, where ``x`` is the input of the site, one
      list for each gate, as float64 numbers computed from the parameters.
    - ``"scaled_coefficients"``: those of ``1, v, v**2, ...`` with ``v = scale * x + shift``, which
      is between -1 and 1 in the range. They do not cancel where a range is far from 0, as those of
      powers of ``x`` do.
    - ``"scale"`` and ``"shift"`` of each gate.
    - ``"range"``: the lowest and the highest input that each polynomial was fitted to; it is wider
      where these hardly differ. Beyond it a polynomial says nothing about the function that it
      stands for.
    - ``"degree"`` of the polynomials.
    - ``"shape"`` of the gates, such as ``[64]``, and ``"trailing"``, the number of axes of the
      input behind theirs, such as 2 for channels of images.
    - ``"gates"``, only where a site mixes several parts: for each gate 1 minus the share of this
      polynomial, so 1 where the site keeps its source. After a second conversion a site has several
      entries, whose paths differ in ``.source`` and ``.target`` at the end. The output is the sum
      of ``(1 - gates) * polynomial`` over them, and of the original activation times the share that
      is left.

    Args:
        model: a model after `transfer_surgery.bake`, also after `fold_targets`; it is not changed.
        path: the output file, usually ``.json``; folders on the way to it are made. A file that is
            there is replaced only if it is empty or was written by this function.

    Raises:
        ValueError: the model still has gates, has no fitted polynomials, or one that was not fitted
            or whose numbers are not finite, or two of one site whose gates differ in kind; or the
            file exists and is something else.

    Examples:
        >>> import tempfile
        >>> from transfer_surgery import bake, convert, match_targets, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 4)
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> _ = match_targets(convert(model, "polynomial(degree=3)", example_input=x), [x])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_polynomials(bake(swap_targets(model)), f"{folder}/polynomials.json")
        ...     saved = json.loads(Path(folder, "polynomials.json").read_text())
        >>> [len(gate) for gate in saved["sites"]["1"]["coefficients"]]
        [4, 4, 4]
    """
    check_arguments(save_polynomials, locals())
    check_no_gates(model)
    path = Path(path)
    check_replaceable(path, _check_file)
    inside = {
        module.activation
        for module in model.modules()
        if isinstance(module, FittedActivation) and isinstance(module.activation, Polynomial)
    }
    shares = _shares(model)
    sites = {
        name: _site(name, module, shares.get(module))
        for name, module in model.named_modules()
        if (isinstance(module, Polynomial) and module not in inside)
        or (isinstance(module, FittedActivation) and module.activation in inside)
    }
    for name, module in model.named_modules():
        if isinstance(module, ActivationModule) and degree_of(module.activation):
            raise ValueError(
                f"{name}: this polynomial was not fitted, so that it has no range: call "
                "match_targets with batches that come to it before bake."
            )
    if not sites:
        raise ValueError(
            "the model has no fitted polynomials: convert it with target='polynomial(degree=2)', "
            "and call match_targets, swap_targets and bake."
        )
    for name, site in sites.items():
        gates = [*site["coefficients"], *site["scaled_coefficients"], *site["range"]]
        if not all(math.isfinite(number) for gate in gates for number in gate):
            raise ValueError(
                f"{name}: a coefficient, or an end of the range, is not finite, which JSON does "
                "not have: call match_targets again before bake."
            )
    text = json.dumps({"kind": _KIND, "version": 1, "sites": sites}, indent=1)
    replace_file(path, lambda new: new.write_text(text + "\n"))


def _shares(model: nn.Module) -> dict[nn.Module, Tensor]:
    """What share of the output of its site each part of a mixed activation has, for each gate."""
    shares: dict[nn.Module, Tensor] = {}
    for name, mixed in model.named_modules():  # the outer ones come first
        if isinstance(mixed, MixedActivation):
            z = mixed.z.double().cpu()
            whole = shares.get(mixed, torch.ones_like(z))
            for part, share in ((mixed.source, z), (mixed.target, 1 - z)):
                if share.numel() != 1 != whole.numel():
                    _check_same_gates(name, share.shape, whole.shape)
                shares |= dict.fromkeys(part.modules(), share * whole)
    return shares


def _check_same_gates(name: str, one: Sequence[int], other: Sequence[int]) -> None:
    """Raise ValueError where two conversions of a site had gates of other shapes."""
    if tuple(one) != tuple(other):
        raise ValueError(
            f"{name}: it was converted twice, with gates of the shapes {tuple(one)} and "
            f"{tuple(other)}. Convert the original network once, or both times with one "
            "granularity."
        )


def _site(name: str, module: nn.Module, share: Tensor | None) -> dict[str, Any]:
    numbers = [getattr(module, letter, None) for letter in "awcb"]
    polynomial = module.activation if isinstance(module, FittedActivation) else module
    assert isinstance(polynomial, Polynomial)
    k = polynomial.k.detach().double().cpu()
    degree, *shape = k.shape
    a, w, c, b = (
        torch.full(shape, start, dtype=torch.float64) if p is None else p.detach().double().cpu()
        for p, start in zip(numbers, (1.0, 1.0, 0.0, 0.0), strict=True)
    )
    scaled = torch.stack([b, *(a * one for one in k)], -1).flatten(0, -2)
    coefficients = _powers_of_input(scaled.unbind(1), w.flatten(), c.flatten())
    ends = torch.stack([(-1 - c) / w, (1 - c) / w], -1).flatten(0, -2).sort(-1).values
    found = {
        "degree": degree,
        "shape": shape,
        "trailing": polynomial.trailing,
        "coefficients": coefficients.tolist(),
        "scaled_coefficients": scaled.tolist(),
        "scale": w.flatten().tolist(),
        "shift": c.flatten().tolist(),
        "range": ends.tolist(),
    }
    if share is None:
        return found
    if share.numel() != 1:
        _check_same_gates(name, share.shape, shape)
    return found | {"gates": (1 - share).expand(shape).flatten().tolist()}


def _powers_of_input(k: Sequence[Tensor], w: Tensor, c: Tensor) -> Tensor:
    """``k0 + k1*v + k2*v**2 + ...`` with ``v = w*x + c``, as ``(gates, powers of x)``."""
    found = torch.zeros(len(w), len(k), dtype=torch.float64)
    for one in reversed(k):  # Horner's rule, for polynomials in x
        higher = torch.cat([torch.zeros_like(found[:, :1]), found[:, :-1]], 1)
        found = w[:, None] * higher + c[:, None] * found
        found[:, 0] += one
    return found


def _check_file(file: Path) -> None:
    """Raise ValueError where a file was not written by `save_polynomials`."""
    try:
        about = json.loads(file.read_text())
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise ValueError(f"{file} has no polynomials of this library.")
