"""Who evaluates the formula of a unit: eager code at first, compiled code in long runs."""

import logging
import shutil

import pytest
import torch
from torch import Tensor, nn

from transfer_surgery import HardConcrete, convert, get_activation
from transfer_surgery._running import as_written
from transfer_surgery.units import gated, make_gate
from transfer_surgery.units.kernels import engine

PAIR = get_activation("gelu"), get_activation("sin")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a compiler")


@pytest.fixture(autouse=True)
def no_engines(monkeypatch):
    """Engines of this test alone."""
    monkeypatch.setattr(engine, "_engines", {})


@pytest.fixture
def compilations(monkeypatch):
    """What was compiled; the compiler itself is one that only traces, which takes no seconds."""
    found = []

    def traced(function, **options):
        found.append(function.__name__)
        return compile_(function, backend="eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    return found


def results(x: Tensor, z: Tensor, pair=PAIR, **how) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, z, *how.pop("numbers", ()))]
    numbers = {"numbers": tuple(leaves[2:])} if leaves[2:] else {}
    y = gated(leaves[0], leaves[1], *pair, **numbers, **how)
    grad = torch.cos(torch.arange(y.numel())).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(y))]


def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(shape), torch.tensor([0.0, 0.3, 0.9, 1.0]).view(4, *[1] * (len(shape) - 2))


@needs_compiler
@pytest.mark.parametrize("straight_through", [False, True])
def test_compiled_values_and_gradients_are_the_eager_ones(monkeypatch, straight_through):
    x, z = inputs(3, 4, 5, 5)
    numbers = [torch.randn(4, 1, 1) for _ in range(4)]
    found = []
    for choice in ("eager", "compiled"):
        monkeypatch.setenv(engine.VARIABLE, choice)
        found.append(results(x, z, straight_through=straight_through, numbers=numbers))
    torch.testing.assert_close(*found)


def test_infinite_inputs_stay_in_their_channel_when_compiled(monkeypatch, compilations):
    monkeypatch.setenv(engine.VARIABLE, "compiled")
    x, z = inputs(3, 4, 5)
    x[0, 3] = torch.inf  # the gate is 1 there, and sin(inf) is nan
    y, of_x, of_z = results(x, z, (get_activation("relu"), get_activation("sin")))
    assert torch.equal(y[:, 3], x[:, 3].relu())
    assert of_x.isfinite().all()
    assert of_z.isfinite().all()
    assert compilations == ["value", "gradients"]


def test_it_is_compiled_also_where_the_networks_around_run_as_written(monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, "eager")
    expected, ran = results(*inputs(3, 4, 5)), []
    monkeypatch.setenv(engine.VARIABLE, "compiled")
    compile_ = torch.compile

    def counted(graph, example):
        return lambda *tensors: ran.append(graph) or graph(*tensors)

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=counted))
    monkeypatch.setattr(engine, "_engines", {})
    with as_written():
        torch.testing.assert_close(results(*inputs(3, 4, 5)), expected)
        assert len(ran) == 2  # the value and the gradients
        compile_(torch.sin, backend=counted)(torch.ones(3))
    assert len(ran) == 2


def test_a_formula_is_compiled_once_its_eager_runs_have_taken_as_long(monkeypatch, compilations):
    monkeypatch.delenv(engine.VARIABLE, raising=False)
    x, z = inputs(3, 4, 5)
    results(x, z)
    assert compilations == []
    monkeypatch.setattr(engine, "COMPILE_SECONDS", 0.0)
    results(x, z)
    assert compilations == ["value", "gradients"]


def test_other_sizes_and_gates_need_no_other_compilation(monkeypatch, compilations):
    monkeypatch.setenv(engine.VARIABLE, "compiled")
    results(*inputs(3, 4, 5, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        results(*inputs(8, 4, 9, 9))
        x, z = inputs(2, 4, 7, 7)
        results(x, z * 0.5 + 0.25)
    assert compilations == ["value", "gradients"]


def test_where_the_compiler_fails_the_step_is_eager_and_the_log_says_why(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long story")

    x, z = inputs(3, 4, 5)
    monkeypatch.setenv(engine.VARIABLE, "eager")
    expected = results(x, z)
    monkeypatch.setenv(engine.VARIABLE, "compiled")
    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level(logging.WARNING, "transfer_surgery"):
        for _ in range(2):
            torch.testing.assert_close(results(x, z), expected, rtol=0, atol=0)
    (record,) = caplog.records
    assert "the unit gelu -> sin stays eager" in record.getMessage()
    assert "RuntimeError: no C++ compiler." in record.getMessage()


def test_there_is_a_bound_on_what_is_compiled(monkeypatch, compilations):
    monkeypatch.setenv(engine.VARIABLE, "compiled")
    monkeypatch.setattr(engine, "MOST_ENGINES", 1)
    x, z = inputs(3, 4, 5)
    results(x, z)
    for _ in range(2):
        results(x.double(), z.double())
    assert compilations == ["value", "gradients"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch.func itself
def test_forward_mode_derivatives_are_those_of_the_formula():
    x, z = inputs(3, 4, 5)
    _, slope = torch.func.jvp(lambda x: gated(x, z, *PAIR), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    gated(leaf, z, *PAIR).sum().backward()
    torch.testing.assert_close(slope, leaf.grad)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        found = torch.autograd.forward_ad.unpack_dual(gated(dual, z, *PAIR)).tangent
    torch.testing.assert_close(found, leaf.grad)


def test_many_gradients_at_once_are_those_one_by_one():
    x, z = inputs(3, 4, 5)
    leaf = x.clone().requires_grad_()
    y = gated(leaf, z, *PAIR)
    grads = torch.randn(2, *y.shape)
    (found,) = torch.autograd.grad(y, leaf, grads, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, leaf, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(found, torch.stack(each))


def test_convert_refuses_an_unknown_choice_before_it_changes_anything(monkeypatch):
    monkeypatch.setenv(engine.VARIABLE, "nonsense")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with pytest.raises(ValueError, match="KERNELS='nonsense': use one of auto, eager, compiled"):
        convert(model, example_input=torch.zeros(1, 4))
    assert type(model[1]) is nn.ReLU


@needs_compiler
@pytest.mark.parametrize("choice", ["eager", "compiled"])
def test_a_large_sample_of_gates_is_eq_15_and_keeps_its_inputs_alone(monkeypatch, choice):
    monkeypatch.setenv(engine.VARIABLE, choice)
    kept = []
    gate = make_gate("hard_concrete", (3000,))
    gate.settings = HardConcrete(noise="example")
    gate.log_alpha.data.normal_()
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        z = gate.sample(2)
    grad = torch.cos(torch.arange(6000.0)).view(2, 3000)
    (found,) = torch.autograd.grad(z, gate.log_alpha, grad)

    torch.manual_seed(5)
    eps = torch.rand(2, 3000).clamp(2.0**-25, 1 - 2.0**-24).double()
    exact = gate.log_alpha.detach().double().requires_grad_()
    v = torch.sigmoid((exact + eps.log() - (1 - eps).log()) * 1.5)
    expected = (v * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        found.double(), torch.autograd.grad(expected, exact, grad.double())[0], rtol=1e-4, atol=1e-5
    )
    assert sorted(t.numel() for t in kept) == [3000, 6000]
