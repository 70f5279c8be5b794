"""The results file: one JSON object per line and model; the last line of a model counts.

A run that is started again skips the models that the file has for the installed versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from zoo.check import PASSED
from zoo.models import family_of

_OWN = ("torch", "transfer-surgery")
_ZOOS = {
    "smp": ("segmentation-models-pytorch", "timm"),
    "diffusers": ("diffusers",),
}

Record = dict[str, Any]


def versions(name: str) -> dict[str, str]:
    """Installed versions of the packages that the result of a model depends on."""
    zoo = name.partition(":")[0]
    return {package: version(package) for package in (*_OWN, *_ZOOS.get(zoo, (zoo,)))}


def complete(record: Record) -> Record:
    """The record as it is written: with family, versions and the verdict."""
    record = {"name": record["name"], "family": family_of(record["name"]), "ok": False} | record
    return record | {"ok": problem(record) is None, "versions": versions(record["name"])}


def problem(record: Record) -> str | None:
    """What is wrong with a model, in words; None where nothing is."""
    if error := record.get("error"):
        return f"{record.get('stage', 'start')}: {error}"
    failed = [_WORDS[name] for name in PASSED if not record.get(name)]
    if record.get("generates") is False:
        failed.append("another text is generated")
    return "; ".join(failed) or None


_WORDS = {
    "identical": "eval output changed",
    "changes": "output is the same with all gates at the target",
    "trained": "a gate or a weight has no finite gradient",
    "baked": "baked output differs",
}


def read(path: Path) -> dict[str, Record]:
    """Records by model name, empty without a file; a line cut off by a crash is dropped."""
    records: dict[str, Record] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[record["name"]] = record
    return records


def write(path: Path, record: Record) -> None:
    """Append a record; what is in the file is safe whatever happens later."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def pending(
    names: Iterable[str],
    records: Mapping[str, Record],
    redo: Literal["none", "failed", "all"] = "none",
) -> list[str]:
    """The models that are still to be checked."""

    def is_done(name: str) -> bool:
        record = records.get(name)
        if record is None or redo == "all" or (redo == "failed" and not record["ok"]):
            return False
        return versions(name).items() <= record["versions"].items()

    return [name for name in names if not is_done(name)]
