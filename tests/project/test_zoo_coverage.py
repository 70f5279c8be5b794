"""The coverage run: what it selects, that it survives bad models, what it notices and prints."""

import json
import sys

import pytest
import torch
import zoo.check
from typer.testing import CliRunner
from zoo.check import PASSED, check
from zoo.families import smallest
from zoo.models import build, family_of, model_names, select
from zoo.outputs import depends_on_input, equal, finite_share, mean_square
from zoo.records import complete, pending, problem, read, versions, write
from zoo.runner import Bounds, run
from zoo.table import render
from zoo_coverage import FAMILIES, app

TINY = ["timm:test_resnet", "timm:test_vit"]


def cover(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def checked(name):
    record = {"name": name}
    check(name, record.update, lambda: None)
    return record


def test_a_sample_depends_on_the_seed_alone():
    names = model_names()
    chosen = select(names, sample=20, seed=1)
    assert chosen == select(reversed(names), sample=20, seed=1)
    assert chosen != select(names, sample=20, seed=2)
    assert len(set(chosen)) == 20
    assert set(chosen) <= set(names)
    assert sorted(select(names, ["timm:test_vit*", "torchvision:alexnet"]))[:2] == [
        "timm:test_vit",
        "timm:test_vit2",
    ]


def test_the_sample_for_ci_has_one_model_of_every_family():
    sample = FAMILIES.read_text().split()
    families = [family_of(name) for name in sample]
    assert len(families) == len(set(families))
    assert set(families) == {family_of(name) for name in model_names()}


def test_the_smallest_model_stands_for_its_family():
    names = ["timm:test_resnet", "timm:resnet18", "torchvision:resnet18", "torchvision:resnet34"]
    assert smallest(names) == ["timm:test_resnet", "torchvision:resnet18"]


def test_models_are_built_with_random_finite_weights_and_torch_is_left_as_it_was():
    model = build("timm:test_vit")
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert all(p.isfinite().all() for p in weights)
    assert not torch.equal(model.blocks[0].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert not {"uniform_", "normal_", "erfinv_"} & vars(torch.Tensor).keys()


def test_models_are_checked_in_parallel_and_a_bad_one_does_not_stop_the_others():
    names = [TINY[0], "timm:no_such_model", TINY[1]]
    records = {record["name"]: record for record in map(complete, run(names, Bounds()))}
    assert set(records) == set(names)
    assert [name for name in names if records[name]["ok"]] == TINY
    bad = records["timm:no_such_model"]
    assert bad["stage"] == "count"
    assert "no_such_model" in bad["error"]
    good = records[TINY[0]]
    assert all(good[name] for name in PASSED)
    assert good["depends"]
    assert good["converted"] == good["sites"]["hidden"] == good["eval_sites"]


@pytest.mark.parametrize(
    ("bounds", "error"),
    [(Bounds(timeout=0.001), "TimeoutError"), (Bounds(memory_gib=0.01), "MemoryError")],
)
def test_a_model_that_takes_too_much_is_ended_and_recorded(bounds, error):
    (record,) = map(complete, run(TINY[:1], bounds))
    assert record["error"].startswith(error)
    assert not record["ok"]


def test_models_that_announce_more_memory_than_there_is_run_one_after_the_other():
    records = map(complete, run(TINY, Bounds(memory_gib=1.9)))  # each asks for 1 GiB and a bit
    assert [problem(record) for record in records] == [None, None]


def test_a_run_goes_on_where_it_was_and_writes_the_table(tmp_path, monkeypatch):
    out, table, oracle = tmp_path / "out.jsonl", tmp_path / "table.md", tmp_path / "oracle.json"
    oracle.write_text(json.dumps({TINY[0]: {"sites": 99, "untainted": 1}}))
    failed = {"name": TINY[1], "stage": "find", "error": "RuntimeError: made up"}
    write(out, complete(failed))
    with out.open("a") as file:
        file.write('{"name": "timm:cut o')  # as a crash leaves it
        file.write("\n")
    models = [word for name in TINY for word in ("--models", name)]
    arguments = ["--out", str(out), *models, "--table", str(table), "--oracle", str(oracle)]
    monkeypatch.setattr(sys, "argv", ["zoo_coverage.py", *arguments])
    result = cover(*arguments)
    assert "2 models, 1 of them in out.jsonl already" in result.output
    assert "1 of 2 models without a problem" in result.output
    assert result.exit_code == 1
    page = table.read_text()
    assert "| `timm:test_vit` | find: RuntimeError: made up |" in page
    assert "| `timm:test_resnet` | 12 | 98 |" in page
    assert "--out out.jsonl --models timm:test_resnet" in page
    assert all(f"{package} {number}" in page for package, number in versions().items())
    assert str(tmp_path) not in page
    before = out.read_text()
    assert cover("--out", out, *models).exit_code == 1
    assert out.read_text() == before
    assert cover("--out", out, *models, "--redo", "failed").exit_code == 0
    assert out.read_text().startswith(before)


def test_results_of_other_versions_are_not_counted(tmp_path):
    records = {name: complete({"name": name}) for name in TINY}
    records[TINY[0]]["ok"] = True
    assert pending(TINY, records) == []
    assert pending(TINY, records, "failed") == TINY[1:]
    assert pending(TINY, records, "all") == TINY
    records[TINY[0]]["versions"] = versions() | {"torch": "1.0"}
    assert pending(TINY, records) == TINY[:1]
    assert read(tmp_path / "none.jsonl") == {}


def test_a_page_can_be_made_of_nothing_but_failures():
    where = "/home/someone/site-packages/timm/x.py"
    records = [complete({"name": "timm:a", "stage": "build", "error": f"OSError: in {where}"})]
    page = render(records, {}, "a command", listed=2)
    assert "| `timm:a` | build: OSError: in x.py |" in page
    assert "1 of the 2 models" in page
    assert "Nothing was timed." in page


@pytest.mark.parametrize(
    ("stage", "replacement", "failed"),
    [
        ("convert", lambda original: lambda model, *a, **k: _shifted(original(model, *a, **k)), 0),
        ("_set_gates", lambda original: lambda units, value: None, 1),
        ("_reached", None, 2),
        ("bake", lambda original: lambda model: _shifted(original(model)), 3),
    ],
)
def test_a_wrong_result_is_noticed(monkeypatch, stage, replacement, failed):
    if stage == "_reached":
        seen = iter([frozenset({"a weight that training had reached"}), frozenset()])
        monkeypatch.setattr(zoo.check, stage, lambda model: next(seen))
    else:
        monkeypatch.setattr(zoo.check, stage, replacement(getattr(zoo.check, stage)))
    record = checked(TINY[0])
    assert "error" not in record
    assert [name for name in PASSED if not record[name]] == [PASSED[failed]]
    assert problem(record)


@torch.no_grad()
def _shifted(model):
    next(model.parameters()).mul_(1.0001)
    return model


def test_outputs_of_any_structure_are_compared_bit_for_bit():
    nan, inf = float("nan"), float("inf")
    first = {"a": [torch.tensor([1.0, nan, inf])], "b": (3, None)}
    assert equal(first, {"a": [torch.tensor([1.0, nan, inf])], "b": (3, None)})
    assert not equal(first, {"a": [torch.tensor([1.0, nan, -inf])], "b": (3, None)})
    assert not equal(first, {"a": [torch.tensor([1.0, nan, nan])], "b": (3, None)})
    assert not equal(first, {"a": [torch.tensor([1.0, nan, inf]).double()], "b": (3, None)})
    assert not equal(first, {"a": [torch.tensor([1.0, nan, inf])]})
    assert finite_share(first) == pytest.approx(1 / 3)


def test_an_output_depends_on_the_input_where_the_examples_differ():
    assert depends_on_input({"out": torch.tensor([[1.0], [2.0]])})
    assert not depends_on_input({"out": torch.ones(2, 1), "size": torch.tensor([1, 2, 3])})
    assert depends_on_input([{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(3, 4)}])
    assert not depends_on_input([{"boxes": torch.ones(2, 4)}, {"boxes": torch.ones(2, 4)}])


def test_every_output_takes_part_in_the_loss():
    x = torch.ones(2, requires_grad=True)
    assert mean_square({"a": 2 * x, "b": [3 * x, torch.tensor(1)]}).item() == 13
    with pytest.raises(ValueError, match="no output"):
        mean_square(torch.ones(2))


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 2))])
def test_one_model_of_every_family_is_converted_unchanged_trained_and_baked(part, tmp_path):
    """In three parts; which families are in one is as good as random."""
    out, names = tmp_path / "families.jsonl", FAMILIES.read_text().split()[part::3]
    result = cover("--out", out, *(word for name in names for word in ("--models", name)))
    problems = {name: problem(record) for name, record in read(out).items()}
    assert problems.keys() == set(names)
    assert {name: trouble for name, trouble in problems.items() if trouble} == {}
    assert result.exit_code == 0
