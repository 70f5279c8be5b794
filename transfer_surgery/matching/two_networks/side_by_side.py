"""Both networks run on every batch, and wait for each other at each module that is fitted.

The original network stops behind a module, the other one before it. When the module has its new
numbers, both go on. So a fit takes one forward pass of each network. At a layer whose output is
added to something both stop before the sum: the other one has run the layer with its old weights
then, and runs it again with the new ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transfer_surgery.matching.two_networks.block_sums import Chain, SumFollower
from transfer_surgery.matching.two_networks.calls import Call, Look, Sum
from transfer_surgery.matching.two_networks.forward_state import ForwardState
from transfer_surgery.matching.two_networks.thread_state import ThreadState
from transfer_surgery.matching.two_networks.two_networks import GateOfTwo, TwoNetworks
from transfer_surgery.matching.two_networks.waiting_forward import WaitingForward
from transfer_surgery.units import Gate, GatedActivation


class SideBySide:
    """Forward passes of the original network and of the one that it becomes, stopped in step.

    As a context manager: at the end the threads are gone, and gates and hooks are as before.

    Args:
        networks: both networks.
        calls: the modules to stop at and how often each is called, in the order of their calls.
        sums: the layers among them that are fitted to a sum.
        state: what a forward pass changes in the model.
        waiting: number of batches whose forward passes wait; the others are run once more for each
            module, which takes less memory and more time.
        look_behind: what is kept of a call of the original network.
        look_before: what is kept of a call of the other one.
    """

    def __init__(
        self,
        networks: TwoNetworks,
        calls: Mapping[nn.Module, int],
        sums: Collection[nn.Module],
        state: ForwardState,
        waiting: int,
        look_behind: Look,
        look_before: Look,
    ) -> None:
        self._networks, self._calls, self._pending = networks, calls, set(calls)
        self._state, self._waiting, self._sums = state, waiting, sums
        batches = range(len(networks.batches))
        self._original = [_Side(self, i, original=True, look=look_behind) for i in batches]
        self._other = [_Side(self, i, original=False, look=look_before) for i in batches]
        self._handles: list[RemovableHandle] = []
        self._gates: dict[GatedActivation, Gate] = {}
        self._before: list[tuple[nn.Module, str, Tensor]] = []
        self.running: _Side | None = None

    def __enter__(self) -> SideBySide:
        self.threads = ThreadState()
        for module in self._calls:
            self._handles.append(module.register_forward_pre_hook(self._arrive, with_kwargs=True))
            # Before the user's own hooks, which may change the output.
            self._handles.append(
                module.register_forward_hook(self._leave, prepend=True, with_kwargs=True)
            )
        for unit in [*self._networks.units, *self._networks.others]:
            own = unit.gate.predict() if unit in self._networks.others else 1.0
            self._gates[unit] = unit.gate
            unit._modules["gate"] = GateOfTwo(unit.gate, own, self.runs_original)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for side in [*self._original, *self._other]:
                side.close()
        finally:
            for handle in self._handles:
                handle.remove()
            for unit, gate in self._gates.items():
                unit._modules["gate"] = gate

    def upto(self, module: nn.Module) -> Iterator[tuple[list[Any], list[Any]]]:
        """Let both networks come to a module, batch after batch, and see its calls.

        Yields what is kept of the calls in the network that changes, and in the original one. When
        all batches are through, `fitted` or `passed` has to be called.
        """
        for original, other in zip(self._original, self._other, strict=True):
            wanted = original.upto(module, self._calls[module])
            yield other.upto(module, self._calls[module]), wanted

    def passed(self, module: nn.Module) -> None:
        """The networks need not stop at a module again."""
        self._pending.discard(module)

    def fitted(self, unit: GatedActivation) -> None:
        """A site has its new numbers: from now on the network that changes uses them."""
        self.passed(unit)
        gate = unit._modules["gate"]
        assert isinstance(gate, GateOfTwo)
        gate.transfer(self._networks.transferred_gate(unit))

    def assign(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Give a module other weights; the original network keeps its own."""
        for name, value in values.items():
            tensor = getattr(module, name)
            self._before.append((module, name, tensor.data))
            _set_data(tensor, value.to(tensor))

    def restore(self) -> None:
        """Give the modules their original weights back."""
        self._exchange()
        self._before.clear()

    def _exchange(self) -> None:
        """Original weights in place of the new ones, or the other way round."""
        for index, (module, name, value) in enumerate(self._before):
            tensor = getattr(module, name)
            self._before[index] = (module, name, tensor.data)
            _set_data(tensor, value)

    # ---- what the sides do

    def start(self, batch: int, follower: SumFollower) -> WaitingForward:
        """A forward pass of the network whose turn it is, as it begins."""

        def run() -> Any:
            with follower if self._sums else nullcontext():
                return self._networks.call(self._networks.batches[batch])

        return WaitingForward(run, self.threads)

    def take_turn(self, side: _Side, forward: WaitingForward, values: list[Any]) -> Any:
        """Let one side go on to its next stop; `values` is its state, which is updated."""
        self.running = side
        if side.original:
            self._exchange()
        try:
            with self._state.changed_to(values) as after:
                return forward.advance()
        finally:
            values[:] = after
            if side.original:
                self._exchange()
            self.running = None

    def runs_original(self) -> bool:
        """Whether it is the turn of the original network."""
        return self.running is not None and self.running.original

    def waits(self, batch: int) -> bool:
        """Whether the forward passes of a batch wait."""
        return batch < self._waiting

    def start_state(self) -> list[Any]:
        """What a forward pass finds in the model at its beginning."""
        return list(self._state.start)

    def is_pending(self, module: nn.Module) -> bool:
        """Whether a module is still to be fitted."""
        return module in self._pending

    def _arrive(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        side = self.running
        if side is None or side.original or module not in self._pending or module in self._sums:
            return
        side.stop(module, [*args, *kwargs.values()])

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        side = self.running
        if side is not None and module in self._pending:
            if module in self._sums:
                side.follower.follow(Chain(module, args, kwargs, output))
            elif side.original:
                side.stop(module, [output, *args, *kwargs.values()])

    def before_sum(self, chain: Chain, other: Tensor) -> Tensor:
        """Stop before the sum that the output of a layer goes into; what is to be added."""
        side = self.running
        assert side is not None
        given = [*chain.args, *chain.kwargs.values()]
        values = [chain.start, *given] if side.original else given
        side.stop(chain.layer, values, Sum(chain, other))
        return chain.summand if side.original else chain.renewed()


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """What was made in inference mode takes only values that were made in it."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.data = value if value.is_inference() == tensor.is_inference() else value.clone()


class _Side:
    """One network on one batch: its forward pass, and what was kept of the calls on its way."""

    def __init__(self, both: SideBySide, batch: int, *, original: bool, look: Look) -> None:
        self._both, self._batch, self.original, self._look = both, batch, original, look
        self._forward: WaitingForward | None = None
        self.follower = SumFollower(both.before_sum)
        self._values: list[Any] = []
        self._kept: dict[nn.Module, list[Any]] = {}

    def stop(self, module: nn.Module, values: list[Any], sum: Sum | None = None) -> None:
        """Called in the thread of the forward pass, by a hook or at a sum."""
        assert self._forward is not None
        self._forward.stop((module, values, sum))

    def upto(self, module: nn.Module, calls: int) -> list[Any]:
        """Go on until a module has been reached so many times; what is kept of these calls.

        Where the forward pass has run past other modules that are to be fitted, or further calls
        of this one, it is of no use to the network that changes: it starts again the next time.
        """
        if self._forward is None:
            self._forward = self._both.start(self._batch, self.follower)
            self._values, self._kept = self._both.start_state(), {}
        while len(self._kept.get(module, ())) < calls and self._go_on():
            pass
        found = self._kept.pop(module, [])
        passed = any(self._both.is_pending(other) for other in self._kept) or len(found) > 1
        ended = len(found) < calls
        if not self._both.waits(self._batch) or (not self.original and (passed or ended)):
            self.close()
        return found

    def _go_on(self) -> bool:
        """To the next stop; False at the end."""
        assert self._forward is not None
        seen = self._both.take_turn(self, self._forward, self._values)
        if seen is None:
            return False
        module, *values = seen
        kept = self._kept.setdefault(module, [])
        with torch.no_grad():
            kept.append(self._look(Call(module, self._batch, len(kept), *values)))
        return True

    def close(self) -> None:
        """End the forward pass, wherever it is."""
        forward, self._forward = self._forward, None
        if forward is not None:
            forward.close()
