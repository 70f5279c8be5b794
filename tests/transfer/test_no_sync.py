"""What a CUDA graph needs: nothing looks at a gate's value, and gates move where they are.

Tensors on the meta device have no values: whatever would synchronise with a device fails there.
"""

from typing import Any

import pytest
import torch
from memory import Launches
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.explicit_loss import GAMMA, batch, gated_cnn, gates, mean_probability
from transfer_surgery import HardConcrete, TransferSchedule, convert, wrap_optimizer
from transfer_surgery.transfer.controllers import Projection
from transfer_surgery.transfer.risk import REDUCTIONS, add_risk_gradient
from transfer_surgery.transfer.wrapped_optimizers import WRAPPED
from transfer_surgery.units import gated_activations

WAYS: list[dict[str, Any]] = [
    {"granularity": granularity, "gate": HardConcrete(noise=noise)}
    for granularity in ("layer", "channel", "neuron")
    for noise in ("batch", "example", "none")
]
WAYS += [{"gate": gate} for gate in ("bernoulli", "line", "copy")]
X = torch.zeros(4, 2, 5, 5)


def on_meta(**how: Any) -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1), nn.GELU(), nn.PReLU(6)
    )
    return convert(model, example_input=X, **how).to("meta")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", WAYS, ids=lambda how: "-".join(map(str, how.values())))
def test_forward_and_backward_never_look_at_the_gates(how: dict[str, Any], training: bool) -> None:
    model = on_meta(**how).train(training)
    model(X.to("meta")).sum().backward()
    for _, unit in gated_activations(model):
        if training and unit.gate.learned:
            assert unit.log_alpha.grad is not None


class _NoCopies(TorchDispatchMode):
    """Fails where the host copies a tensor to the device, for which it waits."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_host = bool(given) and given[0].device.type == "cpu"
        if isinstance(result, Tensor) and on_host and function is torch.ops.aten._to_copy.default:
            assert result.device.type == "cpu", "a copy from the host"
        return result


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("scale", [None, torch.ones((), device="meta")])
def test_the_gradient_of_the_risk_never_looks_and_copies_nothing(
    reduction: str, scale: Tensor | None
) -> None:
    model = on_meta()
    with _NoCopies():
        add_risk_gradient([unit for _, unit in gated_activations(model)], GAMMA, reduction, scale)
    assert all(gate.grad is not None for gate in gates(model))


# Each order, each share of the gates and each kind of gates; not each with each.
PROJECTED = [
    ("hard_concrete", TransferSchedule(10, start=0)),
    ("hard_concrete", TransferSchedule(10, start=0, order="front_to_back", fraction=0.5)),
    ("hard_concrete", TransferSchedule(10, start=0, order=("3", "*"))),
    ("line", TransferSchedule(10, start=0)),
    ("copy", TransferSchedule(10, start=0)),
]


@pytest.mark.parametrize("skipped", [None, torch.zeros((), device="meta")])
@pytest.mark.parametrize(("gate", "schedule"), PROJECTED)
def test_the_projection_of_a_step_never_looks_at_the_gates(
    gate: str, schedule: TransferSchedule, skipped: Tensor | None
) -> None:
    projection = Projection(dict(gated_activations(on_meta(gate=gate))), schedule)
    projection.begun = True  # it looks once, before it moves the first gate
    for step in (1, 6, 10):  # the first, one between and the last
        projection.follow(step, skipped)


HOW: dict[str, dict[str, Any]] = {
    "schedule": {"transfer": TransferSchedule(20, start=0)},
    "gamma": {"gamma": GAMMA},
}


def begin(optimizer: Optimizer) -> None:
    """As after the first steps: it looks at the first of 50, and before it moves the first gate."""
    hooks = WRAPPED[optimizer]
    hooks.finite.looks = 1
    if hooks.projection is not None:
        hooks.projection.begun = True


@pytest.mark.parametrize(
    ("how", "make", "closure"),
    [
        ({"transfer": TransferSchedule(4, start=0)}, SGD, True),
        ({"transfer": TransferSchedule(4, start=0)}, AdamW, False),
        ({"gamma": GAMMA}, SGD, False),
        ({"gamma": GAMMA}, AdamW, True),
    ],
)
def test_a_whole_step_never_looks_between_the_looks_at_the_gradients(
    how: dict[str, Any], make: Any, closure: bool
) -> None:
    model = on_meta()
    optimizer = wrap_optimizer(make(model.parameters(), lr=0.1), model, **how)
    begin(optimizer)

    def evaluate() -> Tensor:
        loss = model(X.to("meta")).sum()
        loss.backward()
        return loss

    for _ in range(4):
        if not closure:
            evaluate()
        optimizer.step(evaluate if closure else None)
        optimizer.zero_grad()
    assert optimizer.param_groups[-1]["transfer_step"] == 4


@pytest.mark.parametrize("how", HOW)
def test_gates_and_gradients_stay_where_they_are_in_memory(how: str) -> None:
    """A graph that was captured reads them there."""
    model = gated_cnn()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, **HOW[how])
    model(X).sum().backward()
    places = [(gate.data_ptr(), gate.grad.data_ptr()) for gate in gates(model)]
    for _ in range(20):
        optimizer.step()
        assert [(gate.data_ptr(), gate.grad.data_ptr()) for gate in gates(model)] == places


# ---- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def captured(model: nn.Module) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Forward and backward as a CUDA graph: the graph, its input, its target and its loss."""
    x, y = (part.cuda() for part in batch(0))

    def run() -> Tensor:
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    return graph, x, y, loss


