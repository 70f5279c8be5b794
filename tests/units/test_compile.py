"""torch.compile of a converted model: one graph, with the results of the plain model."""

import copy
import shutil

import pytest
import torch
from torch import nn
from torch._inductor import metrics

from tests.helpers.compiled import WAYS, compiled, converted, gradients
from tests.helpers.explicit_loss import batch, gates, mid_transfer
from transfer_surgery import bake, convert

compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")


def assert_same_training(model: nn.Module, backend: str) -> None:
    """Loss and gradients with the same noise: up to rounding, the graph has other kernels."""
    reference = copy.deepcopy(model).train()
    expected = gradients(reference, reference)
    found = gradients(compiled(model.train(), backend), model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


QUICK = [("modules", "bernoulli"), ("functional", "neuron-example"), ("in place", "channel")]
OTHERS = [("modules", way) for way in WAYS if way != "bernoulli"]
OTHERS += [("functional", "channel"), ("in place", "example")]


@pytest.mark.parametrize(
    ("name", "way"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]
)
def test_one_graph_with_the_outputs_and_gradients_of_the_plain_model(name: str, way: str) -> None:
    model = mid_transfer(converted(name, way))
    assert_same_training(model, "aot_eager")
    x, _ = batch(0)
    with torch.no_grad():
        assert torch.equal(compiled(model.eval())(x), model(x))


@compiler
@pytest.mark.parametrize(
    "name",
    ["in place", *(pytest.param(n, marks=pytest.mark.slow) for n in ("modules", "functional"))],
)
def test_inductor_gives_the_outputs_and_gradients_of_the_plain_model(name: str) -> None:
    model = mid_transfer(converted(name))
    with torch._inductor.config.patch(fallback_random=True):  # or its noise is another one
        assert_same_training(model, "inductor")
    x, _ = batch(0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model.eval(), "inductor")(x), model(x))


def test_gates_at_their_ends_compute_the_source_and_the_target_bit_for_bit() -> None:
    """In turn: the first site at its source, the next one at its target."""
    model = converted("functional").eval()
    for number, gate in enumerate(gates(model)):
        nn.init.constant_(gate, -12.0 if number % 2 else 8.0)
    baked = bake(copy.deepcopy(model))
    x, _ = batch(0)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), baked(x))
        assert torch.equal(compiled(baked)(x), baked(x))


@pytest.mark.slow  # seconds, for symbolic sizes
def test_one_dynamic_graph_serves_batches_of_any_size() -> None:
    model = mid_transfer(converted("functional", "example")).train()
    run = compiled(model, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in (8, 5, 3):
            run(batch(0)[0][:size].clone()).sum().backward()


def test_a_compiled_model_trains_under_autocast_like_the_plain_one() -> None:
    model = mid_transfer(converted("functional")).train()
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(reference, reference)
        found = gradients(compiled(model), model)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize(("training", "further"), [(False, 1), (True, 5)])
def test_inductor_fuses_a_unit_with_its_neighbours(training: bool, further: int) -> None:
    """A few small kernels for the gates; none for the unit between its neighbours."""
    x = torch.randn(8, 4, 6, 6)

    def kernels(gated: bool) -> int:
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Hardtanh())
        if gated:
            mid_transfer(convert(model, include="1", example_input=x))
        model.train(training)
        metrics.reset()
        y = torch.compile(model, fullgraph=True)(x.clone().requires_grad_(training))
        if training:
            y.square().sum().backward()
        return metrics.generated_kernel_count

    functorch = torch._functorch.config.patch(enable_autograd_cache=False)
    with functorch, torch._inductor.config.patch(fx_graph_cache=False):
        assert 0 < kernels(gated=True) <= kernels(gated=False) + further
