"""Linear least squares from sums of products, or from rows that are fewer than the unknowns."""

from __future__ import annotations

import torch
from torch import Tensor

from transfer_surgery.matching.ranks import over_ranks

_COLUMNS = 4096  # that are worked on in float64 at a time
_BLOCK = 128  # rows of a symmetric product that are computed at a time, up to the diagonal


class NormalEquations:
    """``min |X s - Y|^2 + sum of ridge * (s - start)^2``, with ``X`` and ``Y`` given in parts.

    Leading axes are systems of their own. Only sums of products are kept, in float64.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> equations, s = NormalEquations(), torch.randn(3, 1)
        >>> for x in torch.randn(4, 50, 3):
        ...     equations.add(x, x @ s)
        >>> torch.allclose(equations.solve(torch.zeros(3)).float(), s, atol=1e-5)
        True
    """

    def __init__(self) -> None:
        self.matrix: Tensor | float = 0.0
        self.vector: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor, constant: bool = False) -> None:
        """Count rows.

        Args:
            x: ``(..., N, features)``.
            y: ``(..., N, outputs)``.
            constant: whether there is one more feature behind the others, which is always 1.
        """
        left = x.transpose(-1, -2)
        matrix, vector = _symmetric(left, x).double(), (left @ y).double()
        if constant:  # ones beside the others would cost a copy, and lines of an odd length
            sums = x.sum(-2, keepdim=True).double()
            count = torch.full_like(sums[..., :1], x.shape[-2])
            last = torch.cat([sums.transpose(-1, -2), count], -2)
            matrix = torch.cat([torch.cat([matrix, sums], -2), last], -1)
            vector = torch.cat([vector, y.sum(-2, keepdim=True).double()], -2)
        self.matrix, self.vector = self.matrix + matrix, self.vector + vector

    def add_joined(self, rows: Tensor, weights: Tensor | None = None) -> None:
        """Count rows of few features, each with its one output behind them.

        Args:
            rows: ``(..., N, features + 1)``.
            weights: of the squared errors, ``(..., N)``.
        """
        weighted = rows if weights is None else rows * weights[..., None]
        products = (weighted.transpose(-1, -2) @ rows).double()[..., :-1, :]
        self.matrix = self.matrix + products[..., :-1]
        self.vector = self.vector + products[..., -1:]

    def add_over_ranks(self) -> None:
        """Count the rows of all ranks."""
        sums = [torch.as_tensor(self.matrix), torch.as_tensor(self.vector)]
        self.matrix, self.vector = over_ranks(sums)

    def plus(self, other: NormalEquations) -> NormalEquations:
        """The equations of the rows of both."""
        both = NormalEquations()
        both.matrix, both.vector = self.matrix + other.matrix, self.vector + other.vector
        return both

    def diagonal(self) -> Tensor:
        """Sums of squares of the features, ``(..., features)``."""
        return torch.as_tensor(self.matrix).diagonal(dim1=-2, dim2=-1)

    def solve(self, ridge: Tensor, start: Tensor | float = 0.0) -> Tensor:
        """The best coefficients, ``(..., features, outputs)``, in float64.

        Args:
            ridge: ``(..., features)``.
            start: what the ridge pulls the coefficients to.
        """
        pull = ridge.double()
        found: Tensor = torch.linalg.solve(
            self.matrix + torch.diag_embed(pull), self.vector + pull[..., None] * start
        )
        return found

    def explained(self, solution: Tensor) -> Tensor:
        """By how much a solution reduces the sum of squares of each system and output."""
        matrix, vector = torch.as_tensor(self.matrix), torch.as_tensor(self.vector)
        return (2 * solution * vector - solution * (matrix @ solution)).sum(-2)


def solve_few_rows(x: Tensor, y: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    """The same solution from rows that are fewer than the features, by a system of their number.

    Args:
        x: ``(systems, N, features)``.
        y: ``(systems, N, outputs)``.
        ridge: ``(systems,)``, above 0.
        start: what the ridge pulls to, ``(systems, features, outputs)`` in float64.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x, y, start = torch.randn(1, 5, 9), torch.randn(1, 5, 2), torch.randn(1, 9, 2).double()
        >>> equations = NormalEquations()
        >>> equations.add(x, y)
        >>> expected = equations.solve(torch.full((1, 9), 0.5), start)
        >>> torch.allclose(solve_few_rows(x, y, torch.tensor([0.5]), start), expected, atol=1e-5)
        True
    """
    kernel = torch.zeros(*x.shape[:2], x.shape[1], dtype=torch.float64, device=x.device)
    left, parts = y.double(), torch.split(x, _COLUMNS, 2)
    for part, old in zip(parts, torch.split(start, _COLUMNS, 1), strict=True):
        wide = part.double()
        kernel += _symmetric(wide, wide.transpose(1, 2))
        left = left - wide @ old
    pull = torch.diag_embed(ridge.double()[:, None].expand(kernel.shape[:2]))
    multipliers = torch.linalg.solve(kernel + pull, left)
    moves = [part.double().transpose(1, 2) @ multipliers for part in parts]
    return start + torch.cat(moves, 1)


def _symmetric(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where that is symmetric: half of it is computed."""
    size = right.shape[-1]
    found = right.new_empty(*right.shape[:-2], size, size)
    for start in range(0, size, _BLOCK):
        part, rest = slice(start, start + _BLOCK), slice(start, None)
        found[..., part, rest] = products = left[..., part, :] @ right[..., rest]
        found[..., rest, part] = products.transpose(-1, -2)
    return found
