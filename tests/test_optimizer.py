"""`wrap_optimizer`: a step equals a step of the explicit loss, however the loop is written.

The reference is the same model, trained by ``task + gamma * structural_risk`` with autograd.
"""

import copy
import inspect
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop, lr_scheduler

from transfer_surgery.activations import get_activation
from transfer_surgery.controllers import ScheduleEndedWarning
from transfer_surgery.frozen import FrozenGatesWarning
from transfer_surgery.gates import make_gate
from transfer_surgery.optimizer import wrap_optimizer
from transfer_surgery.risk import structural_risk
from transfer_surgery.schedule import TransferSchedule
from transfer_surgery.unit import GatedActivation, gated_activations

GAMMA = 0.3
LENGTH = TransferSchedule(20)

Make = Callable[[Any], Optimizer]


def unit_of(width: int, kind: str = "hard_concrete") -> GatedActivation:
    relu, sin = get_activation("relu"), get_activation("sin")
    gate = make_gate(kind, (width,))
    return GatedActivation(relu, sin, gate, granularity="channel", neurons=width)


def network(kind: str = "hard_concrete", width: int = 6, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, width, bias=bias),
        unit_of(width, kind),
        nn.Linear(width, width, bias=bias),
        unit_of(width, kind),
        nn.Linear(width, 2, bias=bias),
    )


def mixed_network() -> nn.Sequential:
    """A network whose gates are between 0 and 1, so that task and risk both have a gradient."""
    model = network()
    for _, unit in gated_activations(model):
        nn.init.normal_(unit.log_alpha)
    return model


def log_alphas(model: nn.Module) -> Tensor:
    units = [unit for _, unit in gated_activations(model)]
    return torch.cat([unit.log_alpha.detach().flatten() for unit in units])


def task(model: nn.Module, seed: int) -> Tensor:
    """A loss on a batch of its own, with the same gate noise whenever it is computed."""
    torch.manual_seed(seed)
    x, y = torch.randn(16, 3), torch.randn(16, 2)
    return nn.functional.mse_loss(model(x), y)


def assert_same_weights(a: nn.Module, b: nn.Module, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=rtol, atol=atol)


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "sgd-momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd-nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01),
    "adam-fused": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.01),
}


# ---- one step of the wrapped optimizer against one step of the explicit loss

Step = Callable[[nn.Module, Optimizer, bool, int], None]


