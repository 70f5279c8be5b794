"""Who evaluates a formula in a training step: eager torch calls, or code that inductor makes.

Compiling takes seconds, which a short run never earns back. A formula is therefore evaluated
eagerly until that has taken as long as compiling takes, and compiled then: whatever the length of
the run, this costs at most twice what the better choice would have cost.

``TRANSFER_SURGERY_KERNELS`` in the environment decides otherwise: ``eager`` never compiles,
``compiled`` does so at the first step.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from transfer_surgery._running import compiled_nonetheless

VARIABLE = "TRANSFER_SURGERY_KERNELS"
CHOICES = ("auto", "eager", "compiled")
COMPILE_SECONDS = 10.0
"""About what compiling one formula takes; `benchmarks/speed.py` prints the first step with all."""
MOST_ENGINES = 64
"""Formulas (activations, dtypes) beyond this number stay eager."""

_log = logging.getLogger("transfer_surgery")
_engines: dict[tuple[Any, ...], Engine] = {}


class Formula:
    """A differentiable function of tensors; equal ones are the same function."""

    def plain(self, *tensors: Tensor) -> Tensor:
        """The formula as differentiable tensor code without decisions on values."""
        raise NotImplementedError

    def value(self, *tensors: Tensor) -> Tensor:
        """Its value, computed eagerly and without a graph."""
        return self.plain(*tensors)

    def gradients(
        self, needed: tuple[bool, ...], grad: Tensor, *tensors: Tensor
    ) -> Sequence[Tensor]:
        """Gradients of those tensors that need one, computed eagerly and without a graph."""
        return gradients_of(self.plain, needed, grad, *tensors)


def gradients_of(
    function: Callable[..., Tensor], needed: tuple[bool, ...], grad: Tensor, *tensors: Tensor
) -> Sequence[Tensor]:
    """Gradients of those tensors that need one, by autograd."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
        y = function(*leaves)
    return torch.autograd.grad(y, [leaf for leaf in leaves if leaf.requires_grad], grad)


def kernel_choice() -> str:
    """What the environment asks for.

    Raises:
        ValueError: the value is not one of CHOICES.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise ValueError(f"{VARIABLE}={choice!r}: use one of {', '.join(CHOICES)}.")
    return choice


def compiler_error(device: torch.device) -> str | None:
    """Why nothing can be compiled for a device, in one line; None where it works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def engine_for(formula: Formula, needed: tuple[bool, ...], x: Tensor) -> Engine:
    """The engine of a formula for inputs like ``x``, of which those marked need gradients."""
    key = (formula, needed, x.dtype, x.device.type)
    if (engine := _engines.get(key)) is None:
        engine = Engine(formula, needed)
        engine.stays_eager = len(_engines) >= MOST_ENGINES
        if not engine.stays_eager:
            _engines[key] = engine
    return engine


class Engine:
    """Evaluates one formula and its gradients, eagerly at first.

    Args:
        formula: what to evaluate.
        needed: which of its tensors need gradients.
    """

    def __init__(self, formula: Formula, needed: tuple[bool, ...]) -> None:
        self.formula, self.needed = formula, needed
        self.seconds = 0.0
        self.compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.stays_eager = False

    def value(self, *tensors: Tensor) -> Tensor:
        """The formula's value."""
        result: Tensor = self._run(0, self.formula.value, *tensors)
        return result

    def gradients(self, grad: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
        """The gradients of those tensors that need one."""
        eager = functools.partial(self.formula.gradients, self.needed)
        result: Sequence[Tensor] = self._run(1, eager, grad, *tensors)
        return result

    def _run(self, half: int, eager: Callable[..., Any], *tensors: Tensor) -> Any:
        if self._may_compile(tensors[0]):
            try:
                with compiled_nonetheless():
                    return self._compiled()[half](*tensors)
            except Exception as error:
                self.stays_eager = True
                _log.warning(
                    "%s stays eager, it cannot be compiled here: %s: %s. %s=eager keeps the "
                    "compiler out.",
                    self.formula,
                    type(error).__name__,
                    str(error).partition("\n")[0],
                    VARIABLE,
                )
        started = time.perf_counter()
        result = eager(*tensors)
        self.seconds += time.perf_counter() - started
        return result

    def _may_compile(self, x: Tensor) -> bool:
        if self.stays_eager or (choice := kernel_choice()) == "eager":
            return False
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing can be compiled while a CUDA graph is recorded
        return choice == "compiled" or self.seconds >= COMPILE_SECONDS

    def _compiled(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        if self.compiled is None:
            _log.info("%s is compiled from here on (%s=eager: never).", self.formula, VARIABLE)
            plain, needed = self.formula.plain, self.needed

            def value(*tensors: Tensor) -> Tensor:
                return plain(*tensors)

            def gradients(grad: Tensor, *tensors: Tensor) -> Sequence[Tensor]:
                def of_needed(*some: Tensor) -> Tensor:
                    given = iter(some)
                    every = zip(tensors, needed, strict=True)
                    return plain(*(next(given) if need else t for t, need in every))

                some = [t for t, need in zip(tensors, needed, strict=True) if need]
                each = [_for_each_example(t, grad) for t in some]
                found = torch.func.vjp(of_needed, *each)[1](grad)
                return [y.sum_to_size(t.shape) for y, t in zip(found, some, strict=True)]

            self.compiled = _compile(value), _compile(gradients)
        return self.compiled


def _for_each_example(t: Tensor, like: Tensor) -> Tensor:
    """``t`` with one copy for each example, where that is small.

    The gradient of a gate is a sum over all its elements. Summed over each example first, it is
    taken along in the loop that computes the gradient of the input; inductor would else read the
    input and the gradient once more for it.
    """
    shape = (1,) * (like.dim() - t.dim()) + t.shape
    if like.dim() > 1 and shape[0] == shape[-1] == 1:
        return t.expand(like.shape[0], *shape[1:])
    return t


def _compile(function: Any) -> Callable[..., Any]:
    """Compile a function for any sizes; its variants are counted apart from those of others.

    Torch bounds the number of compilations per code object, of which every engine gets its own.
    """
    code = function.__code__.replace()
    own = FunctionType(
        code, function.__globals__, code.co_name, function.__defaults__, function.__closure__
    )
    return torch.compile(own, dynamic=True)
