"""swap_targets(keep=...): which gates keep their source within a budget of neurons."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transfer_surgery import MatchWarning, bake, convert, match_targets, report, swap_targets
from transfer_surgery.matching.swapping import relu_budget
from transfer_surgery.matching.swapping.relu_budget import choose_kept
from transfer_surgery.units import gated_activations

X = torch.randn(400, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def network(granularity: str = "channel", target: str = "square", **options) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.GELU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(24, 5))
    return convert(model, target, granularity=granularity, example_input=X[:2], **options)


def gates(model: nn.Module) -> torch.Tensor:
    return torch.cat([u.gate.predict().detach().flatten() for _, u in gated_activations(model)])


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("keep", [0.0, 0.05, 0.4, 90, 1.0])
def test_the_budget_is_kept_and_nearly_used(granularity, keep):
    model = network(granularity)
    neurons = report(model).total.neurons
    assert neurons == 8 * 16 + 6 * 4
    if granularity == "layer" and keep == 0.05:  # no site is that small
        with pytest.warns(MatchWarning, match=r"keeps nothing: the smallest gate has 24 neurons"):
            swap_targets(model, keep=keep, batches=[X])
        assert report(model).total.source_neurons == 0
        return
    swap_targets(model, keep=keep, batches=X.split(150))
    budget = keep if isinstance(keep, int) else int(keep * neurons)
    total = report(model).total
    largest = {"layer": 128, "channel": 16, "neuron": 1}[granularity]
    assert budget - largest < total.source_neurons <= budget
    assert total.mixed == 0
    assert set(gates(model).tolist()) <= {0.0, 1.0}


def test_neurons_are_those_of_the_batches_where_convert_had_no_example():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    convert(model, "square")
    neurons = 8 * 10**2 + 8 * 8**2
    assert report(model).total.neurons > 100 * neurons  # of a guessed photograph
    swap_targets(model, keep=np.int64(800), batches=torch.randn(16, 3, 12, 12).split(8))
    assert report(model).total.neurons == neurons
    assert 700 < report(model).total.source_neurons <= 800


class Flattened(nn.Module):
    """A site that gets the tokens of all examples along its first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()

    def forward(self, x):
        y = torch.relu(self.first(x.reshape(-1, 4))).reshape(len(x), -1, 5)
        return self.act(self.second(y))


def test_neurons_are_counted_for_each_example_of_the_batch():
    torch.manual_seed(0)
    x = torch.randn(8, 7, 4)
    model = convert(Flattened(), "square", example_input=x)
    swap_targets(model, keep=30, batches=[x])
    assert report(model).total.neurons == 7 * 5 + 7 * 3
    assert 0 < report(model).total.source_neurons <= 30


def test_gates_of_another_size_are_explained():
    model = network("neuron")
    with pytest.raises(ValueError, match="convert with an example_input of this size"):
        swap_targets(model, keep=5, batches=[torch.randn(8, 2, 9, 9)])


def test_those_are_kept_whose_swap_costs_most_per_neuron():
    """Beside the loss that each gate adds when it is swapped alone, by brute force."""
    model = network(target="relu(variant='clamp(x, min=0)')")
    units = [unit for _, unit in gated_activations(model)]
    for i, unit in enumerate(units):  # a*relu(x): small errors, which differ from gate to gate
        numbers = unit.add_fitted_target()
        numbers.a.data = 1 + 0.002 * (1 + torch.randperm(unit.gate.count)) * (1 + i)
    model.eval()
    with torch.no_grad():
        wanted = F.log_softmax(model(X), 1)
    costs = []
    for unit in units:
        for gate in range(unit.gate.count):
            other = copy.deepcopy(model)
            twin = dict(other.named_modules())[
                next(n for n, m in model.named_modules() if m is unit)
            ]
            twin.log_alpha.data[gate] = -20
            with torch.no_grad():
                found = F.log_softmax(other(X), 1)
            loss = F.kl_div(found, wanted, log_target=True, reduction="batchmean")
            costs.append(loss.item() / (unit.neurons / unit.gate.count))
    order = torch.tensor(costs).argsort(descending=True).tolist()
    swap_targets(
        model, keep=80, batches=[X] * 8, logits=True
    )  # several draws of labels for each input
    kept = {i for i, z in enumerate(gates(model).tolist()) if z == 1}
    best = set(order[: len(kept)])
    assert len(kept & best) >= len(kept) - 1
    assert order[0] in kept
    assert order[-1] not in kept