def plain(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    loss = task(model, seed)
    (loss + GAMMA * structural_risk(model) if explicit else loss).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    for part in range(4):
        (task(model, 10 * seed + part) / 4).backward()
    if explicit:
        (GAMMA * structural_risk(model)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def _closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> Any:
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task(model, seed)
        if explicit:
            loss = loss + GAMMA * structural_risk(model)
        loss.backward()
        return loss

    return evaluate


def closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    optimizer.step(_closure(model, optimizer, explicit, seed))


def keyword_closure(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    optimizer.step(closure=_closure(model, optimizer, explicit, seed))


def scaled(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = task(model, seed)
    scaler.scale(loss + GAMMA * structural_risk(model) if explicit else loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def unscaled_by_hand(model: nn.Module, optimizer: Optimizer, explicit: bool, seed: int) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loss = task(model, seed)
    scaler.scale(loss + GAMMA * structural_risk(model) if explicit else loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


STEPS: list[Step] = [plain, accumulated, closure, keyword_closure, scaled, unscaled_by_hand]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_equal_those_of_the_explicit_loss(name: str, step: Step) -> None:
    model = mixed_network()
    reference = copy.deepcopy(model)
    start = log_alphas(model)
    wrapped = wrap_optimizer(OPTIMIZERS[name](model.parameters()), model, gamma=GAMMA)
    explicit = OPTIMIZERS[name](reference.parameters())
    for seed in range(3):
        step(model, wrapped, False, seed)
        step(reference, explicit, True, seed)
    assert_same_weights(model, reference)
    assert not torch.equal(log_alphas(model), start)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_steps_equal_those_of_the_explicit_loss(line_search: str | None) -> None:
    def make(params: Any) -> Optimizer:
        return torch.optim.LBFGS(params, lr=0.5, max_iter=5, line_search_fn=line_search)

    model = mixed_network()
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(make(model.parameters()), model, gamma=GAMMA)
    explicit = make(reference.parameters())
    for _ in range(2):
        losses = [
            optimizer.step(_closure(net, optimizer, net is reference, 0))
            for net, optimizer in ((model, wrapped), (reference, explicit))
        ]
        torch.testing.assert_close(losses[0], losses[1].detach() if line_search else losses[1])
    assert_same_weights(model, reference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reduction", ["mean", "neurons"])
def test_reduction_is_that_of_structural_risk(reduction: str) -> None:
    model = mixed_network()
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=1), model, gamma=2, reduction=reduction)
    task(model, 0).backward()
    wrapped.step()
    explicit = SGD(reference.parameters(), lr=1)
    (task(reference, 0) + 2 * structural_risk(reference, reduction)).backward()
    explicit.step()
    assert_same_weights(model, reference)


def test_an_optimizer_that_maximizes_gets_the_risk_with_the_other_sign() -> None:
    model = mixed_network()
    reference = copy.deepcopy(model)
    wrapped = wrap_optimizer(SGD(model.parameters(), lr=0.1, maximize=True), model, gamma=GAMMA)
    (-task(model, 0)).backward()
    wrapped.step()
    plain(reference, SGD(reference.parameters(), lr=0.1), True, 0)
    assert_same_weights(model, reference)


def test_gradient_of_the_risk_is_that_of_autograd() -> None:
    model = mixed_network()
    expected = torch.autograd.grad(
        GAMMA * structural_risk(model), [u.log_alpha for _, u in gated_activations(model)]
    )
    wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=GAMMA).step()
    added = [u.log_alpha.grad for _, u in gated_activations(model)]
    torch.testing.assert_close(added, list(expected))
    assert all(p.grad is None for n, p in model.named_parameters() if "log_alpha" not in n)


def test_clipping_before_the_step_does_not_see_the_risk() -> None:
    model = mixed_network()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=1.0), model, gamma=GAMMA)
    before = log_alphas(model)
    risk = torch.autograd.grad(
        GAMMA * structural_risk(model), [u.log_alpha for _, u in gated_activations(model)]
    )
    task(model, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-9)
    optimizer.step()
    torch.testing.assert_close(before - log_alphas(model), torch.cat(risk), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("returned", ["tensor", "float", "none"])
def test_closure_returns_the_loss_with_the_risk(returned: str) -> None:
    model = mixed_network()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=GAMMA)
    expected = (task(model, 0) + GAMMA * structural_risk(model)).item()

    def evaluate() -> Any:
        loss = task(model, 0)
        loss.backward()
        loss = loss.detach()
        return {"tensor": loss, "float": loss.item(), "none": None}[returned]

    result: Any = optimizer.step(evaluate)
    if returned == "none":
        assert result is None
    else:
        assert isinstance(result, Tensor if returned == "tensor" else float)
        assert float(result) == pytest.approx(expected)


@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": TransferSchedule(3, start=0)}])
@pytest.mark.parametrize("name", ["sgd-momentum", "sgd-fused", "adam", "adamw-fused"])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(name: str, how: dict[str, Any]) -> None:
    model = mixed_network()
    optimizer = wrap_optimizer(OPTIMIZERS[name](model.parameters()), model, **how)
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(task(model, 0) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_weights(model, before, rtol=0, atol=0)


# ---- the optimizer stays the user's


@pytest.mark.parametrize("when", ["before convert", "after convert"])
def test_gates_get_the_last_group_and_the_state_of_their_parameters_stays(when: str) -> None:
    model = mixed_network()
    gates = [u.log_alpha for _, u in gated_activations(model)]
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    params = others if when == "before convert" else list(model.parameters())
    optimizer = Adam(
        [{"params": params[:3], "lr": 0.02, "weight_decay": 0.0}, {"params": params[3:]}],
        lr=0.01,
        weight_decay=0.1,
    )
    task(model, 0).backward()
    optimizer.step()
    state = {p: optimizer.state[p] for p in params}

    wrapped = wrap_optimizer(optimizer, model, gamma=GAMMA)
    assert wrapped is optimizer
    assert isinstance(wrapped, torch.optim.Optimizer)
    assert type(wrapped) is Adam
    *rest, own = wrapped.param_groups
    assert own["params"] == gates
    assert own["lr"] == 0.02
    assert own["weight_decay"] == 0.1
    assert own["betas"] == (0.9, 0.999)
    assert {p for group in rest for p in group["params"]} == set(others)
    assert all(wrapped.state[p] is state[p] for p in params)
    task(model, 1).backward()
    wrapped.step()


@pytest.mark.parametrize(
    ("how", "weight_decay"),
    [
        ({"gamma": 1.0}, 0.1),
        ({"transfer": LENGTH}, 0.0),
        ({"gamma": 1.0, "gate_weight_decay": 0.5}, 0.5),
        ({"transfer": LENGTH, "gate_weight_decay": 0.5}, 0.5),
    ],
)
def test_weight_decay_of_the_gates(how: dict[str, Any], weight_decay: float) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    wrap_optimizer(optimizer, model, gate_lr=0.7, **how)
    assert optimizer.param_groups[-1]["weight_decay"] == weight_decay
    assert optimizer.param_groups[-1]["lr"] == 0.7
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_optimizers_with_named_parameters_stay_named() -> None:
    model = network()
    optimizer = SGD(model.named_parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=LENGTH)
    first, own = optimizer.param_groups
    assert own["param_names"] == ["1.gate.log_alpha", "3.gate.log_alpha"]
    names = {name: p for name, p in model.named_parameters() if name not in own["param_names"]}
    assert dict(zip(first["param_names"], first["params"], strict=True)) == names


def test_a_learning_rate_tensor_is_not_shared_with_the_gates() -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=torch.tensor(0.1), foreach=False)
    wrap_optimizer(optimizer, model, transfer=LENGTH)
    lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.5])
    first, own = (float(group["lr"]) for group in optimizer.param_groups)
    assert (first, own) == (pytest.approx(0.1), pytest.approx(0.05))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.5),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 1, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 2], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.StepLR(o, 1, 0.5), lr_scheduler.StepLR(o, 1, 0.1)], [1]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 1, 0.5)]),
}


