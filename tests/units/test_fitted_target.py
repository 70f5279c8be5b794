"""Targets ``a * f(w*x + c) + b``: arithmetic, units, baking, saving, optimizer groups."""

import copy

import pytest
import torch
from torch import nn

from transfer_surgery import (
    TransferSchedule,
    bake,
    convert,
    get_activation,
    load_gates,
    match_targets,
    save_gates,
    swap_targets,
    wrap_optimizer,
)
from transfer_surgery.units import gated, gated_activations
from transfer_surgery.units.kernels import fitted_value, gated_value

SIN = get_activation("sin")


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4), nn.GELU(), nn.Linear(4, 2)
    )


def network(granularity: str = "channel", **options) -> nn.Sequential:
    example = torch.zeros(2, 2, 5, 5)
    return convert(base(), granularity=granularity, example_input=example, seed=0, **options)


def free(model: nn.Module) -> nn.Module:
    """Targets with parameters that are not those of the plain target."""
    generator = torch.Generator().manual_seed(3)
    for _, unit in gated_activations(model):
        for parameter in unit.add_fitted_target().parameters():
            parameter.data.normal_(generator=generator)
    return model


X = torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["sin", "silu", "square", "snake"])
def test_value_and_gradients_are_those_of_the_formula(name):
    f = get_activation(name)
    shapes = [(4, 3, 5), (1, 3, 1), (1, 3, 1), (3, 1), (1,)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, a, w, c, b = inputs
    torch.testing.assert_close(fitted_value(x, f, (a, w, c, b)), a * f(w * x + c) + b)
    assert torch.autograd.gradcheck(lambda x, *p: fitted_value(x, f, p), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *p: fitted_value(x, f, p), inputs)


@pytest.mark.parametrize("degree", [2, 5])
def test_value_and_gradients_of_a_polynomial_are_those_of_its_coefficients(degree):
    f = get_activation("polynomial", degree=degree)
    shapes = [(4, 3, 5), *[(1, 3, 1)] * 4, *[(3, 1)] * degree]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    x, a, w, c, b, *k = inputs
    v = w * x + c
    expected = a * sum(one * v**power for power, one in enumerate(k, 1)) + b
    torch.testing.assert_close(fitted_value(x, f, (a, w, c, b, *k)), expected)
    assert torch.autograd.gradcheck(lambda x, *p: fitted_value(x, f, p), inputs)


def test_training_with_labels_keeps_the_range_of_a_polynomial_whatever_it_goes_through(tmp_path):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    match_targets(convert(model, "polynomial", example_input=x), [x])
    swap_targets(model)
    save_gates(model, tmp_path / "gates")
    again = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    for trained in (model, load_gates(again, tmp_path / "gates", x), bake(copy.deepcopy(model))):
        before = {name: p.clone() for name, p in trained[1].named_parameters()}
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
        if hasattr(trained[1], "gate"):
            wrap_optimizer(optimizer, trained, gamma=0.1)
        for _ in range(2):
            trained(x).sub(1).square().mean().backward()
            optimizer.step()
        kept = {name for name, p in trained[1].named_parameters() if torch.equal(p, before[name])}
        assert {name.rpartition(".")[2] for name in kept} == {"w", "c"}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
def test_a_polynomial_starts_as_it_is_and_keeps_its_coefficients_wherever_it_goes(
    granularity, tmp_path
):
    model = network(granularity, target="polynomial(degree=3)").eval()
    swap_targets(model)
    plain = model(X)
    for _, unit in gated_activations(model):
        unit.add_fitted_target()
    torch.testing.assert_close(model(X), plain)
    generator = torch.Generator().manual_seed(3)
    for _, unit in gated_activations(model):
        for parameter in unit.fitted.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = model(X)
    save_gates(model, tmp_path / "gates.safetensors")
    again = base().eval()
    load_gates(again, tmp_path / "gates.safetensors", example_input=X)
    assert torch.equal(again(X), expected)
    again = network(granularity, target="polynomial(degree=3)").eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), expected)
    baked = bake(model)
    assert torch.equal(baked(X), expected)
    for made in (
        torch.fx.symbolic_trace(baked),
        torch.jit.script(baked),
        copy.deepcopy(baked),
        torch.export.export(baked, (X,)).module(),
    ):
        torch.testing.assert_close(made(X), expected)


