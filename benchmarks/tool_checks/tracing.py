"""Tools that read a network: tracers, other formats, counters, attributions, replicas."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, fx

from tool_checks.comparing import expect_equal, layers_of
from tool_checks.networks import Case


def fx_trace(case: Case) -> None:
    """Traced in both modes."""
    for training in (False, True):
        traced = fx.symbolic_trace(case.network.train(training))
        expect_equal(traced(case.images), case.reference(case.images))


def feature_extraction(case: Case) -> None:
    """The second activation, by torchvision."""
    from torchvision.models.feature_extraction import create_feature_extractor

    network, reference = (
        create_feature_extractor(one, {"conv2": "before", "pool": "after"})
        for one in (case.network, case.reference)
    )
    found, expected = network(case.images), reference(case.images)
    for name in ("before", "after"):
        expect_equal(found[name], expected[name])


def script(case: Case) -> None:
    scripted = torch.jit.script(case.network)
    expect_equal(scripted(case.images[:3]), case.reference(case.images[:3]))


def trace(case: Case) -> None:
    traced = torch.jit.trace(case.network, case.images)
    expect_equal(traced(case.images[:3]), case.reference(case.images[:3]))


def export(case: Case) -> None:
    """With a batch of any size."""
    sizes = {"x": {0: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(case.network, (case.images,), dynamic_shapes=sizes)
    expect_equal(program.module()(case.images[:3]), case.reference(case.images[:3]))


def integrated_gradients(case: Case) -> None:
    from captum.attr import IntegratedGradients

    found, expected = (
        IntegratedGradients(one).attribute(case.images, target=0)
        for one in (case.network, case.reference)
    )
    expect_equal(found, expected)


def deep_lift(case: Case) -> None:
    """With the rule for activations that its table of rules lacks, for both networks."""
    from captum.attr import DeepLift
    from captum.attr._core import deep_lift

    kinds = {
        type(module)
        for one in (case.network, case.reference)
        for name, module in one.named_children()
        if name.startswith("act")
    }
    rules = deep_lift.SUPPORTED_NON_LINEAR
    for kind in kinds:
        rules[kind] = deep_lift.nonlinear
    try:
        found, rest = DeepLift(case.network).attribute(
            case.images, target=0, return_convergence_delta=True
        )
        expected = DeepLift(case.reference).attribute(case.images, target=0)
    finally:
        for kind in kinds:
            del rules[kind]
    expect_equal(found, expected, 1e-3)
    expect_equal(1 + rest, torch.ones_like(rest), 1e-3)  # the sum of the attributions is the answer


def fvcore_counts(case: Case) -> None:
    from fvcore.nn import FlopCountAnalysis

    found, expected = (
        FlopCountAnalysis(one, case.images)
        .unsupported_ops_warnings(False)
        .uncalled_modules_warnings(False)
        .by_operator()
        for one in (case.network, case.reference)
    )
    expect_equal(_counts(found, "conv", "linear"), _counts(expected, "conv", "linear"), 0)


def torchinfo_counts(case: Case) -> None:
    from torchinfo import summary

    found, expected = (
        {
            row.var_name: row.macs
            for row in summary(one, input_data=case.images, verbose=0).summary_list
        }
        for one in (case.network, case.reference)
    )
    names = [name for name, m in case.reference.named_modules() if m in layers_of(case.reference)]
    expect_equal(_counts(found, *names), _counts(expected, *names), 0)


def _counts(found: dict[str, int], *names: str) -> Tensor:
    return torch.tensor([float(found[name]) for name in names])


def replicas(case: Case) -> None:
    """What DataParallel makes for each device, here on the CPU."""
    replicate = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices]

    broadcast = replicate._broadcast_coalesced_reshape
    replicate._broadcast_coalesced_reshape = copies
    try:
        made = replicate.replicate(case.network, [0, 1])  # numbers of devices
    finally:
        replicate._broadcast_coalesced_reshape = broadcast
    for part, replica in zip(case.images.chunk(2), made, strict=True):
        expect_equal(replica(part), case.reference(part))
    # Gradients reach the parameters of the network itself.
    made[0](case.images).square().mean().backward()
    case.reference(case.images).square().mean().backward()
    for one, other in zip(layers_of(case.network), layers_of(case.reference), strict=True):
        expect_equal(one.weight.grad, other.weight.grad)
