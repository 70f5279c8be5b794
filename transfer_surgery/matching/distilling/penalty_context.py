"""range_penalty: what `distill` does against inputs out of range, for a loop of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from transfer_surgery._messages import check_arguments
from transfer_surgery.matching.distilling.polynomial_range import FittedRanges


def range_penalty(model: nn.Module) -> AbstractContextManager[Callable[[], Tensor]]:
    """Punish inputs outside of the range of polynomials, in a training loop of your own.

    Use it around the loop, and add a multiple of the penalty to the loss of each step. So it is
    right with accumulated gradients, closures and loss scaling. `distill` has it built in, 0.2
    times beside ``loss="kl"``. In training mode polynomials are constant beyond twice their range,
    so that inputs farther out have no other gradient there.

    Args:
        model: a converted model whose targets `match_targets` has fitted, polynomials among them.

    Returns:
        A context. Its value is a function, which returns a scalar for what the model has computed
        in training mode since the last call: of each example (first axis) the largest squared
        distance of an input from the range of its polynomial, in halves of it, as the mean over
        examples, summed over the sites. Channels that keep their source count as inside. A step
        that you skip needs a call, too.

    Raises:
        ValueError: the model is not converted, or has no fitted polynomials; the model raises it,
            where a polynomial runs that was not fitted.
        RuntimeError: the function raises it, where no polynomial ran since the last call, or after
            the end of the context; the model, where a polynomial is checkpointed with
            ``use_reentrant=True``, so that its inputs have no graph.

    Examples:
        >>> import torch
        >>> from transfer_surgery import convert, match_targets, swap_targets
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 4)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = match_targets(convert(model, "polynomial", example_input=x), [x])
        >>> optimizer = torch.optim.AdamW(swap_targets(model).train().parameters(), lr=0.01)
        >>> losses = []
        >>> with range_penalty(model) as penalty:
        ...     for _ in range(20):
        ...         loss = model(2 * x).square().mean() + penalty()
        ...         loss.backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        ...         losses.append(loss.item())
        >>> losses[-1] < 0.5 * losses[0]
        True
    """
    check_arguments(range_penalty, locals())
    ranges = FittedRanges(model)
    if not ranges:
        raise ValueError(
            "the model has no fitted polynomials: convert it with target='polynomial', and call "
            "match_targets."
        )
    return _penalty_of(ranges)


@contextmanager
def _penalty_of(ranges: FittedRanges) -> Iterator[Callable[[], Tensor]]:
    ended = False

    def penalty() -> Tensor:
        if ended:
            raise RuntimeError(
                "the penalty was called after the end of `with range_penalty(model)`: put the "
                "whole loop into it."
            )
        if not ranges.squares:
            raise RuntimeError(
                "no polynomial has run in training mode and with gradients since the last call of "
                f"the penalty: {ranges.why_none_ran()}"
            )
        return ranges.penalty()

    try:
        with ranges.watched():
            yield penalty
    finally:
        ended = True
