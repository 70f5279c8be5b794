"""Tools that train, shrink, move or average a network."""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

from tool_checks.comparing import expect_equal, layers_of, one_step
from tool_checks.networks import Case


def cpu_offload(case: Case) -> None:
    import accelerate

    expected = case.reference(case.images)
    network = accelerate.cpu_offload(case.network, torch.device("cpu"))
    if not any(p.is_meta for p in network.parameters()):
        raise AssertionError("nothing was offloaded")
    expect_equal(network(case.images), expected)


def disk_offload(case: Case) -> None:
    import accelerate

    expected = case.reference(case.images)
    with tempfile.TemporaryDirectory() as folder:
        network = accelerate.disk_offload(case.network, folder, torch.device("cpu"))
        expect_equal(network(case.images), expected)


def per_sample_gradients(case: Case) -> None:
    """By opacus, beside one backward pass per example."""
    from opacus import GradSampleModule

    network = GradSampleModule(case.network.train(), loss_reduction="sum")
    network(case.images).square().sum().backward()
    for i, image in enumerate(case.images):
        case.reference.zero_grad()
        case.reference(image[None]).square().sum().backward()
        for one, other in zip(layers_of(case.network), layers_of(case.reference), strict=True):
            expect_equal(one.weight.grad_sample[i], other.weight.grad)


def lora(case: Case) -> None:
    from peft import LoraConfig, get_peft_model

    answers = []
    for one in (case.network, case.reference):
        torch.manual_seed(0)
        adapted = get_peft_model(one, LoraConfig(target_modules=["conv2", "linear1"]))
        one_step(adapted, case.images)
        answers.append(adapted(case.images))
    expect_equal(*answers)


def pruning(case: Case) -> None:
    """Half of the channels, beside the reference in which nothing reads these channels."""
    import torch_pruning

    before = copy.deepcopy(case.network)
    pruner = torch_pruning.pruner.MetaPruner(
        case.network,
        case.images,
        importance=torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[case.network.head],
    )
    pruner.step()
    reference = case.reference
    readers = {"conv1": "conv2", "conv2": "linear1", "linear1": "head"}
    for name, reader in readers.items():
        gone = _gone(before.get_submodule(name), case.network.get_submodule(name))
        weight = reference.get_submodule(reader).weight.data
        weight.unflatten(1, (gone.numel(), -1))[:, gone] = 0
    expect_equal(case.network(case.images), reference(case.images))


def _gone(before: nn.Module, after: nn.Module) -> torch.Tensor:
    """Which output channels of a layer a pruner took away, by their biases."""
    gone = ~torch.isin(before.bias, after.bias)
    if after.bias.numel() != before.bias.numel() // 2:
        raise AssertionError(f"{after.bias.numel()} of {before.bias.numel()} channels are left")
    return gone


def moving_average(case: Case) -> None:
    """After two steps, as `torch.optim.swa_utils` averages them."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    answers = []
    for one in (case.network, case.reference):
        average = AveragedModel(one, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for _ in range(2):
            one_step(one, case.images)
            average.update_parameters(one)
        answers.append(average(case.images))
    expect_equal(*answers)
