"""Optimizers around optimizers: SAM, which computes two gradients a step, and timm's Lookahead."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from tests.helpers.explicit_loss import (
    GAMMA,
    assert_loop_reaches_the_budget,
    assert_transferred,
    gated_cnn,
    gates,
    mean_probability,
    mid_transfer,
    plain,
    risk,
    task,
)
from transfer_surgery import TransferSchedule, wrap_optimizer

RHO = 0.05


class SAM(Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021), written as users write it."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = RHO, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)  # type: ignore[call-arg]
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norms = [
            p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        norm = torch.stack(norms).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


def explicit_step(model: nn.Module, base: Optimizer, seed: int) -> None:
    """The reference: along the gradient of the task, and there its gradient; the risk's is here."""
    parameters = list(model.parameters())
    first = torch.autograd.grad(task(model, seed), parameters)
    here = torch.autograd.grad(risk(model), parameters, materialize_grads=True)
    norm = torch.stack([g.norm() for g in first]).norm()
    before = [p.detach().clone() for p in parameters]
    torch._foreach_add_([p.data for p in parameters], [g * RHO / norm for g in first])
    second = torch.autograd.grad(task(model, seed), parameters)
    for p, old, g, r in zip(parameters, before, second, here, strict=True):
        p.data.copy_(old)
        p.grad = g + r
    base.step()


def by_hand(model: nn.Module, optimizer: SAM, seed: int) -> None:
    task(model, seed).backward()
    optimizer.first_step(zero_grad=True)
    task(model, seed).backward()
    optimizer.second_step(zero_grad=True)


def by_closure(model: nn.Module, optimizer: SAM, seed: int) -> None:
    def closure() -> Tensor:
        loss = task(model, seed)
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    optimizer.zero_grad()


SAM_LOOPS = [by_hand, by_closure]
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}),
    "adam": (Adam, {"lr": 0.01, "eps": 1e-4}),
    "adamw-fused": (AdamW, {"lr": 0.01, "eps": 1e-4, "fused": True}),
}


@pytest.mark.parametrize("loop", SAM_LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("name", BASES)
def test_sam_perturbs_by_the_task_and_adds_the_risk_of_the_restored_gates(
    name: str, loop: Callable[[nn.Module, SAM, int], None]
) -> None:
    base, settings = BASES[name]
    model = mid_transfer(gated_cnn())
    reference = copy.deepcopy(model)
    optimizer = wrap_optimizer(SAM(model.parameters(), base, **settings), model, gamma=GAMMA)
    explicit = base(reference.parameters(), **settings)  # type: ignore[call-arg]
    for seed in range(3):
        loop(model, optimizer, seed)
        explicit_step(reference, explicit, seed)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loop", SAM_LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("name", BASES)
def test_sam_keeps_to_the_schedule(name: str, loop: Callable[[nn.Module, SAM, int], None]) -> None:
    base, settings = BASES[name]
    assert_loop_reaches_the_budget(
        lambda m: SAM(m.parameters(), base, **settings),
        lambda model, optimizer, explicit, seed: loop(model, optimizer, seed),  # type: ignore[arg-type]
    )


def test_sam_counts_one_step_for_two_gradients_and_its_groups_stay_shared() -> None:
    model = gated_cnn()
    optimizer = SAM(model.parameters(), SGD, lr=0.05)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(9), gate_lr=0.2)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    own = optimizer.param_groups[-1]
    assert own["params"] == gates(model)
    assert (own["lr"], own["rho"]) == (0.2, RHO)
    for seed in range(4):
        by_hand(model, optimizer, seed)
    assert own["transfer_step"] == 4


# ---- Lookahead, whose steps `test_timm_optimizers` compares with the explicit loss


@pytest.mark.parametrize(("k", "alpha"), [(1, 0.8), (3, 0.5)])
def test_lookahead_keeps_to_the_schedule_and_averages_the_weights(k: int, alpha: float) -> None:
    """The slow weights leave the gates out: they would be (1 - alpha) / alpha * k steps behind."""
    model, schedule = gated_cnn(), TransferSchedule(40, start=0, end=0.8)
    optimizer = Lookahead(SGD(model.parameters(), lr=0.05), alpha=alpha, k=k)
    wrap_optimizer(optimizer, model, transfer=schedule)
    fast: list[Tensor] = []
    optimizer._base_optimizer.register_step_post_hook(
        lambda *_: fast.append(model[0].weight.detach().clone())
    )
    slow = None
    for step in range(1, 41):
        plain(model, optimizer, False, step)
        assert mean_probability(model) == pytest.approx(schedule.budget(step), abs=1e-3)
        if step % k == 0:
            slow = fast[-1] if slow is None else slow + alpha * (fast[-1] - slow)
            torch.testing.assert_close(model[0].weight.detach(), slow)
    assert_transferred(model)