def test_the_schedulers_below_are_all_there_are() -> None:
    theirs = {
        name
        for name, cls in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(cls, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert theirs == SCHEDULERS.keys()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_moves_the_gates_learning_rate_with_the_others(name: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrap_optimizer(optimizer, model, transfer=LENGTH)
    scheduler = SCHEDULERS[name](optimizer)
    seen = set()
    for seed in range(3):
        plain(model, optimizer, False, seed)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        first, own = (group["lr"] for group in optimizer.param_groups)
        assert own == pytest.approx(first)
        seen.add(own)
    assert len(seen) > 1
    assert optimizer.param_groups[-1]["transfer_step"] == 3


def test_a_copy_or_pickle_has_no_hooks_and_goes_on_once_it_is_wrapped_again() -> None:
    model = mixed_network()
    optimizer = wrap_optimizer(Adam(model.parameters()), model, transfer=TransferSchedule(6))
    plain(model, optimizer, False, 0)
    lr_scheduler.StepLR(optimizer, 1)
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for again, other in copies:
        wrap_optimizer(other, again, transfer=TransferSchedule(6), gate_lr=0.5)
        assert len(other.param_groups) == 2
        assert other.param_groups[-1]["lr"] == 0.5
        assert other.param_groups[-1]["transfer_step"] == 1


# ---- transfer schedules


@pytest.mark.parametrize("lr", [0.1, 0.01])
@pytest.mark.parametrize("make", [SGD, Adam])
@pytest.mark.parametrize("width", [4, 64])
def test_gates_follow_the_schedule(make: Any, lr: float, width: int) -> None:
    model = network(width=width)
    schedule = TransferSchedule(60)
    optimizer = wrap_optimizer(make(model.parameters(), lr=lr), model, transfer=schedule)
    for step in range(1, 61):
        if step == 7:
            before = structural_risk(model, "mean").item()
            assert before > 0.999  # the start is at step 6
        plain(model, optimizer, False, step)
        budget = schedule.budget(step)
        if 1e-3 < budget < 1 - 1e-3:
            assert structural_risk(model, "mean").item() == pytest.approx(budget, abs=2e-4)
    assert all((unit.gate.predict() == 0).all() for _, unit in gated_activations(model))


def test_lbfgs_follows_the_schedule_too() -> None:
    model = network()
    schedule = TransferSchedule(10, start=0)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
    wrap_optimizer(optimizer, model, transfer=schedule)
    for step in range(1, 7):
        closure(model, optimizer, False, 0)
        risk = structural_risk(model, "mean").item()
        assert risk == pytest.approx(schedule.budget(step), abs=1e-3)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_exactly_the_asked_share_is_transferred_and_the_others_are_kept(fraction: float) -> None:
    model = network(width=20)
    optimizer = Adam(model.parameters(), lr=0.05)
    wrap_optimizer(
        optimizer, model, transfer=TransferSchedule(40, fraction=fraction), gate_weight_decay=0.1
    )
    for step in range(40):
        plain(model, optimizer, False, step)
    z = torch.cat([unit.gate.predict() for _, unit in gated_activations(model)])
    assert int((z == 0).sum()) == round(40 * fraction)
    assert int((z == 1).sum()) == 40 - round(40 * fraction)


def test_gates_that_the_user_froze_stay() -> None:
    model = network()
    frozen, free = (unit.gate for _, unit in gated_activations(model))
    frozen.log_alpha.requires_grad_(False)
    before = frozen.log_alpha.clone()
    optimizer = SGD(model.parameters(), lr=0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(4, end=0.5))
    for seed in range(3):
        plain(model, optimizer, False, seed)
    assert torch.equal(frozen.log_alpha, before)
    assert bool((free.predict() == 0).all())


@pytest.mark.parametrize("kind", ["line", "copy"])
def test_a_linear_schedule_gives_the_papers_line_and_copy(kind: str) -> None:
    model = network(kind)
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = TransferSchedule(10, start=0, end=1.0, shape="linear")
    wrap_optimizer(optimizer, model, transfer=schedule)
    for step in range(1, 11):
        plain(model, optimizer, False, step)
        expected = 1 - step / 10 if kind == "line" else float(step < 5)
        for _, unit in gated_activations(model):
            torch.testing.assert_close(unit.gate.predict(), torch.full((6,), expected))


@pytest.mark.parametrize("kind", ["hard_concrete", "line"])
def test_resuming_equals_never_having_stopped(kind: str) -> None:
    def start() -> tuple[nn.Module, Optimizer, lr_scheduler.LRScheduler]:
        torch.manual_seed(0)
        model = network(kind)
        optimizer = Adam(model.parameters(), lr=0.05)
        wrap_optimizer(optimizer, model, transfer=TransferSchedule(12))
        return model, optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 12)

    model, optimizer, scheduler = start()
    for step in range(12):
        if step == 5:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in (model, optimizer, scheduler)], file)
        plain(model, optimizer, False, step)
        scheduler.step()

    resumed = start()
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for step in range(5, 12):
        plain(resumed[0], resumed[1], False, step)
        resumed[2].step()
    assert_same_weights(model, resumed[0], rtol=0, atol=0)


