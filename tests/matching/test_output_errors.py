"""Errors of outputs of any kind."""

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from transfer_surgery.matching.output_errors import OutputErrors, output_tensors


@dataclass
class Found:
    boxes: list[torch.Tensor]
    label: str


def errors(*batches: tuple[object, object]) -> dict[str, float]:
    found = OutputErrors()
    for now, wanted in batches:
        found.add(now, wanted)
    return found.relative()


def test_tensors_are_found_in_outputs_of_every_kind():
    x, pair = torch.zeros(2, 3), namedtuple("Pair", "energy forces")
    assert list(output_tensors(x)) == ["output"]
    assert list(output_tensors((x, x.long(), [x]))) == ["0", "2.0"]
    assert list(output_tensors({"logits": x, "more": pair(x, x)})) == [
        "logits", "more.energy", "more.forces",
    ]  # fmt: skip
    found = Found([x, x], "text")
    found.itself = found  # an object that refers to itself
    assert list(output_tensors(found)) == ["boxes.0", "boxes.1"]
    assert output_tensors(x.to(torch.complex64))["output"].shape == (2, 3, 2)
    assert torch.equal(output_tensors(x.to_sparse())["output"], x)
    for empty in (x.long(), [], None, "text", nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="without a floating tensor"):
            output_tensors(empty)


def test_the_error_is_that_of_the_definition_in_any_batches():
    torch.manual_seed(0)
    wanted = torch.randn(30, 4) * torch.tensor([1.0, 2, 3, 4]) + 5
    now = wanted + 0.1 * torch.randn(30, 4)
    deviation = (wanted - wanted.mean(0)).square().sum()
    expected = float((now - wanted).square().sum() / deviation)
    assert errors((now, wanted))["output"] == pytest.approx(expected)
    parts = zip(now.split(7), wanted.split(7), strict=True)
    assert errors(*parts)["output"] == pytest.approx(expected)


@pytest.mark.parametrize(("scale", "shift"), [(1e4, 0.0), (1.0, -3e3), (1e-3, 1.0)])
def test_the_error_depends_neither_on_the_unit_nor_on_the_zero_point(scale, shift):
    wanted = torch.randn(50, 1, dtype=torch.float64)
    now = wanted + 0.1 * torch.randn(50, 1, dtype=torch.float64)
    expected = errors((now, wanted))["output"]
    found = errors((now * scale + shift, wanted * scale + shift))["output"]
    assert found == pytest.approx(expected, rel=1e-6)


def test_batches_of_other_sizes_share_one_mean():
    """Graphs, texts: the elements agree in nothing but their kind."""
    wanted = [torch.randn(2, n, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 4)]
    every = torch.cat([x.flatten() for x in wanted])
    expected = sum((0.5 * x).square().sum() for x in wanted) / (every - every.mean()).square().sum()
    assert errors(*((0.5 * x, x) for x in wanted))["output"] == pytest.approx(float(expected))


def test_single_numbers_and_single_examples_have_a_scale():
    energies = [torch.tensor(float(e)) for e in (1, 2, 3)]
    found = errors(*((e + 1, e) for e in energies))
    assert found["output"] == pytest.approx(3 / 2)
    x = torch.tensor([[1.0, 3.0]])
    assert errors((x + 1, x))["output"] == pytest.approx(1.0)


def test_constants_and_masked_elements():
    zeros = torch.zeros(4, 2)
    assert errors((zeros, zeros))["output"] == 0
    assert errors((zeros + 1, zeros))["output"] == math.inf
    wanted = torch.tensor([[1.0, -math.inf], [3.0, -math.inf]])
    assert errors((wanted + 1, wanted))["output"] == pytest.approx(1.0)
    assert math.isnan(errors((wanted * math.nan, wanted))["output"])


def test_outputs_that_differ_in_structure_or_shape_are_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"one has \['0', '1'\], the other \['output'\]"):
        errors(((x, x), x))
    with pytest.raises(TypeError, match=r"'boxes' cannot be compared: their shapes are \(2, 3\)"):
        errors(({"boxes": x}, {"boxes": x[:1]}))


def test_constant_values_do_not_hide_a_difference():
    """300 eV everywhere: rounding is no variation."""
    wanted = torch.full((100, 3), 300.1)
    assert errors((wanted + 30, wanted))["output"] == pytest.approx(0.01, rel=0.01)
