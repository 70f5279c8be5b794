"""Results become tables, pictures and verdicts; the committed page says what the results say."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from claims import CLAIMS, TABLE1, findings, rank_sum_p
from document import draw, fill, pictures_of, tables
from figures import draw_figure2, draw_figure3
from networks import ROWS, find_row
from results import Results
from scipy.special import j0
from tables import claims_table, error_table, gate_table, machine_line, spread
from tasks import Bessel

HERE = Path(__file__).parents[1]
DOCS = HERE.parents[1] / "docs"


def run(row: str, seed: int, conv: float | None, task: str = "mnist") -> dict[str, Any]:
    """A training as `Job.run` describes it, of two epochs."""
    gated = find_row(row).gate is not None
    curve = {"epoch": [1, 2], "loss": [0.5, 0.1], "score": [9.0, conv], "lr": [0.1, 0.01]}
    if gated:
        curve["mean_gate"] = [1.0, 0.25]
    if conv is None:
        curve = {name: values[:1] for name, values in curve.items()}
    return {
        "row": row,
        "diverged": None if conv is not None else 2,
        "conv": conv,
        "best": None if conv is None else conv - 0.01,
        "seconds": 90.0,
        "curve": curve,
        "sites": [{"path": "act1", "mean_gate": 0.25, "gates": 6}] if gated else [],
        "seed": seed,
        "settings": {"task": task, "limit": None, "epochs": 2},
        "machine": {"name": "CPU, 1 thread", "precision": "bf16"},
        "torch": "2.15.0",
        "fit": [0.1 * seed] * 401,
    }


def gather(**errors: list[float | None]) -> Results:
    names = {"relu_sin": "relu->sin", "resin_sin": "resin->sin"}
    runs = [
        run(names.get(row, row), seed, error)
        for row, values in errors.items()
        for seed, error in enumerate(values)
    ]
    return Results.gather("mnist", reversed(runs))


def test_equal_numbers_share_ranks_and_infinite_ones_are_the_worst() -> None:
    assert rank_sum_p([1.0, 1.0], [1.0, 1.0]) == 1
    # Of the six divisions of 1, 2, 2, 3, two have ranks as low as (1, 2): with either of the twos.
    assert rank_sum_p([1.0, 2.0], [2.0, 3.0]) == pytest.approx(2 / 6)
    assert rank_sum_p([1.0, 2.0, 9.0], [float("inf")] * 3) == 0.05


def test_each_verdict_is_reached_and_needs_all_three_seeds() -> None:
    results = gather(
        relu=[0.9, 0.91, 0.92],
        resin=[0.5, 0.9, 0.7],
        Line=[0.5, 0.55, 0.51],
        relu_sin=[0.7, 0.8, None],
        resin_sin=[0.6, 0.65, 0.61],
    )
    found = {(f.better, f.worse): f.verdict for f in findings(results)}
    assert found["resin->sin", "Line"] == "not reproduced"
    assert found["resin->sin", "resin"] == "within noise"
    assert found["relu->sin", "relu"] == "within noise"  # for the training that diverged
    clear = gather(relu=[0.9, 0.91, 0.92], relu_sin=[0.7, 0.8, 0.89])
    assert [f.verdict for f in findings(clear)] == ["reproduced"]


def test_what_the_paper_claims_holds_for_its_own_numbers() -> None:
    names = {row.name for row in ROWS}
    assert set(TABLE1["mnist"]) == set(TABLE1["resnet20"]) == names
    for task, numbers in TABLE1.items():
        assert all(best <= conv for conv, best in numbers.values())
        pairs = [pair for claim in CLAIMS[task] for pair in claim.pairs]
        assert all(numbers[better][0] < numbers[worse][0] for better, worse in pairs)


def test_tables_have_the_papers_numbers_beside_mean_and_deviation_of_ours() -> None:
    table = error_table(gather(relu=[0.8, 1.0], relu_sin=[0.5, None]))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert lines[0] == ["network", "paper: conv", "best", "conv", "best", "E[z]", "minutes"]
    assert lines[2] == ["`relu`", "0.89", "0.86", "0.90 ± 0.14", "0.89 ± 0.14", "-", "1.5"]
    assert lines[3][3:6] == ["0.50, 1 diverged", "0.49, 1 diverged", "0.62 ± 0.53"]
    assert spread([float("inf")] * 2, 2) == "2 diverged"
    results = gather(relu=[0.9, 0.8, 0.85], Line=[0.7] * 3, relu_sin=[0.5, 0.6, 0.7])
    table = claims_table(results)
    assert "`relu->sin` < `relu` | 0.50 < 0.89 | 0.60 ± 0.10 / 0.85 ± 0.05 | 0.050 | repr" in table
    assert len(table.splitlines()) == 2 + len(list(findings(results))) == 4
    assert "| `relu->sin` | 0.250 ± 0.000 |" in gate_table(results)
    assert "CPU, 1 thread in bfloat16" in machine_line(results)


def test_results_are_sorted_and_survive_json_and_others_are_refused() -> None:
    results = gather(relu=[0.9, 0.8], Line=[0.7])
    assert [(r["row"], r["seed"]) for r in results.runs] == [("relu", 0), ("relu", 1), ("Line", 0)]
    assert Results.from_json(results.to_json()) == results
    assert len(results.to_json().splitlines()) == 1 + 3 + 1  # a line per run
    with pytest.raises(ValueError, match="different settings"):
        Results.gather("mnist", [run("relu", 0, 0.9), run("relu", 1, 0.9, task="bessel")])
    with pytest.raises(ValueError, match="no training has ended"):
        Results.gather("mnist", [])
    with pytest.raises(ValueError, match="no results of version"):
        Results.from_json('{"version": 1, "lines": []}')


def test_figure3_has_lr_gates_and_errors_one_above_the_other() -> None:
    figure = draw_figure3(gather(relu=[0.9, 1.1], Line=[0.7], relu_sin=[0.5, None]))
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    lr, gate, error = figure.axes
    assert [list(line.get_ydata()) for line in lr.lines] == [[0.1, 0.01]]
    assert [list(line.get_ydata()) for line in gate.lines] == [[1.0, 0.25]] * 2
    drawn = {line.get_label(): list(line.get_ydata()) for line in error.lines}
    assert drawn == {"relu": [9.0, 1.0], "Line": [9.0, 0.7], "relu->sin": [9.0, 0.5]}
    solid = {line.get_label() for line in error.lines if line.get_linestyle() == "-"}
    assert solid == {"relu->sin"}


def test_figure2_has_a_panel_per_network_with_samples_function_and_fits() -> None:
    errors = [("resin", 1, 0.014), ("resin", 0, 0.012), ("relu->sin", 0, 0.5), ("sin", 0, None)]
    figure = draw_figure2([run(*which) for which in [*errors, ("relu->sin", 1, None)]])
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "resin: test MSE 0.01300 ± 0.00141 over 2 seeds",
        "relu->sin: test MSE 0.50000; 1 of 2 seeds diverged",
        "sin: 1 of 1 seeds diverged",
    ]
    data = Bessel(torch.device("cpu"))
    for ax, fits in zip(figure.axes, (2, 1, 0), strict=True):
        samples, clean, *lines = ax.lines
        assert samples.get_ydata() == pytest.approx(data.y_train.flatten())
        assert clean.get_ydata() == pytest.approx(j0(clean.get_xdata()), abs=1e-6)
        assert len(lines) == fits
    *_, other, first = figure.axes[0].lines  # the first seed is on top
    assert (first.get_label(), other.get_label()) == ("fit of seed 0", "other seeds")
    assert (first.get_ydata()[0], other.get_ydata()[0]) == (0, 0.1)
    with pytest.raises(ValueError, match="at least one network"):
        draw_figure2([])


def test_a_page_is_filled_where_its_marks_are(tmp_path: Path) -> None:
    results = gather(relu=[0.9])
    (tmp_path / "mnist.json").write_text(results.to_json())
    page = "# Paper\n<!-- begin mnist.errors -->\nold\n<!-- end mnist.errors -->\nprose\n"
    filled = fill(page, tmp_path)
    assert filled == page.replace("old", error_table(results))
    assert fill(filled, tmp_path) == filled
    with pytest.raises(ValueError, match=r"bessel\.json, which is not there"):
        fill(page.replace("mnist", "bessel"), tmp_path)
    with pytest.raises(ValueError, match="unknown table 'wrong'; known: machine, errors"):
        fill(page.replace("errors", "wrong"), tmp_path)
    draw(tmp_path / "mnist.json", tmp_path / "mnist.png")
    assert (tmp_path / "mnist.png").read_bytes().startswith(b"\x89PNG")
    assert error_table(results) in list(tables(results))


def test_the_committed_page_is_what_the_committed_results_say() -> None:
    page = (DOCS / "paper.md").read_text()
    assert "<!-- begin mnist.claims -->" in page
    assert fill(page, HERE / "results") == page
    for file in (HERE / "results").glob("*.json"):
        assert file.stat().st_size < 700_000
    pictures = {file.stem for file in (DOCS / "paper").iterdir()}
    assert pictures == set(pictures_of(page)) >= {"figure1", "bessel", "mnist"}
