"""What compilers of encrypted computing get: a graph of sums and products, and coefficients."""

import json
from contextlib import nullcontext

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import nn

from transfer_surgery import (
    bake,
    convert,
    export_onnx,
    fold_targets,
    match_targets,
    save_polynomials,
    swap_targets,
)
from transfer_surgery.files.polynomial_graph import check_polynomial
from transfer_surgery.units import FittedActivation

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(pool: type[nn.Module] = nn.AvgPool2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), pool(2)),
        *(nn.Conv2d(4, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, 6), nn.Tanh()),
        nn.Linear(6, 2),
    ).eval()


class Rounded(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.half().int().float()


def polynomial(model: nn.Module, fold: bool = False, granularity: str = "channel") -> nn.Module:
    convert(model, "polynomial(degree=3)", example_input=X, granularity=granularity)
    match_targets(model, [X])
    bake(swap_targets(model))
    if fold:
        fold_targets(model, X)
    return model


@pytest.mark.parametrize("fold", [False, True])
def test_the_activations_of_an_onnx_file_are_sums_and_products(fold, tmp_path):
    model = polynomial(network(), fold)
    export_onnx(model, X, tmp_path / "model.onnx", polynomial=True)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    layers = {"Conv", "AveragePool", "Reshape", "Gemm"}
    assert {node.op_type for node in nodes} == {"Add", "Mul"} | layers


class LinearOnes(nn.Module):
    """Linear operations of decoders, whose nodes are neither sums nor products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.pixel_unshuffle(F.interpolate(F.pixel_shuffle(F.pad(x, (1,) * 4), 2), size=10), 2)
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, -x)
        x = x.scatter_add(3, torch.zeros_like(x).long(), x).clone()
        x[:, :, torch.tensor([1, 3])] = 2.0
        return x.cumsum(-1).tril()


def test_a_product_of_many_values_is_a_polynomial(tmp_path):
    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.prod(-1)

    export_onnx(Many(), X, tmp_path / "model.onnx", polynomial=True)
    found = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "ReduceProd" in found


def test_linear_nodes_of_all_kinds_are_polynomials(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LinearOnes()).eval()
    export_onnx(model, X, tmp_path / "model.onnx", polynomial=True)
    found = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert {"Resize", "DepthToSpace", "CumSum", "Where", "Trilu"} <= found
    assert {"ScatterElements", "ScatterND"} <= found


class Branches(nn.Module):
    """A branch reads the input by itself: the node has a constant alone as its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.shape[0] > 3, lambda t: t.relu(), lambda t: t.sin(), (x,))


class Scattered(nn.Module):
    """Where a value goes depends on the input, or which of two values stays."""

    def __init__(self, reduce: str, fixed: bool) -> None:
        super().__init__()
        self.reduce, self.fixed = reduce, fixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.zeros(64, 3, 8, 8).long() if self.fixed else (x > 9).long()
        return x.scatter_reduce(3, index, x, self.reduce)


