"""All sites and layers are fitted in one pass: the same numbers, few forward passes, no traces."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.same_bits import assert_same_bits
from transfer_surgery import convert, match_targets, sensitivity, swap_targets
from transfer_surgery.matching import samples
from transfer_surgery.matching.fitting.target_families import FREQUENCIES
from transfer_surgery.matching.one_pass import RIDGE
from transfer_surgery.matching.refit.layer_refit import RIDGES


def network(depth: int = 3, width: int = 6) -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 3))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
    return model, torch.randn(600, width)


def best_sinusoid(x, y):
    """The least squares of one channel in float64, by rows: ``f(x)``."""
    mean, std = x.mean(), x.std(correction=0)
    u, found = (x - mean) / std, []
    for w in FREQUENCIES:
        rows = torch.stack([torch.sin(w * u), torch.cos(w * u), torch.ones_like(u)], 1)
        pull = RIDGE * rows.square().sum(0) + 1e-9 * len(u)
        pull[-1] = 0
        s = torch.linalg.solve(rows.T @ rows + pull.diag(), rows.T @ y)
        found.append((((rows @ s - y) ** 2).sum().item(), rows @ s))
    return min(found, key=lambda pair: pair[0])[1]


def refitted(layer, x, y, batch):
    """Weights and bias of a linear layer for other inputs, by rows in float64."""
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    before = torch.cat([layer.weight.T, layer.bias[None]]).double().detach()

    def fit(rows, y, ridge):
        pull = ridge * rows[:, :-1].square().sum(0).mean().expand(rows.shape[1]).clone()
        pull[-1] = 0
        return torch.linalg.solve(rows.T @ rows + pull.diag(), rows.T @ y + pull[:, None] * before)

    held = torch.arange(len(x)) % batch >= batch - batch // 4
    errors = {
        (rows[held] @ fit(rows[~held], y[~held], ridge) - y[held]).square().sum().item(): ridge
        for ridge in RIDGES
    }
    return fit(rows, y, errors[min(errors)])


@pytest.mark.parametrize("refit", [False, True])
def test_the_numbers_are_those_of_a_fit_site_by_site(refit):
    model, x = network()
    original = copy.deepcopy(model).double()
    found = copy.deepcopy(model)
    match_targets(convert(found, example_input=x), x.split(200), refit=refit)

    here = wanted = x.double()
    for number, layer in enumerate(original):
        wanted = layer(wanted).detach()
        if isinstance(layer, nn.ReLU):
            pairs = zip(here.T, wanted.T, strict=True)
            here = torch.stack([best_sinusoid(a, b) for a, b in pairs], 1)
        elif refit and number > 0:
            s = refitted(layer, here, wanted, 200)
            here = here @ s[:-1] + s[-1]
            torch.testing.assert_close(found[number].weight, s[:-1].T.float(), rtol=1e-3, atol=1e-3)
        else:
            here = layer(here).detach()
    with torch.no_grad():
        outputs = swap_targets(found)(x)
    torch.testing.assert_close(outputs, here.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("max_bytes", [None, 0])
def test_each_network_runs_once_on_each_batch_if_the_memory_suffices(max_bytes):
    model, x = network(depth=6)
    convert(model, example_input=x)
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    report = match_targets(model, x.split(100), max_bytes=max_bytes)
    probe, fewer_examples, checks, modules = 1, 1, 6, 6
    passes = 2 * 6 * (1 if max_bytes is None else modules)
    assert len(runs) == probe + fewer_examples + checks + passes
    assert ("6 batches were run once more" in str(report)) == (max_bytes == 0)


def test_less_memory_gives_the_same_numbers():
    found = []
    for max_bytes in (None, 0):
        model, x = network()
        match_targets(
            convert(model, example_input=x), x.split(200), refit=True, max_bytes=max_bytes
        )
        found.append(copy.deepcopy(model))
    assert_same_bits(*found)
    with pytest.raises(ValueError, match="max_bytes=-1: give a number of bytes"):
        match_targets(model, [x], max_bytes=-1)


def test_a_sample_gives_nearly_the_numbers_of_all_values(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    x, outputs = torch.randn(256, 2, 12, 12), []
    for count in (10**9, 4000):
        monkeypatch.setattr(samples, "VALUES", count)
        model = convert(copy.deepcopy(net), example_input=x[:2])
        report = match_targets(model, x.split(64))
        outputs.append(swap_targets(model)(x).detach())
        assert report.rows[0].values == min(count, 256 * 100)
    wanted = net(x).detach()
    error = [(y - wanted).square().mean() for y in outputs]
    assert (outputs[0] - outputs[1]).abs().max() > 0
    assert error[1] < 1.02 * error[0]


class Loop(nn.Module):
    """A block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = nn.Linear(4, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 8))
        self.middle, self.last = nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in range(3):
            x = self.block(x)
            if step == 1:
                x = self.middle(x)
        return self.last(x)


def test_a_site_that_is_called_several_times_is_fitted_to_all_its_calls():
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(400, 4)
    seen = []
    handle = model.block[0].register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    model(x)
    handle.remove()
    report = match_targets(convert(model, "square", example_input=x), x.split(150))
    assert [(row.path, row.values) for row in report] == [("block.0", 1200), ("middle", 400)]

    # While it is fitted, all its calls run at the source: the inputs are the original ones.
    x, y = (torch.cat([pair[side].double().detach() for pair in seen]) for side in range(2))
    fitted = model.block[0].fitted
    for channel in range(8):
        a, b = x[:, channel], y[:, channel]
        rows = torch.stack([a * a, a, torch.ones_like(a)], 1)
        best = rows @ torch.linalg.lstsq(rows, b[:, None]).solution[:, 0]
        numbers = (getattr(fitted, name)[channel].double().detach() for name in "awcb")
        amplitude, w, c, offset = numbers
        found = amplitude * (w * a + c) ** 2 + offset
        torch.testing.assert_close(found, best, rtol=0.02, atol=0.02 * b.std().item())


