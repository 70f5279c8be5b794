"""The results as a page of Markdown: what was shown, and every exception with its reason."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from statistics import median
from typing import Any

from zoo.records import problem, versions

Record = Mapping[str, Any]
WAYS = ("child", "edit", "fx", "intercept")

_BOXES = (
    "clamps of boxes, once per image: two here, one there; clamps whose lower "
    "bound is not 0 were not counted there"
)
_OTHER_COUNTS = {
    "timm:sequencer2d*": "what `nn.LSTM` does inside is listed here",
    "torchvision:*rcnn*": _BOXES,
    "torchvision:retinanet*": _BOXES,
    "torchvision:fcos*": _BOXES,
    "torchvision:ssd*": _BOXES,
    "torchvision:raft*": "two ReLUs, of whose twelve calls the first sees a constant",
}
"""Where this finder and the independent counts mean different things, by globs on names."""


def render(records: Iterable[Record], oracle: Mapping[str, Any], command: str, listed: int) -> str:
    """The page.

    Args:
        records: one per model, as `zoo.records.read` returns them.
        oracle: by model name ``{"sites": n, "untainted": m}``, counted by other means: all of the
            activations in eval mode, and those that do not depend on the input. May be empty.
        command: what was typed to make the page.
        listed: number of models that the zoos have.
    """
    given = sorted(records, key=lambda record: record["name"])
    records = [record for record in given if not _is_unbuilt(record)]
    sections = [
        "# Coverage of the zoos",
        _introduction(records, command, listed, unbuilt=len(given) - len(records)),
        "## Totals",
        _totals(records),
        "## Exceptions",
        _exceptions(records),
        "## Activations left alone",
        _left(records),
        "## Agreement with independent counts",
        _agreement(records, oracle),
        "## Time",
        _times(records),
        "## Families",
        _families(records),
    ]
    return "\n\n".join(sections) + "\n"


def _is_unbuilt(record: Record) -> bool:
    """Whether an architecture's tiny configuration and input did not suit the original."""
    stages = ("count", "build", "original")
    return _zoo(record) == "transformers" and record.get("stage") in stages


def _introduction(records: list[Record], command: str, listed: int, unbuilt: int) -> str:
    packages = dict.fromkeys(package for r in records for package in versions(r["name"]))
    used = {p: _one(r["versions"][p] for r in records if p in r["versions"]) for p in packages}
    return (
        f"{', '.join(f'{package} {number}' for package, number in used.items())}; "
        f"{datetime.now(UTC):%Y-%m-%d}. This command writes the page:\n\n    {command}\n\n"
        f"It shows {len(records):,} of the {listed:,} models that the zoos list. "
        + f"Of {unbuilt} more the original did not run with a tiny configuration made by the names "
        "of its numbers. "
        * bool(unbuilt)
        + "Every model has random weights, with noise on constant ones. It takes two examples of "
        "real numbers, of the smallest size that it accepts.\n\n"
        "- *Unchanged*: the eval output of the converted model equals the original's bit for bit.\n"
        "- *Trained*: a backward pass gives a finite gradient to every gate, and to every weight "
        "that had one before.\n"
        "- *Baked*: with gates set to 0 or 1 at random, the baked model's output equals the gated "
        "one's bit for bit.\n"
        "- *Changes*: with all gates at the target the output differs, so the conversion is real.\n"
        "\n`benchmarks/README.md` says in detail what is checked."
    )


def _totals(records: list[Record]) -> str:
    zoos = sorted({_zoo(record) for record in records})
    columns = {zoo: [record for record in records if _zoo(record) == zoo] for zoo in zoos}
    if len(zoos) > 1:
        columns["all"] = records
    counts: dict[str, Callable[[Record], int]] = {
        "models": lambda r: 1,
        "converted": lambda r: "converted" in r,
        "unchanged": lambda r: r.get("identical", False),
        "changes": lambda r: r.get("changes", False),
        "trained": lambda r: r.get("trained", False),
        "baked": lambda r: r.get("baked", False),
        "that generate text": lambda r: "generates" in r,
        "- the same text": lambda r: r.get("generates", False),
        "**without a problem**": lambda r: r["ok"],
        "hidden activations": lambda r: r.get("sites", {}).get("hidden", 0),
        "of these converted": lambda r: r.get("converted", 0),
        "- by replacing a child": lambda r: r.get("ways", {}).get("child", 0),
        "- by editing the call": lambda r: r.get("ways", {}).get("edit", 0),
        "- in the graph of a GraphModule": lambda r: r.get("ways", {}).get("fx", 0),
        "- by intercepting the call": lambda r: r.get("ways", {}).get("intercept", 0),
        "gating activations": lambda r: r.get("sites", {}).get("gating", 0),
        "output activations": lambda r: r.get("sites", {}).get("output", 0),
        "modules called": lambda r: r.get("kinds", {}).get("module", 0),
        "functions called": lambda r: r.get("kinds", {}).get("function", 0),
        "methods called": lambda r: r.get("kinds", {}).get("method", 0),
        "run in training only": lambda r: r.get("train_only", 0),
        "models with frozen weights": lambda r: r.get("frozen", False),
        "models in bfloat16": lambda r: r.get("dtype") == "bfloat16",
    }
    rows = [
        [label, *(f"{sum(map(count, column)):,}" for column in columns.values())]
        for label, count in counts.items()
    ]
    return _table(["", *columns], rows) + (
        "\n\nAn activation is counted once per place in the code of one module, however often it "
        "runs. To save memory, models from 1e9 parameters on train their gates only, and models "
        "from 3e9 on are in bfloat16."
    )