def test_the_step_travels_in_a_distributed_checkpoint() -> None:
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = network()
    optimizer = wrap_optimizer(Adam(model.parameters()), model, transfer=LENGTH)
    for seed in range(5):
        plain(model, optimizer, False, seed)
    saved = state_dict.get_optimizer_state_dict(model, optimizer)
    fresh = network()
    resumed = wrap_optimizer(Adam(fresh.parameters()), fresh, transfer=LENGTH)
    state_dict.set_optimizer_state_dict(fresh, resumed, saved)
    assert resumed.param_groups[-1]["transfer_step"] == 5


def test_running_past_the_end_warns_once_and_keeps_the_gates() -> None:
    model = network()
    schedule = TransferSchedule(3)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, transfer=schedule)
    for seed in range(3):
        plain(model, optimizer, False, seed)
    with pytest.warns(ScheduleEndedWarning, match=r"step 4 .* of 3 steps.*total_steps counts"):
        plain(model, optimizer, False, 3)
    plain(model, optimizer, False, 4)
    assert all((unit.gate.predict() == 0).all() for _, unit in gated_activations(model))


# ---- frozen gates and losses that are not finite


def gates_of(model: nn.Module) -> Tensor:
    return torch.cat([u.log_alpha.detach().clone() for _, u in gated_activations(model)])


