"""distill of outputs of every kind: all of them are taught, and what gets worse is said."""

import copy

import pytest
import torch
from torch import nn

from transfer_surgery import DistillWarning, convert, distill, match_targets, swap_targets
from transfer_surgery.matching import DistillReport


class Detector(nn.Module):
    """Boxes first, then probabilities, as detectors return them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.box, self.face = nn.Linear(32, 4), nn.Linear(32, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.body(x)
        return 0.01 * self.box(x) - 100, (10 * self.face(x)).softmax(1)


class Potential(nn.Module):
    """Energies in a large unit, and forces by a gradient inside of the forward.

    Their graph is kept in training mode alone, as in many potentials.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.detach().requires_grad_(True)
        energy = 1000 * self.net(x).sum(1) - 5000
        return {
            "energy": energy,
            "forces": -torch.autograd.grad(energy.sum(), x, create_graph=self.training)[0],
        }


class RareEvents(nn.Module):
    """One of a hundred inputs is an event."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(40 * self.net(x) - self.threshold)


def taught(
    make: type[nn.Module], lr: float
) -> tuple[nn.Module, nn.Module, nn.Module, DistillReport]:
    """A swapped copy of a teacher, before and after; it is matched where events are rare."""
    torch.manual_seed(0)
    teacher, x = make().eval(), torch.randn(1024, 4)
    if make is RareEvents:
        teacher.threshold = (40 * teacher.net(x)).detach().quantile(0.99)
    model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x[:2]))
    if make is RareEvents:
        match_targets(model, [x], refit=True)
    before = copy.deepcopy(model)
    report = distill(model, teacher, list(x.split(64)), steps=200, lr=lr)
    return before, model, teacher, report


def test_outputs_of_any_kind_are_taught_all_of_them():
    for make, names in ((Detector, ["0", "1"]), (Potential, ["energy", "forces"])):
        _, _, teacher, report = taught(make, lr=0.02)
        assert list(report.before) == names
        for name in names:
            assert report.after[name] < 0.3 * report.before[name], (make, report)
        assert all(p.grad is None for p in teacher.parameters())


def test_the_users_gradients_stay_and_are_recorded_whatever_the_mode_around():
    teacher, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
    model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x))
    model(x).sum().backward()
    before, weight = model[0].weight.grad.clone(), model[0].weight.detach().clone()
    with torch.no_grad():
        distill(model, teacher, [x], steps=20)
    assert torch.equal(model[0].weight.grad, before)
    assert not torch.equal(model[0].weight, weight)


def test_rare_events_are_still_found():
    before, model, teacher, _ = taught(RareEvents, lr=1e-3)
    x = torch.randn(4000, 4)
    with torch.no_grad():
        first, found, events = (network(x) > 0.5 for network in (before, model, teacher))
    assert 10 < events.sum() < 120
    assert found[events].double().mean() >= first[events].double().mean() > 0.6
    assert events[found].double().mean() > 0.8


def test_an_output_that_gets_worse_is_named():
    model, teacher = Detector().eval(), Detector().eval()
    model = swap_targets(convert(model, "sin", example_input=torch.zeros(2, 4)))
    model.load_state_dict(teacher.state_dict(), strict=False)
    batches = list(torch.randn(1024, 4).split(64))

    def boxes(now: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (now[0] - wanted[0]).square().mean() - now[1].square().mean()

    with pytest.warns(DistillWarning, match=r"made some outputs worse .*: 1 \("):
        distill(model, teacher, batches, steps=50, lr=0.02, loss=boxes, features=(), variation=0.0)


class Found(nn.Module):
    """Scores above a threshold: how many there are depends on the network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [scores[scores > 0] for scores in self.net(x)]


def test_outputs_that_are_not_of_one_size_are_taught_by_a_function_of_the_user():
    torch.manual_seed(0)
    teacher, x = Found().eval(), torch.randn(256, 4)
    model = swap_targets(convert(copy.deepcopy(teacher), "relu", example_input=x[:2]))
    batches = list(x.split(16))
    with pytest.raises(TypeError, match="let the model return what they are chosen from"):
        distill(model, teacher, batches, steps=1)

    def sums(now: list[torch.Tensor], wanted: list[torch.Tensor]) -> torch.Tensor:
        pairs = zip(now, wanted, strict=True)
        return torch.stack([(a.sum() - b.sum()).square() for a, b in pairs]).mean()

    report = distill(model, teacher, batches, steps=100, loss=sums, lr=0.01, variation=0)
    assert sum(report[-10:]) < 0.5 * sum(report[:10])
    assert str(report).startswith("100 steps")


@pytest.mark.parametrize(
    "returned", [None, 0.5, torch.zeros(2), torch.tensor(1), torch.tensor(0.1)]
)
def test_a_function_that_returns_no_number_with_a_gradient_is_refused(returned):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(16, 4)
    teacher = copy.deepcopy(model)
    convert(model, "sin", example_input=x, roles=("hidden", "output"))
    with pytest.raises(TypeError, match=r"loss= returns .*(a tensor with one|by operations)"):
        distill(swap_targets(model), teacher, [x], steps=1, loss=lambda now, wanted: returned)


def test_losses_that_do_not_suit_the_outputs_are_refused():
    torch.manual_seed(0)
    x = list(torch.randn(64, 4).split(8))
    sigmoid = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Sigmoid()).eval()
    for teacher, loss, message in (
        (sigmoid, "kl", "between 0 and 1, as probabilities are"),
        (sigmoid[:3], "bce", "below 0 or above 1"),
        (Detector().eval(), "kl", "needs one output, but the teacher has 0, 1"),
        (sigmoid, "hinge", "'hinge': use relative, mse, kl, bce"),
    ):
        model = swap_targets(convert(copy.deepcopy(teacher), "sin", example_input=x[0]))
        with pytest.raises(ValueError, match=message):
            distill(model, teacher, x, steps=1, loss=loss)