@pytest.mark.parametrize("gates", [-9.0, 0.3])
def test_in_training_a_polynomial_is_constant_beyond_twice_the_range_of_its_fit(gates):
    x = torch.randn(400, 3) * torch.tensor([0.1, 1.0, 10.0]) + 1
    model = convert(nn.Sequential(nn.ReLU()), "polynomial(degree=4)", example_input=x)
    match_targets(model, [x])
    (_, unit), z = next(gated_activations(model)), torch.zeros(3)
    unit.log_alpha.data.fill_(gates)
    if gates > 0:
        z = unit.gate.predict()
        unit.gate.forward = lambda batch: z  # without the noise of training
    wide = (9 * torch.randn(50, 3) * x.std(0) + 1).requires_grad_()
    low, high = x.aminmax(dim=0)
    low, high = low - (high - low) / 2, high + (high - low) / 2
    assert (wide < low).any()
    assert (wide > high).any()
    inside = wide.detach().clamp(low, high)
    with torch.no_grad():
        expected = z * wide.relu() + (1 - z) * (model.eval()(inside) - z * inside.relu()) / (1 - z)
    y = model.train()(wide)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), wide)
    outside = (wide < low) | (wide > high)
    torch.testing.assert_close(slope[outside], (z * (wide > 0))[outside])
    assert slope[~outside].abs().min() > 0
    assert not torch.allclose(model.eval()(wide), expected)
    assert torch.equal(bake(model).train()(wide), model.eval()(wide))  # it has no bounds


def test_the_argument_of_the_sine_is_computed_in_float32():
    x = torch.full((4,), 100.0, dtype=torch.bfloat16)
    w = torch.tensor([1.0001, 1.003, 1.01, 1.1])
    one, zero = torch.ones(1), torch.zeros(1)
    y = fitted_value(x, SIN, (one, w, zero, zero))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), (w.double() * 100).sin(), atol=0.005, rtol=0.01)


@pytest.mark.parametrize("granularity", ["layer", "channel", "neuron"])
@pytest.mark.parametrize("log_alpha", [-9.0, 0.3, 9.0])
def test_a_unit_mixes_its_source_and_the_affine_target(granularity, log_alpha):
    unit = free(network(granularity))[1].eval()
    unit.log_alpha.data.fill_(log_alpha)
    x = X[:, :1].expand(-1, 3, -1, -1)[..., :3, :3]
    shape = {"layer": (1,), "channel": (1, 3, 1, 1), "neuron": (1, 3, 3, 3)}[granularity]
    a, w, c, b = (getattr(unit.fitted, name).reshape(shape) for name in "awcb")
    z = unit.gate.predict().flatten()[0]
    expected = z * x.relu() + (1 - z) * (a * torch.sin(w * x + c) + b)
    torch.testing.assert_close(unit(x), expected)


def test_at_the_source_parameters_of_the_target_get_the_gradient_0_and_nothing_becomes_nan():
    unit = free(network())[1]
    unit.log_alpha.data.fill_(20.0)
    x = torch.tensor([[[-torch.inf, 1.0, 2.0]]] * 3)[None].requires_grad_()
    unit(x).sum().backward()
    assert all(p.grad.tolist() == [0.0] * 3 for p in unit.fitted.parameters())
    assert x.grad.tolist() == [[[[0.0, 1.0, 1.0]]] * 3]


def test_a_channel_at_the_source_takes_nothing_from_the_target():
    unit = free(network())[1]
    unit.log_alpha.data.copy_(torch.tensor([20.0, -20.0, 0.0]))
    x = torch.randn(2, 3, 2, 2)
    x[:, 0] = -torch.inf
    unit(x).sum().backward()
    assert unit.fitted.a.grad[0] == 0
    assert all(p.grad.isfinite().all() and p.grad[1] != 0 for p in unit.fitted.parameters())