def _exceptions(records: list[Record]) -> str:
    rows = [[_code(r["name"]), _plain(problem(r) or "")] for r in records if not r["ok"]]
    constant = [r["name"] for r in records if r.get("depends") is False]
    broken = [r["name"] for r in records if r.get("finite", 1.0) < 1.0]
    flat = [r["name"] for r in records if r.get("gates_with_zero_gradient")]
    parts = [_table(["model", "problem"], rows) if rows else "None."]
    for names, what in (
        (constant, "The output is the same for both examples, so equality says less"),
        (broken, "Some outputs are not finite; they are compared too, with NaN equal to NaN"),
        (
            flat,
            "Some gates have a gradient of zero everywhere, "
            "for example behind a path dropped at random",
        ),
    ):
        if names:
            parts.append(f"{what}: {_some(names)}.")
    return "\n\n".join(parts)


def _left(records: list[Record]) -> str:
    sites, models = Counter[tuple[str, str]](), defaultdict[tuple[str, str], list[str]](list)
    for record in records:
        for role, reasons in record.get("left", {}).items():
            for reason, number in reasons.items():
                key = role, re.sub(r"\d+", "N", _plain(reason))
                sites[key] += number
                models[key].append(record["name"])
    rows = [
        [
            role,
            reason,
            f"{number:,}",
            str(len(set(models[role, reason]))),
            _some(models[role, reason]),
        ]
        for (role, reason), number in sites.most_common()
    ]
    notes = Counter(_kind_of_note(n) for r in records for n in {*r.get("notes", ())})
    text = (
        _table(["role", "reason", "activations", "models", "such as"], rows)
        if rows
        else "None, apart from those with another role."
    )
    if notes:
        text += "\n\nNotes of the finder:\n\n" + _table(
            ["note", "callers"], [[note, str(number)] for note, number in notes.most_common()]
        )
    return text


def _kind_of_note(note: str) -> str:
    """A note without the path in front, which differs from model to model."""
    return re.sub(r"\d+", "N", _plain(note).partition(": ")[2] or note)


def _agreement(records: list[Record], oracle: Mapping[str, Any]) -> str:
    found = {r["name"]: r["eval_sites"] for r in records if "eval_sites" in r}
    compared = sorted(found.keys() & oracle.keys())
    if not compared:
        return "Not compared in this run."
    counted = {name: oracle[name]["sites"] - oracle[name]["untainted"] for name in compared}
    different = [name for name in compared if found[name] != counted[name]]
    text = f"{len(compared) - len(different)} of {len(compared)} models agree."
    rows = [[_code(n), str(found[n]), str(counted[n]), _why_other(n)] for n in different]
    return f"{text}\n\n{_table(['model', 'found', 'independent', 'why'], rows)}" if rows else text


def _why_other(name: str) -> str:
    return next((why for glob, why in _OTHER_COUNTS.items() if fnmatchcase(name, glob)), "unknown")


def _times(records: list[Record]) -> str:
    rows = []
    for label, key in (("find", "find"), ("convert", "convert"), ("one forward", "forward")):
        timed = [(r["seconds"][key], r["name"]) for r in records if key in r.get("seconds", {})]
        if timed:
            middle, (longest, name) = median(s for s, _ in timed), max(timed)
            rows.append([label, f"{middle:.2f}", f"{longest:.1f}", _code(name)])
    peaks = [(r["peak_mib"], r["name"]) for r in records if "peak_mib" in r]
    ratios = [
        r["seconds"]["find"] / r["seconds"]["forward"]
        for r in records
        if r.get("seconds", {}).get("forward") and "find" in r["seconds"]
    ]
    lines = [_table(["seconds", "median", "longest", "model"], rows)] if rows else []
    if ratios:
        lines.append(
            f"The search takes as long as {median(ratios):.1f} forward passes (median) of two "
            "examples at the small input size. It does not grow with the size of the "
            "input, as a forward pass does. All times are of one thread."
        )
    if peaks:
        peak, name = max(peaks)
        lines.append(
            f"Peak memory: median {median(p for p, _ in peaks):,.0f} MiB, most {peak:,} MiB "
            f"({_code(name)}), of which the imported packages are about 700 MiB."
        )
    return "\n\n".join(lines) or "Nothing was timed."


def _families(records: list[Record]) -> str:
    groups = defaultdict[str, list[Record]](list)
    for record in records:
        groups[record["family"]].append(record)
    rows = []
    for family, members in sorted(groups.items()):
        total = sum((Counter(r.get("sites", {})) for r in members), Counter[str]())
        ways = sum((Counter(r.get("ways", {})) for r in members), Counter[str]())
        times = [r["seconds"]["find"] for r in members if "find" in r.get("seconds", {})]
        rows.append(
            [
                family,
                f"{sum(r['ok'] for r in members)} / {len(members)}",
                *(f"{total[role]:,}" for role in ("hidden", "gating", "output")),
                *(f"{ways[way]:,}" for way in WAYS),
                f"{median(times):.1f}" if times else "",
            ]
        )
    roles_and_ways = ["hidden", "gating", "output", *WAYS]
    return _table(["family", "models", *roles_and_ways, "find, s"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _some(names: list[str], number: int = 4) -> str:
    names = sorted(set(names))
    rest = f" and {len(names) - number} more" if len(names) > number else ""
    return ", ".join(map(_code, names[:number])) + rest


def _plain(text: str) -> str:
    """Text for a page that anyone may see: without the folders of this machine."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text).replace("\n", " ")


def _code(name: str) -> str:
    return f"`{name}`"


def _zoo(record: Record) -> str:
    return str(record["name"]).partition(":")[0]


def _one(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))
