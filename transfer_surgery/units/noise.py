"""The noise of sampled gates, and a warning where a recomputation draws other noise.

`torch.utils.checkpoint` runs a part of the network again in the backward pass. It sets the random
state back before, unless the user says ``preserve_rng_state=False``, which is right for a network
without dropout. A gate that is drawn anew there has the gradients of another sample.
"""

from __future__ import annotations

import warnings
from collections import deque
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from transfer_surgery._messages import user_stacklevel
from transfer_surgery.units.kernels import is_transformed

_REMEMBERED = 4096
"""Number of draws of one gate module between its forward pass and its recomputation, at most."""
_states: WeakKeyDictionary[nn.Module, deque[int]] = WeakKeyDictionary()
"""Random states, as hashes, in which a gate module was drawn outside of a backward pass."""


class RecomputedGatesWarning(UserWarning):
    """A recomputation in the backward pass draws gates of another random state."""


def draw_uniform(gate: nn.Module, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``eps ~ U(0, 1)``, float32, never exactly 0 or 1.

    Args:
        gate: whose noise it is.
        like: a tensor on the device to draw on; a wrapped one means that nobody looks at states.
        shape: of the noise.

    Raises:
        RuntimeError: `torch.vmap` was not told how to draw.

    Warns:
        RecomputedGatesWarning: the backward pass draws in a state that no forward pass had.
    """
    _check_state(gate, like)
    try:
        eps = torch.rand(shape, dtype=torch.float32, device=like.device)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise RuntimeError(
            "gates are drawn at random in training mode, and torch.vmap draws nothing unless it is "
            'told how: give it randomness="different", which draws them anew for each example, or '
            '"same"; or call model.eval().'
        ) from error
    return eps.clamp(2.0**-25, 1 - 2.0**-24)


def _check_state(gate: nn.Module, like: Tensor) -> None:
    state = _random_state(like)
    if state is None:
        return
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        # The newest comes first: it is what a recomputation looks for.
        _states.setdefault(gate, deque(maxlen=_REMEMBERED)).appendleft(state)
    elif state not in _states.get(gate, ()):
        warnings.warn(
            "the backward pass runs a converted activation again, with another random state than "
            "the forward pass had: its gates are others, and the gradients are wrong. Leave "
            "checkpoint(preserve_rng_state=True), torch's default, or convert with "
            'gate=HardConcrete(noise="none").',
            RecomputedGatesWarning,
            stacklevel=user_stacklevel(),
        )


def _random_state(like: Tensor) -> int | None:
    """A hash of the random state of a device; None where nobody can read it."""
    if like.device.type not in ("cpu", "cuda") or is_transformed(like):
        return None
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    state = torch.cuda.get_rng_state(like.device) if like.is_cuda else torch.get_rng_state()
    return hash(state.numpy().tobytes())
