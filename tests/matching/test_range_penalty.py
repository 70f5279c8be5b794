"""range_penalty: the penalty on inputs outside of the range, in loops of the user's own."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from transfer_surgery import bake, convert, distill, match_targets, range_penalty, swap_targets
from transfer_surgery.units import gated_activations

X = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))


def network(target: str = "polynomial(degree=3)") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    match_targets(convert(model, target, example_input=X), [X])
    return swap_targets(model).double().train()


def expected_penalty(model: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The definition, by plain code."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in model:
        if hasattr(layer, "fitted"):
            v = x * layer.fitted.w.double() + layer.fitted.c.double()
            z = layer.gate.predict().detach()
            way = torch.where(z == 1, 0.0, (v.abs() - 1).clamp_min(0))
            total = total + (way.max(1).values ** 2).mean()
        x = layer(x)
    return total


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trained, materialize_grads=True))


def test_the_penalty_and_its_gradient_are_those_of_the_definition():
    model, x = network(), 3 * X.double()
    model[1].log_alpha.data[:4] = 9.0  # these keep their source
    expected = expected_penalty(model, x)
    assert expected > 0.01
    with range_penalty(model) as penalty:
        model(x)
        found = penalty()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, model), gradients(expected, model))


def test_one_pixel_far_outside_counts_alike_in_small_and_large_images():
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU())
    torch.manual_seed(0)
    images = torch.rand(4, 1, 32, 32)
    match_targets(convert(model, "polynomial", example_input=images), [images])
    swap_targets(model).train()
    penalties = []
    for size in (8, 32):
        x = images[..., :size, :size].clone()
        x[2, 0, 3, 4] = 9.0
        with range_penalty(model) as penalty:
            model(x)
            penalties.append(penalty().item())
    assert penalties[0] == pytest.approx(penalties[1])
    assert penalties[0] > 1


@pytest.mark.filterwarnings("ignore::transfer_surgery.MatchWarning")  # six examples
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 7), (6, 5, 4, 3), (6, 5, 2, 4, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_furthest_input_is_found_in_whatever_order_the_memory_has(shape, channels_last):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    model = nn.Sequential(nn.ReLU()).double()
    match_targets(convert(model, "polynomial", example_input=x), [x])
    unit = swap_targets(model).train()[0]
    x = (2 * x).requires_grad_()
    with range_penalty(model) as penalty:
        model(x)
        found = penalty()
    _, w, c, *_ = unit.fitted.expand(x)
    expected = ((w * x + c).abs().flatten(1).amax(1) - 1).clamp_min(0).square().mean()
    torch.testing.assert_close(found, expected)
    given = [torch.autograd.grad(value, x)[0] for value in (found, expected)]
    torch.testing.assert_close(*given)


def test_only_what_is_trained_since_the_last_call_counts():
    model, x = network(), 3 * X.double()
    first, second = expected_penalty(model, x), expected_penalty(model, 2 * x)
    with range_penalty(model) as penalty:
        model.eval()(9 * x)
        with pytest.raises(
            RuntimeError, match=r"are in evaluation mode: call model.train\(\), then"
        ):
            penalty()
        model.train()
        with torch.no_grad():
            model(9 * x)
        with pytest.raises(
            RuntimeError, match=r"call the model, then .* without torch.no_grad\(\)"
        ):
            penalty()
        model(x)
        assert penalty().item() == pytest.approx(first.item())
        for part in (x, 2 * x):
            model(part)
        assert penalty().item() == pytest.approx((first + second).item() / 2)
    assert not any(unit.watchers for _, unit in gated_activations(model))
    with pytest.raises(KeyError), range_penalty(model) as penalty:
        raise KeyError
    with pytest.raises(RuntimeError, match="after the end of `with range_penalty"):
        penalty()


def test_gradient_checkpointing_changes_nothing():
    model, x, found = network(), 3 * X.double(), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        with range_penalty(model) as penalty:
            for _ in range(2):  # what the backward pass computes again is not counted in the second
                (run(x).square().mean() + penalty()).backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_model_that_is_compiled_inside_is_punished_as_any_other(dynamic):
    model = network()
    with range_penalty(model) as penalty:
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
        for size in (64, 32, 16):
            x = 3 * X[:size].double()
            with torch.no_grad():  # such runs do not count
                expected = expected_penalty(model, x)
            compiled(x)
            torch.testing.assert_close(penalty().detach(), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of torch's compiler
@pytest.mark.parametrize("part", ["", "3"])
def test_what_was_compiled_before_the_context_is_counted_in_it_and_not_after(part):
    model, x = network(), 3 * X.double()
    model.get_submodule(part).compile(backend="eager")
    model(x)
    expected = expected_penalty(model, x)
    for _ in range(2):
        with range_penalty(model) as penalty:
            model(x)
            torch.testing.assert_close(penalty(), expected)
        model(x)


def test_inputs_that_reentrant_checkpointing_hides_are_refused():
    model, x = network(), 3 * X.double()
    with range_penalty(model) as penalty:
        (model(x).square().mean() + penalty()).backward()  # an earlier step may have been right
        with pytest.raises(RuntimeError, match=r"^3 runs inside of an autograd.Function, .*=False"):
            checkpoint(model[2:], model[:2](x), use_reentrant=True)


def test_a_look_without_gradients_before_the_backward_pass_changes_nothing():
    model, x = network(), 3 * X.double()
    with range_penalty(model) as penalty:
        loss = checkpoint(model, x, use_reentrant=False).square().mean() + penalty()
        with torch.no_grad():
            model(x)
        loss.backward()


def test_copies_files_and_what_is_baked_inside_of_the_context_are_not_watched():
    model, x = network(), 3 * X.double()
    expected = expected_penalty(model, x)
    with range_penalty(model) as penalty:
        other = copy.deepcopy(model)
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        model(x)
        other(9 * x)
        loaded(9 * x)
        torch.testing.assert_close(penalty(), expected)
        answers = [bake(network.eval())(x) for network in (other, loaded, model)]
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])
        with pytest.raises(RuntimeError, match="bake or revert has taken them out of the model"):
            penalty()


@pytest.mark.filterwarnings("ignore::transfer_surgery.DistillWarning")
def test_what_distill_does_inside_of_the_context_does_not_count_there():
    model, x = network(), 3 * X.double()
    teacher = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)).double()
    with range_penalty(model) as penalty:
        distill(model, teacher, x.split(64), steps=2)
        model(x)
        loss = penalty()
        torch.testing.assert_close(loss, expected_penalty(model, x))
        loss.backward()


def test_ranges_stay_also_where_all_parameters_are_to_be_trained():
    model, x = network(), 3 * X.double()
    model.requires_grad_(True)
    before = [
        number.clone() for unit in (model[1], model[3]) for number in unit.fitted.whole()[1:3]
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    with range_penalty(model) as penalty:
        for _ in range(3):
            (model(x).square().mean() + penalty()).backward()
            optimizer.step()
    after = [number for unit in (model[1], model[3]) for number in unit.fitted.whole()[1:3]]
    assert all(map(torch.equal, before, after))


def test_models_without_fitted_polynomials_are_refused():
    plain = convert(nn.Sequential(nn.ReLU()), "polynomial", example_input=X)
    for model in (network("sin"), plain):
        with pytest.raises(ValueError, match="no fitted polynomials: convert it with target"):
            range_penalty(model)
