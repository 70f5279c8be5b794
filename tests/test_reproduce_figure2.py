import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scipy.special import j0

from transfer_surgery.reproduce.draw_figure2 import draw_figure2
from transfer_surgery.reproduce.machine import Machine
from transfer_surgery.reproduce.protocol import Protocol
from transfer_surgery.reproduce.rows import find_row
from transfer_surgery.reproduce.tasks import Bessel, make_task
from transfer_surgery.reproduce.trainer import Training

CPU = torch.device("cpu")


def test_inputs_are_400_evenly_spaced_points_halved_without_overlap():
    data = Bessel(CPU)
    assert data.x_train.shape == data.y_train.shape == (200, 1)
    assert data.x_test.shape == data.y_test.shape == (200, 1)
    both = torch.cat([data.x_train, data.x_test]).flatten().sort().values
    torch.testing.assert_close(both, torch.linspace(-80, 80, 400))
    assert both.unique().numel() == 400


def test_division_is_random():
    # A sample's neighbour is as likely as not in the same half: runs of 1, 2, 3... not of 1 alone.
    data = Bessel(CPU)
    inside = torch.isin(torch.linspace(-80, 80, 400, dtype=torch.float64).float(), data.x_train)
    assert inside.sum() == 200
    changes = (inside[1:] != inside[:-1]).sum().item()
    assert 160 < changes < 240


def test_test_labels_are_the_bessel_function_without_noise():
    data = Bessel(CPU)
    expected = torch.from_numpy(j0(data.x_test.double().numpy())).float()
    torch.testing.assert_close(data.y_test, expected, rtol=0, atol=1e-5)


def test_training_labels_have_white_noise_of_standard_deviation_008():
    noises = []
    for seed in range(20):
        data = Bessel(CPU, seed=seed)
        clean = torch.from_numpy(j0(data.x_train.double().numpy()))
        noises.append((data.y_train.double() - clean).flatten())
    noise = torch.stack(noises)
    number = noise.numel()
    assert noise.std().item() == pytest.approx(0.08, abs=4 * 0.08 / math.sqrt(2 * number))
    assert noise.mean().item() == pytest.approx(0, abs=4 * 0.08 / math.sqrt(number))
    neighbours = (noise[:, 1:] * noise[:, :-1]).mean() / noise.square().mean()
    assert abs(neighbours.item()) < 4 / math.sqrt(number)


def test_all_networks_and_seeds_learn_the_same_samples():
    torch.manual_seed(1)
    first = make_task("bessel", CPU)
    torch.manual_seed(2)
    again = make_task("bessel", CPU)
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.x_train, Bessel(CPU, seed=1).x_train)


def test_data_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    Bessel(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_shows_each_sample_once_with_its_label():
    data = Bessel(CPU)
    batches = list(data.batches(128))
    assert [len(x) for x, _ in batches] == [128, 72]
    assert len(batches) == data.steps(128)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert not torch.equal(x, data.x_train)
    order = x.flatten().argsort()
    assert torch.equal(x[order], data.x_train)
    assert torch.equal(y[order], data.y_train)


def test_score_is_the_mean_squared_error_without_noise():
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.full_like(x, 0.25)

    data = Bessel(CPU)
    expected = (j0(data.x_test.double().numpy()) - 0.25) ** 2
    assert data.score(Mean()) == pytest.approx(expected.mean(), rel=1e-4)
    assert data.drawn(Mean())["fit"] == [0.25] * 401


def trained(name: str, folder: Path) -> dict:
    protocol = Protocol(epochs=4, clip=1.0)
    training = Training(find_row(name), Bessel(CPU), protocol, Machine(), seed=0)
    training.run(folder / "checkpoint.pt")
    return training.result()


@pytest.mark.parametrize("name", ["sin", "Copy", "relu->sin"])
def test_a_training_ends_finite_and_its_result_is_small_json(name, tmp_path):
    result = trained(name, tmp_path)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result
    assert len(text) < 10_000
    assert result["row"] == name
    assert result["diverged"] is None
    assert all(map(math.isfinite, (result["conv"], result["best"], *result["fit"])))
    assert len(result["fit"]) == 401
    assert [site["gates"] for site in result["sites"]] == ([] if name == "sin" else [400] * 3)


def test_copy_is_the_sine_in_the_second_half(tmp_path):
    result = trained("Copy", tmp_path)
    assert result["curve"]["mean_gate"] == [1, 0, 0, 0]


def test_picture_draws_what_a_training_returns(tmp_path):
    result = trained("tanh", tmp_path)
    figure = draw_figure2([result | {"seed": 0}])
    assert figure.axes[0].lines[-1].get_ydata() == pytest.approx(result["fit"])


def run(row: str, seed: int, error: float | None, level: float = 0.0) -> dict:
    if error is None:
        return {"row": row, "seed": seed, "diverged": 3, "conv": None}
    return {"row": row, "seed": seed, "diverged": None, "conv": error, "fit": [level] * 401}


RUNS = [
    run("resin", 1, 0.014, level=0.2),
    run("resin", 0, 0.012, level=0.1),
    run("relu->sin", 0, 0.5),
    run("relu->sin", 1, None),
    run("sin", 0, None),
    run("tanh", 0, 0.0151),
]


def test_picture_has_a_panel_per_network_with_the_test_mse_in_its_title():
    figure = draw_figure2(json.loads(json.dumps(RUNS)))
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "resin: test MSE 0.01300 ± 0.00141 over 2 seeds",
        "relu->sin: test MSE 0.50000; 1 of 2 seeds diverged",
        "sin: 1 of 1 seeds diverged",
        "tanh: test MSE 0.01510",
    ]


def test_every_panel_has_samples_and_clean_function_and_the_fits_over_them():
    data, expected = Bessel(CPU), (2, 1, 0, 1)
    for ax, fits in zip(draw_figure2(RUNS).axes, expected, strict=True):
        samples, clean, *lines = ax.lines
        assert samples.get_ydata() == pytest.approx(data.y_train.flatten())
        assert clean.get_ydata() == pytest.approx(j0(clean.get_xdata()), abs=1e-6)
        assert len(lines) == fits
        assert all(len(line.get_xdata()) == 401 for line in lines)
        low, high = ax.get_ylim()
        assert low < data.y_train.min()
        assert high > data.y_train.max()


def test_fit_of_the_first_seed_is_on_top_and_the_others_are_light():
    *_, other, first = draw_figure2(RUNS).axes[0].lines
    assert (first.get_label(), other.get_label()) == ("fit of seed 0", "other seeds")
    assert (first.get_ydata()[0], other.get_ydata()[0]) == (0.1, 0.2)
    assert other.get_alpha() < first.get_alpha() == 1


def test_no_runs_are_no_picture():
    with pytest.raises(ValueError, match="at least one network"):
        draw_figure2([])


def test_without_matplotlib_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from transfer_surgery.reproduce.draw_figure2 import draw_figure2\n"
        "draw_figure2([])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: plots need matplotlib: pip install 'transfer-surgery[plots]'" in run.stderr