class Chosen(nn.Module):
    """What is chosen depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, -x)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: polynomial(network(nn.MaxPool2d)), r"1 nodes .* \(MaxPool\)"),
        (network, r"3 nodes .* \(Relu\), .* \(Gelu\), .* \(Tanh\)"),
        (lambda: nn.Sequential(nn.Linear(8, 2), nn.LayerNorm(2)), r"\(LayerNormalization\)"),
        (Rounded, r"1 nodes .* \(Cast\)"),
        (Branches, r"1 nodes .* \(If\)"),
        (lambda: Scattered("amax", fixed=True), r"1 nodes .* \(ScatterElements\)"),
        (lambda: Scattered("sum", fixed=False), r"\(ScatterElements\)"),
        (Chosen, r"2 nodes .* \(Greater\), .* \(Where\)"),
    ],
)
def test_a_graph_with_other_nodes_is_refused_and_nothing_is_written(make, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        export_onnx(make(), X, tmp_path / "model.onnx", polynomial=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "domain", "numbers", "refused"),
    [
        ("Add", "", TensorProto.FLOAT, False),
        ("Add", "my.domain", TensorProto.FLOAT, True),  # there it may be anything
        ("Mul", "", TensorProto.FLOAT, False),
        ("Div", "", TensorProto.FLOAT, True),
        ("Pow", "", TensorProto.FLOAT, True),
        ("Expand", "", TensorProto.INT64, True),  # the shape comes from the input
    ],
)
def test_a_node_of_two_inputs_is_a_polynomial_of_both_or_refused(kind, domain, numbers, refused):
    given = [
        onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        onnx.helper.make_tensor_value_info("y", numbers, [4]),
    ]
    result = onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, None)
    node = onnx.helper.make_node(kind, ["x", "y"], ["z"], domain=domain)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "one", given, [result]))
    with pytest.raises(ValueError, match=kind) if refused else nullcontext():
        check_polynomial(ir.from_proto(model).graph)


@pytest.mark.parametrize(("exponent", "refused"), [(3.0, False), (0.5, True), (np.inf, True)])
def test_a_power_has_to_be_a_whole_number(exponent, refused, tmp_path):
    class Power(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x**exponent

    with pytest.raises(ValueError, match="no polynomials") if refused else nullcontext():
        export_onnx(Power(), X, tmp_path / "model.onnx", polynomial=True)


@pytest.mark.parametrize(
    ("fold", "granularity"),
    [(False, "layer"), (False, "neuron"), (True, "channel"), (True, "layer")],
)
def test_numpy_computes_what_torch_does_from_the_coefficients(fold, granularity, tmp_path):
    model = polynomial(network(), fold, granularity).double()
    save_polynomials(model, tmp_path / "polynomials.json")
    sites = json.loads((tmp_path / "polynomials.json").read_text())["sites"]
    assert list(sites) == ["2", "5", "8"]
    seen = {}
    for path, module in model.named_children():
        module.register_forward_hook(
            lambda _, args, y, path=path: seen.update({path: (args[0].numpy(), y.numpy())})
        )
    with torch.no_grad():
        model(X.double())
    for path, site in sites.items():
        x, y = seen[path]
        shape = (*site["shape"], *[1] * site["trailing"])
        k = np.array(site["coefficients"]).T.reshape(-1, *shape)
        found = sum(one * x**power for power, one in enumerate(k))
        np.testing.assert_allclose(found, y, rtol=0, atol=1e-12 * np.abs(y).max())


def test_the_file_says_which_gates_keep_their_source(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), X[:, 0, 0]
    match_targets(convert(model, "polynomial", example_input=x), [x])
    bake(swap_targets(model, keep=2, batches=[x])).double()
    save_polynomials(model, tmp_path / "polynomials.json")
    ((path, site),) = json.loads((tmp_path / "polynomials.json").read_text())["sites"].items()
    assert (path, sum(site["gates"])) == ("1.target", 2)
    h = model[0](x.double()).detach().numpy()
    k, z = np.array(site["coefficients"]).T, np.array(site["gates"])
    y = z * np.maximum(h, 0) + (1 - z) * (k[0] + k[1] * h + k[2] * h**2)
    np.testing.assert_allclose(y, model[:2](x.double()).detach(), atol=1e-12)


def test_polynomials_of_two_conversions_of_a_site_say_how_they_combine(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), X[:, 0, 0]
    for degree, keep in ((3, 4), (2, 2), (4, None)):
        match_targets(convert(model, f"polynomial(degree={degree})", example_input=x), [x])
        swap_targets(model, keep=keep, batches=None if keep is None else [x])
        bake(model)
    model.double()
    save_polynomials(model, tmp_path / "polynomials.json")
    sites = json.loads((tmp_path / "polynomials.json").read_text())["sites"]
    assert {path: site["degree"] for path, site in sites.items()} == {
        "1.source.source": 4, "1.source.target": 2, "1.target": 3
    }  # fmt: skip
    assert [sum(site["gates"]) for site in sites.values()] == [4, 4, 4]
    h = model[0](x.double()).detach().numpy()
    y = 0
    for site in sites.values():
        values = sum(k * h**power for power, k in enumerate(np.array(site["coefficients"]).T))
        y = y + (1 - np.array(site["gates"])) * values
    np.testing.assert_allclose(y, model[:2](x.double()).detach(), atol=1e-12)
    with pytest.raises(ValueError, match=r"^1, 1.source: each of these sites chooses between two"):
        export_onnx(model, x.double(), tmp_path / "model.onnx", polynomial=True)
    model[1].z = torch.ones(3)
    with pytest.raises(
        ValueError, match=r"^1.source: it was converted twice, .* \(6,\) and \(3,\)"
    ):
        save_polynomials(model, tmp_path / "polynomials.json")


def test_gates_of_two_kinds_at_one_site_are_refused(tmp_path):
    model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), X[:, 0, 0]
    for granularity, keep in (("channel", 3), ("layer", None)):
        convert(model, "polynomial", example_input=x, granularity=granularity)
        match_targets(model, [x])
        bake(swap_targets(model, keep=keep, batches=None if keep is None else [x]))
    with pytest.raises(
        ValueError, match=r"^1.source: it was converted twice, .* \(6,\) and \(1,\)"
    ):
        save_polynomials(model, tmp_path / "polynomials.json")


def test_coefficients_of_the_scaled_input_are_exact_far_from_0(tmp_path):
    layers = [nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2)]
    model, x = nn.Sequential(*layers).eval(), X[:, 0, 0]
    model[0].weight.data *= 0.1
    model[0].bias.data += 300
    match_targets(convert(model, "polynomial(degree=4)", example_input=x), [x])
    bake(swap_targets(model)).double()
    save_polynomials(model, tmp_path / "polynomials.json")
    site = json.loads((tmp_path / "polynomials.json").read_text())["sites"]["1"]
    h = model[0](x.double()).detach().numpy()
    v = h * np.array(site["scale"]) + np.array(site["shift"])
    y = sum(k * v**power for power, k in enumerate(np.array(site["scaled_coefficients"]).T))
    np.testing.assert_allclose(y, model[:2](x.double()).detach(), rtol=1e-12)


def test_bfloat16_and_an_example_of_another_width_are_refused(tmp_path):
    model = polynomial(network())
    with pytest.raises(ValueError, match=r"does not run on example_input: float32 \(2, 4, 8, 8\)"):
        export_onnx(model, torch.zeros(2, 4, 8, 8), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"bfloat16 .* call model.float\(\), and give"):
        export_onnx(model.bfloat16(), X.bfloat16(), tmp_path / "model.onnx", polynomial=True)
    assert not any(tmp_path.iterdir())


def test_the_range_is_that_of_the_inputs_of_the_fit(tmp_path):
    model = network()
    with torch.no_grad():
        x = model[:2](X).transpose(0, 1).flatten(1)
    save_polynomials(polynomial(model), tmp_path / "polynomials.json")
    found = json.loads((tmp_path / "polynomials.json").read_text())["sites"]["2"]["range"]
    torch.testing.assert_close(torch.tensor(found), torch.stack(x.aminmax(dim=1), 1))


def test_coefficients_may_be_as_large_as_float64_holds(tmp_path):
    model = polynomial(network()).double()
    fitted = next(m for m in model.modules() if isinstance(m, FittedActivation))
    fitted.w.data *= 1e20  # in float32, as its coefficients are
    save_polynomials(model, tmp_path / "polynomials.json")
    found = json.loads((tmp_path / "polynomials.json").read_text())["sites"]["2"]["coefficients"]
    assert np.abs(found).max() > 1e50 > torch.finfo(torch.float32).max


def test_only_fitted_polynomials_and_files_of_them_are_written(tmp_path):
    file = tmp_path / "polynomials.json"
    with pytest.raises(ValueError, match="no fitted polynomials: convert it"):
        save_polynomials(network(), file)
    model = network()
    convert(model, "polynomial", example_input=X)
    match_targets(model, [X], include="2")
    with pytest.raises(ValueError, match=r"^5: this polynomial was not fitted, so that"):
        save_polynomials(bake(swap_targets(model)), file)
    model = polynomial(network())
    file.write_text('{"kind": "other"}')
    with pytest.raises(ValueError, match="no polynomials of this library"):
        save_polynomials(model, file)
    file.write_text("")
    save_polynomials(model, file)
    save_polynomials(model, file)
    next(m for m in model.modules() if isinstance(m, FittedActivation)).w.data[0] = 0
    with pytest.raises(ValueError, match=r"^2: a coefficient, or an end of the range, is not fin"):
        save_polynomials(model, file)
