"""Whether an ONNX graph is a polynomial of its inputs, as encrypted computing needs it."""

from __future__ import annotations

from typing import Any

from transfer_surgery._messages import listed

_LINEAR = {
    *("Add", "AveragePool", "Col2Im", "Concat", "CumSum", "DepthToSpace", "Expand", "Flatten"),
    *("Gather", "GatherElements", "GatherND", "GlobalAveragePool", "Identity", "Mean", "Neg"),
    *("Pad", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice", "SpaceToDepth", "Split"),
    *("Squeeze", "Sub", "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze"),
}
_PRODUCTS = {"Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul", "Mul", "ReduceProd"}
_SCATTERS = {"ScatterElements", "ScatterND"}
_SHAPES = {"Shape", "Size"}
_BY_FIRST = _LINEAR - {"Add", "Concat", "Mean", "Sub", "Sum"} | {
    *("BatchNormalization", "Div", "Pow", "ReduceProd")
}
"""These are polynomials of their first input alone, where the others are constant."""


def check_polynomial(graph: Any) -> None:
    """Raise where a node is no polynomial of the graph's inputs.

    Args:
        graph: the graph of an ``onnx_ir`` model.

    Raises:
        ValueError: it names the nodes, each with its operator.
    """
    constant: set[Any] = set(graph.initializers.values())
    others = []
    for node in graph:
        given = [value for value in node.inputs if value is not None]
        if any(one.type.name.startswith("GRAPH") for one in node.attributes.values()):
            others.append(_named(node))  # an If, say, whose branches read the input by themselves
        elif node.op_type in _SHAPES or all(value in constant for value in given):
            constant.update(node.outputs)
        elif not _is_polynomial(node, constant):
            others.append(_named(node))
    if others:
        raise ValueError(
            f"{len(others)} nodes are no polynomials of the network's input: {listed(others)}. "
            "Convert the activations there to polynomials, and replace maxima, norms and softmax "
            "in the model, or leave out polynomial=True."
        )


def _named(node: Any) -> str:
    return f"{node.name or 'a node'} ({node.op_type})"


def _is_polynomial(node: Any, constant: set[Any]) -> bool:
    rest = [value for value in node.inputs[1:] if value is not None]
    if node.domain not in ("", "ai.onnx"):  # of other domains a name may mean anything
        return False
    if node.op_type in _BY_FIRST and not all(value in constant for value in rest):
        return False
    if node.op_type in _SCATTERS:  # what stands where is fixed; a maximum of both is none
        return node.inputs[1] in constant and _attribute(node, "reduction") not in ("max", "min")
    if node.op_type == "Where":
        return node.inputs[0] in constant
    if node.op_type == "Pow":
        exponent = rest[0].const_value
        values = [] if exponent is None else exponent.numpy().flatten().tolist()
        return bool(values) and all(e >= 0 and float(e).is_integer() for e in values)
    if node.op_type in ("Cast", "Div"):  # whole numbers are rounded
        kind = node.outputs[0].dtype
        return kind is not None and bool(kind.is_floating_point())
    if node.op_type == "BatchNormalization":
        return not _attribute(node, "training_mode")
    return node.op_type in _LINEAR | _PRODUCTS


def _attribute(node: Any, name: str) -> Any:
    return node.attributes[name].value if name in node.attributes else None