def test_frozen_gates_are_reported_once() -> None:
    model = network()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.0)
    for _ in range(199):
        plain(model, optimizer, False, 0)
    message = r"gates are frozen.* 200 steps.*sites 1, 3\).*TransferSchedule.*gate_weight_decay"
    with pytest.warns(FrozenGatesWarning, match=message):
        plain(model, optimizer, False, 0)
    plain(model, optimizer, False, 0)


def test_gates_that_rest_at_the_end_of_a_cycle_are_not_reported() -> None:
    model = network()
    for _, unit in gated_activations(model):
        nn.init.constant_(unit.log_alpha, 0.0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 1000)
    for step in range(1000):
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step == 799:
            before = gates_of(model)
    assert (gates_of(model) - before).abs().max() < 0.05  # what would have been reported


@pytest.mark.parametrize("start", [0.0, -8.0])
def test_gates_that_move_or_have_been_transferred_are_not_reported(start: float) -> None:
    model = network()
    for _, unit in gated_activations(model):
        nn.init.constant_(unit.log_alpha, start)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, gamma=1.0)
    for _ in range(201):
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("way", ["step", "closure"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": TransferSchedule(3, start=0)}])
def test_a_loss_that_is_not_finite_stops_before_anything_is_updated(
    how: dict[str, Any], bias: bool, way: str
) -> None:
    model = network(bias=bias)
    optimizer = wrap_optimizer(Adam(model.parameters()), model, **how)
    before = copy.deepcopy(model)

    def evaluate() -> Tensor:
        loss = task(model, 0) * math.nan
        loss.backward()
        return loss

    name = "0.bias" if bias else "0.weight"
    message = rf"step 1: .* {name} is not finite \(nothing was updated\)\. Lower the learning rate"
    given = [evaluate] if way == "closure" else []
    if way == "step":
        evaluate()
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step(*given)
    assert_same_weights(model, before, rtol=0, atol=0)
    assert optimizer.param_groups[-1]["transfer_step"] == 0


def test_a_trial_of_lbfgs_that_is_not_finite_says_that_the_weights_are_a_trial() -> None:
    model = mixed_network()
    optimizer = wrap_optimizer(torch.optim.LBFGS(model.parameters()), model, gamma=GAMMA)
    factors = iter([1.0, math.nan])

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = task(model, 0) * next(factors)
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError, match="evaluation 2 of the closure, the weights are"):
        optimizer.step(evaluate)


def test_large_but_finite_gradients_pass() -> None:
    model = network()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.0), model, gamma=GAMMA)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3e38)
    optimizer.step()


# ---- bad input


def refused(
    error: type[Exception], message: str, model: nn.Module, optimizer: Any, **arguments: Any
) -> None:
    """Assert that wrapping fails with this message and leaves the optimizer as it was."""
    groups = getattr(optimizer, "param_groups", [])
    before = [{**group, "params": list(group["params"])} for group in groups]
    with pytest.raises(error, match=message):
        wrap_optimizer(optimizer, model, **arguments)
    assert before == groups


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, r"exactly one of gamma= .* and transfer=TransferSchedule"),
        ({"gamma": 1.0, "transfer": LENGTH}, ValueError, "exactly one of gamma="),
        ({"gamma": -1.0}, ValueError, "gamma=-1.0: give a finite number"),
        ({"gamma": math.inf}, ValueError, "gamma=inf"),
        ({"gamma": 1.0, "reduction": "max"}, ValueError, "unknown reduction 'max'"),
        ({"transfer": 100}, TypeError, r"transfer=100: give a TransferSchedule\(total_steps\)"),
        ({"transfer": LENGTH, "reduction": "mean"}, ValueError, "reduction='mean' .* Leave it out"),
        ({"gamma": 1.0, "gate_lr": -0.1}, ValueError, "gate_lr=-0.1: give a finite number"),
        ({"gamma": 1.0, "gate_weight_decay": math.nan}, ValueError, "gate_weight_decay=nan"),
    ],
)
def test_arguments_that_do_not_fit_are_errors(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = network()
    refused(error, message, model, SGD(model.parameters(), lr=0.1), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.0}, "gates of the kind 'line' have no parameters .* transfer="),
        ({"transfer": LENGTH, "gate_lr": 0.1}, "gate_lr: these gates have no parameters"),
        ({"transfer": TransferSchedule(9, fraction=0.5)}, "'line' all go together: use fraction=1"),
    ],
)
def test_gates_without_parameters_take_a_full_schedule_only(
    arguments: dict[str, Any], message: str
) -> None:
    model = network("line")
    refused(ValueError, message, model, SGD(model.parameters(), lr=0.1), **arguments)


