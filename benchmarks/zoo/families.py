"""The stratified sample for CI: of each family the model with the fewest parameters.

    python -m zoo.families > families.txt

takes some minutes for all models, hence the file. Families that only wrap models of another one
(quantized) or differ by a head (detection) are families of their own: other code runs in them.
"""

from __future__ import annotations

import sys
import warnings

from zoo.models import count_parameters, family_of, model_names

SAMPLED = ("timm", "torchvision")


def smallest(names: list[str]) -> list[str]:
    """The smallest model of each family, sorted by name."""
    found: dict[str, tuple[int, str]] = {}
    for name in names:
        print(f"\r{name:60}", end="", file=sys.stderr)
        size = count_parameters(name), name
        family = family_of(name)
        found[family] = min(found.get(family, size), size)
    return sorted(name for _, name in found.values())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print("\n".join(smallest(model_names(SAMPLED))))
