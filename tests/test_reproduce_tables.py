"""Results become tables, pictures and verdicts, checked against independent references."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from transfer_surgery.reproduce.claims import exact_p, findings
from transfer_surgery.reproduce.documents import draw, fill, tables
from transfer_surgery.reproduce.draw_figure3 import draw_figure3
from transfer_surgery.reproduce.paper import CLAIMS, TABLE1
from transfer_surgery.reproduce.results import Results
from transfer_surgery.reproduce.rows import ROWS, find_row
from transfer_surgery.reproduce.tables import claims_table, error_table, gate_table, spread

PAGE = Path(__file__).parents[1] / "docs" / "paper.md"


def run(row: str, seed: int, conv: float | None, task: str = "mnist") -> dict[str, Any]:
    """A training as `Job.run` describes it, of two epochs."""
    gated = find_row(row).gate is not None
    curve = {"epoch": [1, 2], "loss": [0.5, 0.1], "score": [9.0, conv], "lr": [0.1, 0.01]}
    if gated:
        curve["mean_gate"] = [1.0, 0.25]
    return {
        "row": row,
        "diverged": None if conv is not None else 2,
        "conv": conv,
        "best": None if conv is None else conv - 0.01,
        "seconds": 90.0,
        "curve": curve
        if conv is not None
        else {name: values[:1] for name, values in curve.items()},
        "sites": [{"path": "act1", "mean_gate": 0.25, "gates": 6}] if gated else [],
        "seed": seed,
        "settings": {"task": task, "limit": None, "epochs": 2},
        "machine": {"name": "CPU, 1 thread"},
        "torch": "2.15.0",
    }


def runs(**errors: list[float | None]) -> list[dict[str, Any]]:
    names = {"relu_sin": "relu->sin", "resin_sin": "resin->sin"}
    return [
        run(names.get(row, row), seed, error)
        for row, values in errors.items()
        for seed, error in enumerate(values)
    ]


@given(st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_p_is_that_of_the_exact_mann_whitney_test(n: int, m: int, random: Any) -> None:
    pooled = random.sample(range(100), n + m)
    a, b = pooled[:n], pooled[n:]
    expected = mannwhitneyu(a, b, alternative="less", method="exact").pvalue
    assert exact_p(a, b) == pytest.approx(expected)


def test_equal_numbers_share_ranks_and_infinite_ones_are_the_worst() -> None:
    assert exact_p([1.0, 1.0], [1.0, 1.0]) == 1
    # Of the six divisions of 1, 2, 2, 3, two have ranks as low as (1, 2): with either of the twos.
    assert exact_p([1.0, 2.0], [2.0, 3.0]) == pytest.approx(2 / 6)
    assert exact_p([1.0, 2.0, 9.0], [float("inf")] * 3) == 0.05


def test_each_verdict_is_reached_and_needs_all_three_seeds() -> None:
    found = {
        (f.better, f.worse): f.verdict
        for f in findings(
            Results.gather(
                "mnist",
                runs(
                    relu=[0.9, 0.91, 0.92],
                    resin=[0.5, 0.9, 0.7],
                    Line=[0.5, 0.55, 0.51],
                    relu_sin=[0.7, 0.8, None],
                    resin_sin=[0.6, 0.65, 0.61],
                ),
            )
        )
    }
    assert found["resin->sin", "Line"] == "not reproduced"
    assert found["resin->sin", "resin"] == "within noise"
    assert found["relu->sin", "relu"] == "within noise"  # for the training that diverged
    clear = Results.gather("mnist", runs(relu=[0.9, 0.91, 0.92], relu_sin=[0.7, 0.8, 0.89]))
    assert [f.verdict for f in findings(clear)] == ["reproduced"]


def test_claims_and_numbers_speak_of_networks_that_there_are() -> None:
    names = {row.name for row in ROWS}
    for task, numbers in TABLE1.items():
        assert set(numbers) <= names
        assert all(best <= conv for conv, best in numbers.values())
        # What the paper claims holds for its own numbers.
        for claim in CLAIMS[task]:
            for better, worse in claim.pairs:
                assert numbers[better][0] < numbers[worse][0]
    assert set(TABLE1["mnist"]) == set(TABLE1["resnet20"]) == names


def test_error_table_has_the_papers_numbers_beside_mean_and_deviation() -> None:
    table = error_table(Results.gather("mnist", runs(relu=[0.8, 1.0], relu_sin=[0.5, None])))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["network", "paper: conv", "best", "conv", "best", "E[z]", "minutes"]
    assert lines[2] == ["`relu`", "0.89", "0.86", "0.90 ± 0.14", "0.89 ± 0.14", "-", "1.5"]
    assert lines[3][3:6] == ["0.50, 1 diverged", "0.49, 1 diverged", "0.62 ± 0.53"]


def test_a_network_that_always_diverges_has_no_error() -> None:
    assert spread([float("inf")] * 2, 2) == "2 diverged"


def test_claims_and_gates_have_a_row_per_pair_and_network() -> None:
    results = Results.gather(
        "mnist", runs(relu=[0.9, 0.8, 0.85], Line=[0.7] * 3, relu_sin=[0.5, 0.6, 0.7])
    )
    table = claims_table(results)
    assert "`relu->sin` < `relu` | 0.50 < 0.89 | 0.60 ± 0.10 / 0.85 ± 0.05 | 0.050 | repr" in table
    assert len(table.splitlines()) == 2 + len(list(findings(results))) == 4
    assert "| `relu->sin` | 0.250 ± 0.000 |" in gate_table(results)
    assert "| `relu` |" not in gate_table(results)


def test_results_are_sorted_and_survive_json() -> None:
    results = Results.gather("mnist", reversed(runs(relu=[0.9, 0.8], Line=[0.7, 0.6])))
    assert [(r["row"], r["seed"]) for r in results.runs] == [
        ("relu", 0), ("relu", 1), ("Line", 0), ("Line", 1)
    ]  # fmt: skip
    again = Results.from_json(results.to_json())
    assert again == results
    assert len(results.to_json().splitlines()) == 1 + 4 + 1  # a line per run


def test_results_of_different_settings_or_other_files_are_refused() -> None:
    mixed = runs(relu=[0.9, 0.8])
    mixed[1]["settings"] = mixed[1]["settings"] | {"epochs": 3}
    with pytest.raises(ValueError, match="different settings"):
        Results.gather("mnist", mixed)
    with pytest.raises(ValueError, match="no training has ended"):
        Results.gather("mnist", [])
    with pytest.raises(ValueError, match="no results of version"):
        Results.from_json('{"version": 1, "lines": []}')


def test_figure3_has_lr_gates_and_errors_one_above_the_other() -> None:
    results = Results.gather("mnist", runs(relu=[0.9, 1.1], Line=[0.7], relu_sin=[0.5, None]))
    figure = draw_figure3([results, results])
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    lr, _, gate, _, error, _ = figure.axes
    assert [list(line.get_ydata()) for line in lr.lines] == [[0.1, 0.01]]
    assert [list(line.get_ydata()) for line in gate.lines] == [[1.0, 0.25]] * 2
    assert {line.get_label(): list(line.get_ydata()) for line in error.lines} == {
        "relu": [9.0, 1.0],
        "Line": [9.0, 0.7],
        "relu->sin": [9.0, 0.5],
    }
    solid = {line.get_label() for line in error.lines if line.get_linestyle() == "-"}
    assert solid == {"relu->sin"}


def test_a_page_is_filled_where_its_marks_are(tmp_path: Path) -> None:
    results = Results.gather("mnist", runs(relu=[0.9]))
    (tmp_path / "mnist.json").write_text(results.to_json())
    page = "# Paper\n<!-- begin mnist.errors -->\nold\n<!-- end mnist.errors -->\nprose\n"
    filled = fill(page, tmp_path)
    assert filled == page.replace("old", error_table(results))
    assert fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match=r"bessel\.json, which is not there"):
        fill(page.replace("mnist", "bessel"), tmp_path)
    with pytest.raises(ValueError, match="unknown table 'wrong'; known: machine, errors"):
        fill(page.replace("errors", "wrong"), tmp_path)
    assert [picture.name for picture in draw(tmp_path)] == ["mnist.png"]
    assert error_table(results) in list(tables(results))


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    page = PAGE.read_text()
    assert "<!-- begin mnist.claims -->" in page
    assert fill(page, PAGE.parent / "paper") == page


def test_committed_results_are_small_and_have_their_pictures() -> None:
    files = list((PAGE.parent / "paper").glob("*.json"))
    assert {"figure1.json", "bessel.json", "mnist.json"} <= {file.name for file in files}
    for file in files:
        assert file.stat().st_size < 700_000
        if not file.stem.endswith("-study"):
            assert file.with_suffix(".png").exists()
