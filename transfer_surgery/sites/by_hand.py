"""Element-wise formulas that are no known activation: they are listed, and stay."""

from __future__ import annotations

import itertools

from torch import Tensor

from transfer_surgery.activations import Record, formula_of
from transfer_surgery.sites.tensor_facts import is_from_layer, is_live

BY_HAND = "handwritten"
"""Their name in a plan."""
_STRAIGHT = {"+", "-", "neg", "where", "masked_fill", "type_as", "clone", "zeros_like", "ones_like"}
"""Operations that bend no line."""


class ByHand:
    """Follows how the values of layers are bent."""

    def __init__(self) -> None:
        self._bent: dict[Record, tuple[Record, bool]] = {}

    def bent(self, record: Record, out: Tensor) -> tuple[Record, str] | None:
        """The value of a layer that a call completes the bending of, and why it is only listed.

        None where it bends nothing, or where nobody could say what.
        """
        given = [one for one in record.given if is_live(one.value)]
        made = [self._bent.get(one, (one, False)) for one in given]
        if len({root for root, _ in made}) != 1:
            return None
        root, label = made[0][0], record.label
        bends = label not in _STRAIGHT
        if label in ("*", "/"):
            bends = len(given) > 1 or (label == "/" and given[0] is record.operands[1])
        bent = bends or any(is_bent for _, is_bent in made)
        self._bent[record] = root, bent
        if not bent or not out.is_floating_point() or not is_from_layer(root.value):
            return None
        return root, (
            f"it is written by hand ({formula_of(record, root) or label}); register_activation "
            "makes it known, with learned tensors register_formula"
        )


def is_by_hand(record: Record) -> bool:
    """Whether a value is listed as such a formula."""
    return record.event is not None and record.event.source.name == BY_HAND


def note_soft_cap(record: Record) -> None:
    """``cap * tanh(x / cap)`` keeps values within bounds and is no activation of features."""
    for tanh, cap in itertools.permutations(record.operands, 2):
        if record.label != "*" or not isinstance(tanh, Record) or tanh.event is None:
            continue
        x = tanh.given[0] if tanh.event.source.name == "tanh" and tanh.given else None
        if x is not None and x.label == "/" and x.operands[1] == cap:
            tanh.event.role, tanh.event.is_cap = "bounding", True
