"""Run a stand-in of a model in each training mode, in the first way in which the model runs."""

from __future__ import annotations

import itertools
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from transfer_surgery.sites.arguments import fake_arguments
from transfer_surgery.sites.frames import is_users
from transfer_surgery.sites.observation import Observation
from transfer_surgery.sites.observer import Observer
from transfer_surgery.sites.stand_in import Uncopyable, probe_copy, undisturbed
from transfer_surgery.sites.surroundings import LeftBehindError, Surroundings
from transfer_surgery.sites.unwatched import Unwatched


def observe(
    model: nn.Module, arguments: Any, modes: Sequence[str]
) -> tuple[dict[str, Observation], list[str]]:
    """Run a probe in each mode, each in the first way in which the model runs.

    Returns:
        What was seen in each mode, and why the model does not run in the others.
    """
    observations: dict[str, Observation] = {}
    surroundings = Surroundings(model)
    failures, error = [], None
    for mode in modes:
        result = _run(model, surroundings, arguments, mode)
        if isinstance(result, Observation):
            observations[mode] = result
        else:
            error = result
            failures.append(
                f"{mode} mode could not be examined, so what runs in it alone has no gates "
                f"({type(error).__name__}: {_first_line(error)})"
            )
    if not observations and error is not None:
        raise ValueError(
            f"{type(model).__name__} does not run on the example input{_where(error)} "
            f"({type(error).__name__}: {_first_line(error)}). Check that model(...) runs with it; "
            "pass another example_input=: a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments."
        ) from error
    return observations, failures


@dataclass(frozen=True)
class Setup:
    """How a stand-in is run; the defaults show most.

    Attributes:
        has_twins: whether other objects take the places of activation modules.
        hooks: whether hooks that are no part of the model run, too.
        gradients: whether gradients are recorded.
        is_fake: whether tensors are fake: shapes without values.
        double: whether a single example is run as two.
        reads_graph: whether the graph of the gradients tells what runs unseen.
        unfreezes: whether frozen parameters get gradients, too.
    """

    has_twins: bool = True
    hooks: bool = False
    gradients: bool = False
    is_fake: bool = True
    double: bool = True
    reads_graph: bool = False
    unfreezes: bool = False


def _run(
    model: nn.Module, surroundings: Surroundings, arguments: Any, mode: str
) -> Observation | Exception:
    """Examine one mode: on fake tensors, or for real where values steer the model.

    Without gradients and hooks of others where the model does not need them, with a single example
    as two, and with other objects in the place of activation modules, unless it compares them.

    Returns:
        What was seen, or why the model does not run on its own example.
    """
    error: Exception | None = None
    examine = partial(_examine, surroundings, model, arguments, mode)
    yes_no, no_yes = (True, False), (False, True)
    tries = itertools.product(yes_no, no_yes, no_yes, yes_no, yes_no)
    for setup in itertools.starmap(Setup, tries):
        error = None  # and with it what its frames hold
        try:
            found = examine(setup)
            if found.unwatched.has_strangers:
                found.unwatched = _unwatched(examine, setup)
            return found
        except (Uncopyable, LeftBehindError):
            raise
        except Exception as failed:
            error = failed
    assert error is not None
    return error


def _examine(
    surroundings: Surroundings, model: nn.Module, arguments: Any, mode: str, setup: Setup
) -> Observation:
    """Examine one mode in one way, and leave nothing of the stand-in where others find it."""
    left: list[weakref.ref[Any]] = []  # what should be gone afterwards
    try:
        found = _look(model, arguments, mode, setup, left)
    except Exception as error:
        _clear_frames(error)
        surroundings.clean(left, is_over=False)
        raise
    surroundings.clean(left)
    return found


def _look(
    model: nn.Module, arguments: Any, mode: str, setup: Setup, left: list[weakref.ref[Any]]
) -> Observation:
    fake = FakeTensorMode(allow_non_fake_inputs=True) if setup.is_fake else None
    probe = probe_copy(model, fake, setup.hooks).train(mode == "train")
    args, kwargs = fake_arguments(arguments, fake, setup.double)
    if setup.reads_graph:
        for parameter in filter(Tensor.is_floating_point, probe.parameters()):
            parameter.requires_grad_(setup.unfreezes or parameter.requires_grad)
        args, kwargs = pytree.tree_map_only(Tensor, _with_gradient, (args, kwargs))
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    kept = (*probe.modules(), *probe.parameters(), *probe.buffers(), *given)
    left += [weakref.ref(one) for one in kept]
    observer = Observer(probe, setup.reads_graph, setup.has_twins)
    try:
        with undisturbed(setup.is_fake):
            return observer.run(args, kwargs, fake, setup.gradients)
    finally:
        left += observer.close()


def _with_gradient(x: Tensor) -> Tensor:
    """No leaf, which could not be written to."""
    return x.requires_grad_().clone() if x.is_floating_point() else x


def _unwatched(examine: Callable[[Setup], Observation], setup: Setup) -> Unwatched:
    """What ran unseen where values came from nowhere; it takes another run, with gradients."""
    # Fake tensors are not made for several threads at a time; what is frozen may be written to.
    setup = replace(setup, gradients=True, reads_graph=True)
    for is_fake, unfreezes in itertools.product((setup.is_fake, False), (True, False)):
        try:
            return examine(replace(setup, is_fake=is_fake, unfreezes=unfreezes)).unwatched
        except LeftBehindError:
            raise
        except Exception:
            continue
    unknown = Unwatched()
    unknown.is_incomplete = True
    return unknown


def _clear_frames(error: BaseException | None) -> None:
    """Let the frames of an error, and of those before it, let go of what they hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _where(error: Exception) -> str:
    """The line of the model's own code that failed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
