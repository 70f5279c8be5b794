"""What a stand-in is called with: the arguments of an example, as fake tensors or copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree


def example_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Read an example input: a tensor, a tuple of arguments or a dict of keyword arguments.

    Anything else, such as a list, a named tuple or a packed sequence, is the only argument.

    Raises:
        ValueError: there is a nested tensor in it.
    """
    leaves = pytree.tree_leaves(example_input)
    if any(isinstance(leaf, Tensor) and leaf.is_nested for leaf in leaves):
        raise ValueError(
            "example_input holds a nested tensor, whose shape gates cannot be made for. Pass a "
            "padded one; gated activations do not work on nested tensors either."
        )
    if isinstance(example_input, Mapping):
        return (), dict(example_input)
    if type(example_input) is tuple:
        return example_input, {}
    return (example_input,), {}


def fake_arguments(arguments: Any, fake: FakeTensorMode | None, double: bool) -> Any:
    """Arguments for a probe: fake tensors, or clones; with `double`, a single example as two.

    Batch normalisation refuses to train on one value per channel, hence two. An axis of length 1 is
    one of examples where every tensor starts with one; that of a packed sequence never is.
    """
    leaves = pytree.tree_leaves(arguments, is_leaf=is_packed)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 1]
    single = double and all(tensor.shape[0] == 1 for tensor in tensors)

    def copy_leaf(leaf: Any) -> Any:
        if is_packed(leaf):
            return pytree.tree_map_only(Tensor, copy_tensor, leaf)
        if not isinstance(leaf, Tensor):
            return leaf
        if single and leaf.dim() > 1:
            leaf = leaf.expand(2, *leaf.shape[1:])
        return copy_tensor(leaf)

    def copy_tensor(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return tensor.clone() if fake is None else fake.from_tensor(tensor)

    return pytree.tree_map(copy_leaf, arguments, is_leaf=is_packed)


def is_packed(value: Any) -> bool:
    """Whether a value is a packed sequence: a tuple that checks what it holds, hence no tree."""
    return isinstance(value, PackedSequence)