def test_gates_of_few_neurons_come_before_one_of_many_that_costs_more_in_all(monkeypatch):
    model = network()
    units = dict(gated_activations(model))  # gates of 16 and of 4 neurons
    costs = [torch.full((8,), 3.0), torch.full((6,), 1.0)]
    of_units = dict(zip(units.values(), costs, strict=True))
    monkeypatch.setattr(
        relu_budget, "_costs", lambda *_: (of_units, {u: u.neurons for u in of_units})
    )
    first, second = choose_kept(model, units, [X], 24, True).values()
    assert not first.any()
    assert second.all()


def test_matching_again_leaves_kept_gates_and_fits_what_follows_to_them():
    model, original = network(), network()
    match_targets(model, [X])
    swap_targets(model, keep=0.5, batches=[X])
    before = gates(model)
    first = copy.deepcopy(model)
    match_targets(model, [X], refit=True)
    assert torch.equal(gates(model), before)
    errors = []
    for network_ in (first, model):
        with torch.no_grad():
            errors.append((network_.eval()(X) - original.eval()(X)).square().mean().item())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("refit", [False, True])
def test_a_site_that_is_kept_as_a_whole_stays(refit):
    model = network("layer")
    match_targets(model, [X])
    swap_targets(model, keep=100, batches=[X])  # one of the two sites
    before = gates(model)
    assert sorted(before.tolist()) == [0.0, 1.0]
    found = match_targets(model, [X], refit=refit)
    assert torch.equal(gates(model), before)
    assert len(found) == 1


def test_a_partly_swapped_network_is_baked_to_the_same_outputs():
    model = network()
    match_targets(model, [X])
    swap_targets(model, keep=0.3, batches=[X])
    expected = model.eval()(X)
    torch.testing.assert_close(bake(model)(X), expected)


def test_wrong_budgets_are_refused_and_change_nothing():
    model = network()
    before = gates(model)
    for keep, batches, message in (
        (1000, [X], "152 neurons"),
        (1.5, [X], "share"),
        (-1, [X], "keep=-1"),
        (1e-9, [X], "keep=1e-09"),
        (0.5, None, "together"),
        (None, [X], "together"),
        (0.5, [], "there are none"),
    ):
        with pytest.raises(ValueError, match=message):
            swap_targets(model, keep=keep, batches=batches)
    assert torch.equal(gates(model), before)
    model = convert(nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU()), "square")
    neurons = report(model).total.neurons  # of a guessed photograph
    with pytest.raises(ValueError, match="128 neurons"):
        swap_targets(model, keep=129, batches=[X])
    assert report(model).total.neurons == neurons > 128
    with pytest.raises(ValueError, match="hard_concrete"):
        swap_targets(network(gate="line"), keep=0.5, batches=[X])


def test_units_that_do_not_run_cost_nothing():
    model = network()
    model.add_module("idle", copy.deepcopy(model[1]))
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)
    units = dict(gated_activations(model))
    masks = choose_kept(model, units, [X], 0.5, True)
    assert masks[units["1"]].any()
    assert not masks[units["idle"]].any()


def test_all_sites_are_weighed_in_one_run_per_batch():
    model, runs = network(), []
    model[-1].register_forward_hook(lambda *_: runs.append(1))
    units = dict(gated_activations(model))
    choose_kept(model, units, X.split(200), 0.5, True)
    assert len(runs) == 2
