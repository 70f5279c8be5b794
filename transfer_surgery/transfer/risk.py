"""The structural risk, Eq. 13 and 14: the expected number of gates that are not yet at 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from transfer_surgery.units import Gate, GatedActivation, gated_activations, probability_of

REDUCTIONS = ("sum", "mean", "neurons")


def structural_risk(model: nn.Module, reduction: str = "sum") -> Tensor:
    """Structural risk of a converted model, without its weight gamma.

    Training with `wrap_optimizer(..., gamma=...)` adds its gradient already. This function is for
    logging, and for loops that would rather add ``gamma * structural_risk(model)`` to their loss.

    Args:
        model: a converted model.
        reduction: ``"sum"`` over the gates: added to a mean loss, it moves each gate at a speed
            that does not depend on the size of the network; ``"mean"`` over the gates;
            ``"neurons"``: each gate counts for the neurons that share it, the literal Eq. 8.

    Returns:
        A differentiable float32 scalar, on the device of the first gate.

    Raises:
        ValueError: the model is not converted, or the reduction is unknown.

    Source:
        Eq. 13: the sum; Eq. 14: ``P(z != 0) = sigmoid(log_alpha - temperature * log(-xi / zeta))``.

    Examples:
        >>> from transfer_surgery import convert
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> model = convert(network, example_input=torch.zeros(1, 3, 12, 12))
        >>> risks = [structural_risk(model, r) for r in ("sum", "mean", "neurons")]
        >>> [round(risk.item()) for risk in risks]
        [4, 1, 400]
    """
    return risk_of([unit for _, unit in gated_activations(model)], reduction)


def risk_of(units: Sequence[GatedActivation], reduction: str) -> Tensor:
    """`structural_risk` of the given units, at least one."""
    terms = _terms(units, _weights(units, reduction))
    return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def add_risk_gradient(
    units: Sequence[GatedActivation],
    gamma: float | Tensor,
    reduction: str,
    scale: Tensor | None = None,
) -> None:
    """Add the gradient of ``gamma * structural_risk`` to the ``.grad`` of the gates.

    Args:
        units: all units of the model; gates without parameters and frozen ones are left alone.
        gamma: the weight of the risk.
        reduction: as in `structural_risk`.
        scale: a GradScaler's loss scale, where the gradients are still scaled.
    """
    learned = [
        (unit, weight)
        for unit, weight in zip(units, _weights(units, reduction), strict=True)
        if unit.gate.learned and unit.log_alpha.requires_grad
    ]
    if not learned:
        return
    log_alphas = [unit.log_alpha for unit, _ in learned]
    # After backward(create_graph=True) the optimizer differentiates the gradient (AdaHessian).
    again = any(p.grad is not None and p.grad.requires_grad for p in log_alphas)
    with torch.enable_grad():
        terms = _terms(*zip(*learned, strict=True))
    scaled = gamma if scale is None else gamma * scale
    # A number is written on the device: to copy it there would wait for the device.
    factors = [
        scaled.to(term) if isinstance(scaled, Tensor) else torch.full_like(term, scaled)
        for term in terms
    ]
    # Not torch.autograd.backward, which would run the hooks that DDP has on the parameters.
    slopes = torch.autograd.grad(terms, log_alphas, factors, create_graph=again)
    for log_alpha, slope in zip(log_alphas, slopes, strict=True):
        if log_alpha.grad is None:
            log_alpha.grad = slope
        elif again:
            with torch.enable_grad():
                log_alpha.grad = log_alpha.grad + slope
        else:
            log_alpha.grad.add_(slope)


def check_reduction(reduction: str) -> None:
    """Raise ValueError where the reduction is unknown."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; use one of {', '.join(REDUCTIONS)}.")


def _weights(units: Sequence[GatedActivation], reduction: str) -> list[float]:
    """What one gate of each unit counts for."""
    check_reduction(reduction)
    gates = [unit.gate.count for unit in units]
    if reduction == "mean":
        return [1 / sum(gates)] * len(units)
    if reduction == "neurons":
        return [unit.neurons / count for unit, count in zip(units, gates, strict=True)]
    return [1.0] * len(units)


def _terms(units: Sequence[GatedActivation], weights: Sequence[float]) -> list[Tensor]:
    """Scalars that add up to the risk: few for a whole network, so that it takes few launches."""
    together: dict[tuple[torch.device, float], list[Tensor]] = {}
    terms = []
    for unit, weight in zip(units, weights, strict=True):
        gate = unit.gate
        if gate.learned and type(gate).probability is Gate.probability:
            logit = gate.logit().flatten()
            together.setdefault((logit.device, weight), []).append(logit)
        else:
            terms.append(weight * gate.probability().sum())
    for (_, weight), logits in together.items():
        terms.append(weight * probability_of(torch.cat(logits)).sum())
    return terms
