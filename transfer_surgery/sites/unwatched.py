"""Activations that ran where the observer cannot look: in another thread, in compiled code."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import Node

from transfer_surgery.activations import get_activation, registered_activations
from transfer_surgery.sites.tensor_facts import is_known

Names = tuple[str, ...]
"""Of the activations that a node may stand for: ELU and SELU have the same."""


class Unwatched:
    """What ran unseen in one run of a model, as far as its tensors tell.

    The autograd graph has a node for each activation, whatever ran it.

    Args:
        reads_graph: whether to read that graph; the run must be one with gradients.

    Attributes:
        has_strangers: whether there were tensors that no call has made that was seen.
        is_incomplete: whether the run that reads the graph has failed.
    """

    def __init__(self, reads_graph: bool = False) -> None:
        self.has_strangers, self._reads_graph = False, reads_graph
        self.is_incomplete = False
        self._without_graph: list[weakref.ref[Tensor]] = []
        self._names = _names_of_nodes() if reads_graph else {}
        self._known = set[Any]()
        self._unseen, self._without_node = Counter[Names](), Counter[Names]()

    @property
    def counts(self) -> Counter[Names]:
        """How often each activation ran unseen."""
        return self._unseen - self._without_node

    @property
    def is_unknown(self) -> bool:
        """Whether values came from code that even the graph does not tell of.

        To be asked after the run: a tensor that then lives on is a constant from outside.
        """
        return self.is_incomplete or any(one() is None for one in self._without_graph)

    def note_given(self, tensors: Iterable[Tensor]) -> None:
        """Tensors come into what is seen: how they were made may not have been."""
        for x in tensors:
            self.has_strangers |= x.is_floating_point() and not is_known(x)
            if self._reads_graph:
                is_plain = x.is_floating_point() and not is_functorch_wrapped_tensor(x)
                if is_plain and not is_known(x) and not x.requires_grad:
                    self._without_graph.append(weakref.ref(x))
                self._unseen += self._new_names(x)

    def note_made(self, tensors: Iterable[Tensor], activation: str | None) -> None:
        """A call that is seen has made tensors; it is an activation, where there is a name."""
        if self._reads_graph:
            made = [names for x in tensors for names in self._new_names(x)]
            for names in set(self._names.values()):
                # In torch.func.vmap there are no nodes; later they seem to come from nowhere.
                if activation in names and names not in made:
                    self._without_node[names] += 1

    def close(self) -> None:
        """Let go of the graph, and so of its tensors."""
        self._known.clear()

    def _new_names(self, tensor: Tensor) -> Counter[Names]:
        """The activations among the nodes that were not known before, which they are from now."""
        found, nodes = Counter[Names](), list[Node | None]()
        with contextlib.suppress(RuntimeError):  # a view that was written to has no node
            nodes.append(tensor.grad_fn)
        while nodes:
            node = nodes.pop()
            if node is not None and node not in self._known:
                self._known.add(node)  # which keeps it, and with it its identity
                nodes += [before for before, _ in node.next_functions]
                found.update(filter(None, [self._names.get(node.name())]))
        return found


def _names_of_nodes() -> dict[str, Names]:
    """Of activations that are one node of a graph: which have a node of this name."""
    found: dict[str, set[str]] = defaultdict(set)
    x = torch.ones(2, requires_grad=True)
    for name in registered_activations():
        with contextlib.suppress(Exception):  # whatever those of a user refuse
            activation = get_activation(name)
            node = activation(x, *(torch.ones(()) for _ in activation.operands)).grad_fn
            before = [one.name() for one, _ in node.next_functions if one] if node else []
            if node and before == ["torch::autograd::AccumulateGrad"]:
                found[node.name()].add(name)
    return {node: tuple(sorted(names)) for node, names in found.items() if "identity" not in names}
