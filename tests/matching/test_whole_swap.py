"""swap_activations: one call from a trained network to plain modules, and a report that is true."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import (
    DistillWarning,
    ModelSpec,
    convert,
    find_activations,
    load_baked,
    match_targets,
    report,
    save_baked,
    swap_activations,
    swap_targets,
)
from transfer_surgery.units import FittedActivation


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*layers, nn.GELU(), nn.Flatten(), nn.Linear(32, 4)).eval()


def batches(seed: int, number: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(16, 3, 8, 8, generator=generator) for _ in range(number)]


def test_inputs_and_outputs_may_be_trees_of_tensors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 16), nn.Linear(16, 2)

        def forward(self, *, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            h = nn.functional.silu(self.body(x))
            return {"boxes": self.head(h) * scale, "energy": h.sum(1)}

    inputs = [{"x": torch.randn(64, 4), "scale": torch.rand(64, 1)} for _ in range(4)]
    found = swap_activations(Two(), "relu", inputs)
    assert [set(row.errors) for row in found] == [{"boxes", "energy"}] * 4
    assert found.examples == 64
    assert found.rows[0].errors == {"boxes": 0.0, "energy": 0.0}
    assert found.rows[0].changed is None


def test_held_out_batches_are_compared_and_not_fitted() -> None:
    given, other = batches(0), [100 * x for x in batches(1, 2)]
    first, second = network(), network()
    found = swap_activations(first, "relu", given + other, granularity="layer", logits=True)
    # Of ten batches the last two are held out, as here.
    expected = swap_activations(
        second, "relu", iter(given), held_out=iter(other), granularity="layer", logits=True
    )
    assert [row.errors for row in found] == [row.errors for row in expected]
    assert_same_bits(first, second)
    with torch.no_grad():
        wanted, now = (torch.cat([net(x) for x in other]) for net in (network(), first))
    error = (now - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum()
    assert found.rows[-1].errors["output"] == pytest.approx(error.item(), rel=1e-3)
    changed = (now.argmax(1) != wanted.argmax(1)).double().mean().item()
    assert found.rows[-1].changed == changed


def test_with_gates_kept_the_model_can_be_saved_and_is_what_the_last_row_says(
    tmp_path: Path,
) -> None:
    spec = ModelSpec("timm:test_efficientnet", {"num_classes": 4}, (3, 32, 32))
    torch.manual_seed(0)
    model = spec.build().eval()
    inputs = [torch.randn(8, 3, 32, 32) for _ in range(4)]
    found = swap_activations(
        model, "relu", inputs, keep_gates=True, granularity="layer", offset=True
    )
    save_baked(model, tmp_path / "baked", spec, fold=inputs[0])
    loaded = load_baked(tmp_path / "baked").eval()
    # Sites that keep numbers are named: those, and no others, are modules of this library.
    foreign = {
        path
        for path, module in loaded.named_modules()
        if type(module).__module__.startswith("transfer_surgery.")
    }
    assert {path for path in foreign if path.rpartition(".")[0] not in foreign} == {*found.numbers}
    assert found.rows[-1].fitted == len(found.numbers) > 0
    assert all(": " in why for why in found.numbers.values())


def test_the_sites_that_cost_most_keep_their_source() -> None:
    given, other = batches(0), batches(1, 2)
    model = convert(network(), "relu", example_input=given[0])
    match_targets(model, given)
    with torch.no_grad():
        wanted = torch.cat([network()(x) for x in given[:2]])
        costs = {}
        for path in ("1", "3", "5"):
            alone = swap_targets(copy.deepcopy(model), include=path).eval()
            costs[path] = (torch.cat([alone(x) for x in given[:2]]) - wanted).square().sum().item()
    dearest = max(costs, key=lambda path: costs[path])

    swapped = network()
    found = swap_activations(swapped, "relu", given, held_out=other, keep_sites=1, offset=True)
    assert found.kept == (dearest,)
    for path in costs:
        before, now = (type(net.get_submodule(path)) for net in (network(), swapped))
        assert now is before if path == dearest else now in (nn.ReLU, FittedActivation)
    everything = swap_activations(network(), "relu", given, held_out=other, offset=True)
    assert found.rows[-1].errors["output"] < everything.rows[-1].errors["output"]


def test_a_site_that_stays_is_not_warned_of() -> None:  # a warning is an error here
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.ELU(), nn.Linear(16, 3)
    found = swap_activations(
        nn.Sequential(*layers), "relu", torch.randn(256, 4).split(64), keep_sites=1
    )
    assert found.kept == ("3",)


def test_as_few_sites_keep_their_source_as_the_accuracy_needs() -> None:
    given, other = batches(0, 2), batches(1)
    answers = [network()(x).argmax(1) for x in other]
    options: Any = {"held_out": other, "labels": answers, "granularity": "layer"}
    by_hand = [swap_activations(network(), "relu", given, keep_sites=n, **options) for n in (0, 1)]
    lost = [100 * (1 - found.rows[2].accuracy) for found in by_hand]
    assert lost[0] > lost[1] > 0
    found = swap_activations(network(), "relu", given, keep_points=lost[1], **options)
    assert found.kept == by_hand[1].kept
    assert found.rows[-1].accuracy == by_hand[1].rows[-1].accuracy
    model = network()
    with pytest.raises(ValueError, match="keep_points=0: more is lost"):
        swap_activations(model, "relu", given, keep_points=0, refit=False, **options)
    assert_same_bits(model, network())


def test_a_share_of_the_neurons_keeps_its_source() -> None:
    model = network()
    found = swap_activations(model, "relu", batches(0), keep=0.3, keep_gates=True, offset=True)
    total = report(model).total
    assert 0 < total.source_neurons <= 0.3 * total.neurons
    assert found.mixed != ()


@pytest.mark.filterwarnings("ignore::transfer_surgery.MatchWarning")  # poor fits are taught better
def test_the_original_network_teaches_on_inputs_of_their_own() -> None:
    gone_through: list[int] = []

    class Stream:
        def __iter__(self) -> Iterator[Tensor]:
            for x in batches(2):
                gone_through.append(len(x))
                yield x

    teaching: dict[str, Any] = {"distill_steps": 150, "distill_on": Stream(), "lr": 3e-3}
    found = swap_activations(network(), "relu", batches(0), refit=False, **teaching)
    assert [row.stage for row in found][-2:] == ["distilled", "baked, folded"]
    errors = [row.errors["output"] for row in found]
    assert errors[3] < 0.9 * errors[2]
    assert errors[4] == pytest.approx(errors[3], rel=1e-3)
    assert len(gone_through) >= 150


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")  # of one step
def test_a_network_with_computed_weights_is_swapped_after_its_training() -> None:
    """Its weights are attributes with a graph, which torch cannot copy."""
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(batches(0)[0]).sum().backward()
    swap_activations(model, "relu", batches(0), distill_steps=1)
    assert (model[0].weight == 0).double().mean() >= 0.5


def test_only_the_sites_of_the_plan_are_swapped() -> None:
    given, model = batches(0), network()
    plan = find_activations(model, given[0]).select(source="silu")
    swap_activations(model, "relu", given, plan=plan)
    assert [type(m).__name__ for m in model][1:6:2] == ["ReLU", "ReLU", "GELU"]


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **kwargs or {})


def test_one_in_place_object_shared_by_all_layers_is_swapped_at_each() -> None:
    class Block(nn.Module):
        default_act = nn.SiLU(inplace=True)

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 3), self.default_act

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(y) + y  # what was written into

    model = nn.Sequential(Block(), Block())
    found = swap_activations(model, "relu", batches(0))
    called = _Called()
    with called, torch.no_grad():
        model(batches(0)[0])
    assert "silu" not in called.names
    assert called.names.count("relu") == 2
    assert len(found) == 4


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distill_steps": 3, "loss": "bce"}, "loss='bce' takes probabilities"),
        ({"labels": [torch.zeros(16, dtype=torch.int64)]}, "batches of labels have 16 classes"),
        ({"held_out": []}, "held_out: there are no batches"),
        ({"keep_sites": 3}, "keep_sites=3: there are 3 sites to swap"),
        ({"keep_sites": -1}, "keep_sites=-1: there are 3 sites to swap"),
        ({"keep": 0.5, "keep_sites": 1}, "give one of keep=, keep_sites= and keep_points="),
        ({"keep_points": 1.0}, "keep_points= needs labels="),
        ({"keep_points": float("nan")}, "keep_points=nan: give a number that is not below 0"),
        ({"distill_steps": -1}, "distill_steps=-1"),
        ({"distill_steps": 3, "variation": 2.0}, "variation=2.0: use a number from 0 to 1"),
        ({"distill_steps": 3, "lr": 0.0}, "lr=0.0: use positive ones"),
        ({"distill_steps": 3, "distill_on": []}, "distill_on: there are no batches"),
        ({"distill_steps": 3, "distill_on": [torch.ones(2, 4)]}, "the first batch of distill_on"),
        ({"keep": 2.0}, "keep=2.0: give a number of the"),
        ({"keep": float("nan")}, "keep=nan: give a number of the"),
        ({"keep": 1.0}, r"keep=1\.0 keeps every neuron"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(arguments: dict[str, Any], message: str) -> None:
    model, told = network(), []
    modules, weight = [*model], model[0].weight
    with pytest.raises(ValueError, match=message):
        swap_activations(model, "relu", batches(0), progress=told.append, **arguments)
    assert not told  # nothing was fitted
    assert [*model] == modules
    assert model[0].weight is weight
    assert_same_bits(model, network())


def test_one_batch_cannot_be_both_fitted_and_held_out() -> None:
    with pytest.raises(ValueError, match="there is 1 batch, of which none can be held out"):
        swap_activations(network(), "relu", batches(0, 1))
    with pytest.raises(ValueError, match="every activation selected is relu already"):
        swap_activations(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "relu", [torch.ones(2, 4)] * 2)


def test_a_teaching_that_does_no_good_says_so() -> None:
    with pytest.warns(DistillWarning, match="did not bring the outputs nearer") as told:
        found = swap_activations(network(), "relu", batches(0), distill_steps=1, lr=1e-12)
    assert found.rows[3].errors == found.rows[2].errors
    assert told[0].filename == __file__  # the line of the caller


@pytest.mark.parametrize("far", [1.0, 1e12])
def test_the_report_says_where_outputs_overflow(far: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(128, 4)
    found = swap_activations(model, "polynomial(degree=3)", [x], held_out=[far * x])
    assert ("Outputs are not finite" in str(found)) == (far > 1)


def test_a_loader_that_shuffles_is_gone_through_once() -> None:
    x = torch.cat(batches(1, 4))
    loader = torch.utils.data.DataLoader(x, batch_size=16, shuffle=True)
    found = swap_activations(network(), "relu", batches(0), held_out=loader)
    assert found.rows[0].errors == {"output": 0.0}


@pytest.mark.parametrize("shape", ["pixels", "yes or no"])
def test_labels_are_one_class_for_each_answer(shape: str) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 5 if shape == "pixels" else 1, 1)
    model = nn.Sequential(*layers, *([] if shape == "pixels" else [nn.AvgPool2d(8), nn.Flatten()]))
    held = batches(1, 2)
    outputs = [model.eval()(x).detach() for x in held]
    own = [y.argmax(1) if shape == "pixels" else (y[:, 0] > 0).long() for y in outputs]
    found = swap_activations(model, "relu", batches(0), held_out=held, labels=own)
    assert found.rows[0].accuracy == 1.0
    assert all(0 <= row.accuracy <= 1 for row in found)


def test_labels_and_outputs_that_cannot_be_compared_are_refused() -> None:
    held = batches(1, 2)
    for labels, text in (
        ([torch.full((16,), 100)] * 2, "from 0 to 3"),
        ([torch.zeros(16, 4)] * 2, "one class for each answer"),
        ([[0] * 16] * 2, "one tensor of class numbers"),
    ):
        with pytest.raises(ValueError, match=text):
            swap_activations(network(), "relu", batches(0), held_out=held, labels=labels)
    with pytest.raises(ValueError, match="NaN"):
        swap_activations(network(), "relu", batches(0), held_out=[x * float("nan") for x in held])
    broken = network()
    broken[7].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        swap_activations(broken, "relu", batches(0), held_out=held)
