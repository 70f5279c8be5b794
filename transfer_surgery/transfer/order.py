"""Which sites go together, and in which order: `TransferSchedule(order=...)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transfer_surgery.units import GatedActivation, matches_glob

Sites = Mapping[str, GatedActivation]


def in_order(sites: Sites, order: str | Sequence[str]) -> list[list[GatedActivation]]:
    """Groups of units in the order in which they are to be transferred.

    Args:
        sites: the units of a model, by their paths.
        order: as in `TransferSchedule`.

    Raises:
        ValueError: a glob matches no site that an earlier one left, or a site matches none.
    """
    if not isinstance(order, str):
        return _by_globs(sites, order)
    # A model may hold several converted ones, which go in the order of its modules.
    roots = {path: path.removesuffix(unit.path) for path, unit in sites.items()}
    place = {root: number for number, root in enumerate(dict.fromkeys(roots.values()))}
    paths = sorted(sites, key=lambda path: (place[roots[path]], sites[path].position))
    units = [sites[path] for path in paths]
    if order == "joint":
        return [units]
    stages: dict[tuple[str, str], list[GatedActivation]] = {}
    for path in paths:
        stages.setdefault((roots[path], sites[path].stage), []).append(sites[path])
    groups = list(stages.values()) if len(stages) > 1 else [[unit] for unit in units]
    return groups if order == "front_to_back" else groups[::-1]


def _by_globs(sites: Sites, globs: Sequence[str]) -> list[list[GatedActivation]]:
    left = dict(sites)
    groups = []
    for glob in globs:
        chosen = {
            path: unit
            for path, unit in left.items()
            if matches_glob(path, glob) or matches_glob(unit.path, glob)
        }
        if not chosen:
            raise ValueError(
                f"order: {glob!r} matches none of the sites that are left: {', '.join(left)}."
            )
        groups.append(list(chosen.values()))
        left = {path: unit for path, unit in left.items() if path not in chosen}
    if left:
        raise ValueError(f"order: no glob matches {', '.join(left)}; add '*' as the last one.")
    return groups
