"""Baked networks with matched targets, whose numbers `fold_targets` may move; for tests."""

import torch
from torch import nn

from transfer_surgery import bake, convert, fold_targets, match_targets, swap_targets
from transfer_surgery.units import FittedActivation


def matched(model: nn.Module, x: torch.Tensor, target: str = "sin", **options) -> nn.Module:
    """A baked model whose matched targets have numbers far from 1, 1, 0, 0."""
    units = convert(model.eval(), target, example_input=x, **options)
    match_targets(units, [x])
    bake(swap_targets(model))
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, FittedActivation):
            for parameter in module.parameters(recurse=False):
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def folded(model: nn.Module, x: torch.Tensor, share: float = 1e-4) -> list[tuple[str, str, str]]:
    """What went where; outputs are compared in evaluation mode."""
    model.eval()
    with torch.no_grad():
        before = model(x)
        report = fold_targets(model, x[:2])
        torch.testing.assert_close(model(x), before, rtol=0, atol=share * before.abs().max())
    return [(row.before, row.after, row.left) for row in report.rows]


IMAGES = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def images(*behind: nn.Module, before: tuple[nn.Module, ...] = ()) -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Conv2d(4, 6, 3, padding=1)
    layers = [first, *before, nn.ReLU(), *behind, nn.Flatten(), nn.LazyLinear(3)]
    model = nn.Sequential(*layers)
    model(IMAGES)
    return model
