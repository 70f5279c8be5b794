"""The coverage run: a bad model does not stop it, and a wrong result is noticed."""

import pytest
import torch
import zoo.check
from typer.testing import CliRunner
from zoo.check import PASSED, check
from zoo.families import SAMPLED
from zoo.models import family_of, model_names
from zoo.records import complete, problem, read
from zoo.runner import Bounds, run
from zoo_coverage import FAMILIES, app

TINY = ["timm:test_resnet", "timm:test_vit"]


def cover(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def checked(name):
    record = {"name": name}
    check(name, record.update, lambda: None)
    return record


def test_the_sample_for_ci_has_one_model_of_every_family():
    sample = FAMILIES.read_text().split()
    families = [family_of(name) for name in sample]
    assert len(families) == len(set(families))
    assert set(families) == {family_of(name) for name in model_names(SAMPLED)}


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