@pytest.mark.parametrize("source", ["relu", "gelu"])
def test_mixed_gates_have_the_gradients_of_plain_code_and_keep_only_what_they_are_given(source):
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.0, 0.3, 0.9, 1.0], dtype=torch.float64, requires_grad=True)
    numbers = tuple(torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(4))
    pair, kept = (get_activation(source), SIN), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = gated(x, z, *pair, numbers=numbers)
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in (x, z, *numbers)}
    expected = gated_value(x, z, *pair, numbers=numbers)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    leaves = (x, z, *numbers)
    for one, other in zip(
        torch.autograd.grad(found, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_mixed_gates_have_second_derivatives_and_can_be_mapped():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.3, 0.8], dtype=torch.float64, requires_grad=True)
    numbers = tuple(torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(4))
    pair = (get_activation("gelu"), SIN)

    def value(x, z, *numbers):
        return gated(x, z, *pair, numbers=numbers)

    assert torch.autograd.gradgradcheck(value, (x, z, *numbers))
    mapped = torch.vmap(lambda row: value(row, z, *numbers))(x)
    torch.testing.assert_close(mapped, value(x, z, *numbers))


def test_parameters_stay_float32():
    model = free(network()).to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in model[1].fitted.parameters())
    assert swap_targets(model)(X.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["matched", "loaded"])
def test_targets_that_an_optimizer_does_not_know_are_an_error(how):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrap_optimizer(optimizer, model, transfer=TransferSchedule(9))
    model(X).sum().backward()
    optimizer.step()
    matched = model if how == "matched" else network()
    match_targets(matched, [X.repeat(6, 1, 1, 1)], include="4")
    model.load_state_dict(matched.state_dict())
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"^4: .*: call match_targets or load_state_dict first"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_matched_targets_are_saved_and_loaded(tmp_path):
    model = swap_targets(free(network())).eval()
    save_gates(model, tmp_path / "gates")
    for other in (base(), free(network())):
        loaded = load_gates(other, tmp_path / "gates", example_input=X).eval()
        assert torch.equal(loaded(X), model(X))
    with pytest.raises(ValueError, match="fitted True in the file, False here"):
        load_gates(network(), tmp_path / "gates")


@pytest.mark.parametrize("first", ["optimizer", "targets"])
def test_targets_have_an_optimizer_group_without_weight_decay(first):
    model = network()
    make = lambda: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)  # noqa: E731
    if first == "optimizer":
        optimizer = make()
        free(model)
    else:
        free(model)
        optimizer = make()
    wrap_optimizer(optimizer, model, gamma=1.0)
    weights, targets, gates = optimizer.param_groups
    assert {*targets["params"]} == {p for i in (1, 4) for p in model[i].fitted.parameters()}
    assert {*gates["params"]} == {model[1].log_alpha, model[4].log_alpha}
    assert (weights["weight_decay"], targets["weight_decay"]) == (0.5, 0.0)
    assert len(weights["params"]) == 6
    model(X).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    again = wrap_optimizer(make(), model, gamma=1.0)
    again.load_state_dict(state)
    assert again.param_groups[2]["transfer_step"] == 1


@pytest.mark.parametrize("fitted", ["before the copy", "after it"])
def test_in_a_copy_that_is_wrapped_again_targets_have_a_group_without_weight_decay(fitted):
    model = network() if fitted == "after it" else free(network())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    wrap_optimizer(optimizer, model, gamma=1.0)
    model, optimizer = copy.deepcopy((model, optimizer))
    wrap_optimizer(optimizer, free(model), gamma=1.0)
    targets = {p for i in (1, 4) for p in model[i].fitted.parameters()}
    groups = {frozenset(g["params"]): g["weight_decay"] for g in optimizer.param_groups}
    assert groups.pop(frozenset(targets)) == 0
    assert frozenset({model[1].log_alpha, model[4].log_alpha}) in groups
    assert len(groups) == 2


def test_an_optimizer_that_cannot_be_wrapped_keeps_its_groups():
    model = free(network())
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(ValueError, match="scheduler was created"):
        wrap_optimizer(optimizer, model, gamma=1.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [2]