def test_optimizers_that_do_not_fit_are_errors() -> None:
    model = network()
    refused(ValueError, r"call convert\(model", nn.Linear(2, 2), SGD(model.parameters()), gamma=1.0)
    refused(TypeError, "Sequential is not a torch.optim.Optimizer", model, model, gamma=1.0)
    other = SGD(network().parameters(), lr=0.1)
    refused(ValueError, "holds no parameter of this Sequential", model, other, gamma=1.0)
    lbfgs = torch.optim.LBFGS(model.parameters())
    refused(ValueError, "gate_lr: LBFGS allows only one", model, lbfgs, gamma=1.0, gate_lr=0.1)
    rprop = torch.optim.Rprop(model.parameters())
    message = "gate_weight_decay: Rprop has no weight_decay"
    refused(ValueError, message, model, rprop, gamma=1.0, gate_weight_decay=0.1)


def test_wrapping_twice_is_an_error() -> None:
    model = network()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, gamma=1.0)
    refused(ValueError, "wrapped already.*Build a new optimizer", model, optimizer, gamma=1.0)


@pytest.mark.parametrize("why", ["gates not held", "gate_lr"])
def test_a_scheduler_that_was_created_before_is_an_error_where_a_group_is_needed(why: str) -> None:
    model = network()
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = SGD(others if why == "gates not held" else model.parameters(), lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    message = "scheduler was created .* Create it after wrap_optimizer"
    settings = {"gate_lr": 0.1} if why == "gate_lr" else {}
    refused(ValueError, message, model, optimizer, gamma=1.0, **settings)


@pytest.mark.parametrize("how", [{"gamma": GAMMA}, {"transfer": LENGTH}])
def test_with_a_scheduler_that_was_created_before_gates_stay_in_their_group(
    how: dict[str, Any],
) -> None:
    model = mixed_network()
    weights = [p for n, p in model.named_parameters() if p.dim() > 1]
    vectors = [p for n, p in model.named_parameters() if p.dim() <= 1]
    optimizer = SGD([{"params": weights}, {"params": vectors, "lr": 0.01}], lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    reference = copy.deepcopy(model)
    wrap_optimizer(optimizer, model, **how)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 5]
    plain(model, optimizer, False, 0)
    scheduler.step()
    assert optimizer.param_groups[1]["transfer_step"] == 1
    if "gamma" in how:
        vectors = [p for n, p in reference.named_parameters() if p.dim() <= 1]
        weights = [p for n, p in reference.named_parameters() if p.dim() > 1]
        explicit = SGD([{"params": weights}, {"params": vectors, "lr": 0.01}], lr=0.1)
        plain(reference, explicit, True, 0)
        assert_same_weights(model, reference)


def test_a_scheduler_that_was_created_before_still_works_where_no_group_is_added() -> None:
    model = network("line")
    optimizer = SGD(model.parameters(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    wrap_optimizer(optimizer, model, transfer=LENGTH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(model, optimizer, False, 0)
        scheduler.step()


def test_lbfgs_built_before_convert_takes_the_gates_into_its_group() -> None:
    model = mixed_network()
    others = [p for n, p in model.named_parameters() if "log_alpha" not in n]
    optimizer = torch.optim.LBFGS(others, max_iter=2)
    closure(model, optimizer, True, 0)
    before = log_alphas(model)
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    closure(model, optimizer, False, 0)
    assert not torch.equal(log_alphas(model), before)