@cuda
def test_a_captured_model_replays_while_the_schedule_moves_outside() -> None:
    model, schedule = gated_cnn().cuda(), TransferSchedule(20, start=0)
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, transfer=schedule)
    graph, x, y, loss = captured(model)
    for step in range(1, 21):
        for static, new in zip((x, y), batch(step), strict=True):
            static.copy_(new)
        graph.replay()
        optimizer.step()
        assert mean_probability(model) == pytest.approx(schedule.budget(step), abs=1e-3)
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(loss, nn.functional.mse_loss(model(x), y), rtol=1e-3, atol=1e-4)


@cuda
def test_a_captured_step_is_refused() -> None:
    model = gated_cnn().cuda()
    optimizer = Adam(model.parameters(), lr=0.01, capturable=True)
    wrap_optimizer(optimizer, model, gamma=GAMMA)
    model(X.cuda()).sum().backward()
    refused = pytest.raises(RuntimeError, match="Capture forward and backward only")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("how", HOW)
def test_a_step_on_a_gpu_does_not_synchronise(how: str) -> None:
    model = gated_cnn().cuda()
    optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.01), model, **HOW[how])
    x = X.cuda()
    try:
        for _ in range(10):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.set_sync_debug_mode("error")  # from now on: the first step looks once
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", HOW)
def test_a_step_takes_few_launches_for_each_further_site(how: str) -> None:
    def launches(sites: int) -> int:
        layers = [layer for _ in range(sites) for layer in (nn.Linear(4, 4), nn.ReLU())]
        model = convert(nn.Sequential(*layers), example_input=torch.zeros(2, 4))
        settings = HOW[how]
        if "transfer" in settings:
            settings = settings | {"transfer": TransferSchedule(1000, start=0)}
        optimizer = wrap_optimizer(SGD(model.parameters(), lr=0.1), model, **settings)
        for count in (False, False, True):
            model(torch.zeros(2, 4)).sum().backward()
            with Launches(count) as counted:
                optimizer.step()
        return counted.number

    few, many = launches(2), launches(22)
    # Per site: the logit of its gates, and SGD's steps of weight, bias and gates.
    assert (many - few) / 20 <= 6
    assert few < 200