def test_what_runs_between_the_calls_of_a_site_is_fitted_to_the_original_network():
    torch.manual_seed(0)
    model, x = Loop(), torch.randn(400, 4)
    report = match_targets(convert(model, "square", example_input=x), x.split(150), refit=True)
    assert report.refitted == ("block.1", "last")
    assert not report.left


def test_a_short_batch_counts_for_its_own_examples(monkeypatch):
    monkeypatch.setattr(samples, "VALUES", 2000)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).eval()
    x, errors = torch.randn(128, 2, 12, 12), []
    x[120:] *= 4
    for sizes in ([128], [120, 8]):
        model = convert(copy.deepcopy(net), example_input=x[:2])
        match_targets(model, x.split(sizes))
        errors.append((swap_targets(model)(x[:120]) - net(x[:120])).square().mean())
    assert errors[1] < 1.1 * errors[0]


class Remembers(nn.Module):
    """Keeps features on itself, counts its calls, draws noise and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.kept, self.calls = [], 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.count += 1
        self.kept.clear()
        self.kept.append(F.relu(self.first(x.mul_(2))))
        self.noise = 0.1 * torch.randn(8)
        y = F.gelu(self.second(self.kept[0])) + self.noise
        return self.last(y * self.count + self.kept[-1])


def test_what_a_forward_pass_leaves_behind_is_neither_mixed_up_nor_left():
    torch.manual_seed(0)
    model, x = Remembers().eval(), torch.randn(256, 4)
    convert(model, example_input=x[:2].clone())
    one, two, unfitted = (copy.deepcopy(model) for _ in range(3))
    batches = x.clone().split(64)
    random = torch.get_rng_state()
    match_targets(one, batches, refit=True)
    match_targets(unfitted, batches)
    sensitivity(unfitted, batches)
    assert torch.equal(torch.get_rng_state(), random)
    for net in (one, unfitted):
        left = net.calls, net.count.item(), net.kept
        assert left == (model.calls, model.count.item(), model.kept)
        assert not hasattr(net, "noise")
    assert torch.equal(torch.cat(batches), x)

    match_targets(two, batches, refit=True, max_bytes=0)  # one forward pass at a time
    assert_same_bits(one, two)


def failing(model: nn.Module, error: BaseException):
    """Make the last layer fail in the second batch; how many threads there were."""
    calls, threads = [], []

    def fail(*args) -> None:
        calls.append(1)
        if len(calls) == 4:
            threads.append(threading.active_count())
            raise error

    model[-1].register_forward_pre_hook(fail)
    return threads


@pytest.mark.parametrize("error", [RuntimeError("in the user's code"), KeyboardInterrupt()])
def test_an_error_in_a_forward_pass_ends_all_threads_and_changes_nothing(error):
    model, x = network()
    convert(model, example_input=x)
    threads = failing(model, error)
    before, hooks = copy.deepcopy(model), [len(m._forward_hooks) for m in model.modules()]
    gates = [m.gate for m in model.modules() if hasattr(m, "gate")]
    now = threading.active_count()
    with pytest.raises(type(error)):
        match_targets(model, x.split(200), refit=True)
    assert threads
    assert threading.active_count() == now
    assert_same_bits(model, before)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [m.gate for m in model.modules() if hasattr(m, "gate")] == gates


def test_a_batch_may_be_an_object_and_some_networks_need_gradients():
    class Graph:
        def __init__(self, number: int) -> None:
            generator = torch.Generator().manual_seed(number)
            self.x = torch.randn(6, 4, generator=generator)

    class Potential(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 1))

        def forward(self, graphs):
            x = torch.stack([graph.x for graph in graphs]).requires_grad_()
            energy = self.net(x).sum((1, 2))
            return energy, -torch.autograd.grad(energy.sum(), x)[0]

    torch.manual_seed(0)
    graphs = [Graph(number) for number in range(40)]
    model, plain = Potential(), torch.cat([graph.x for graph in graphs])
    net = copy.deepcopy(model.net)
    convert(model, example_input={"graphs": graphs[:2]})
    report = match_targets(model, [{"graphs": graphs[:20]}, {"graphs": graphs[20:]}])
    expected = match_targets(convert(net, example_input=plain), [plain])
    assert report.rows[0].r2 == pytest.approx(expected.rows[0].r2, rel=1e-4)
    assert not model.net[0].weight.grad


def test_experts_that_see_other_tokens_are_fitted_to_their_own():
    """Where the networks take different ways, a site is fitted to what it gets."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.route = nn.Linear(4, 4), nn.Linear(4, 2)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(2)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.relu(self.inner(x))
            best, y = self.route(x).argmax(1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                mine = best == number
                if mine.any():
                    y[mine] = expert(x[mine])
            return y

    torch.manual_seed(0)
    model, x = Experts(), torch.randn(400, 4)
    convert(model, example_input=x)
    report = match_targets(model, x.split(100), refit=True)
    assert all(row.r2 > 0.9 for row in report)
