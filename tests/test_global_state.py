"""What belongs to the whole process is as it was after each public call."""

import logging
import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.backends import cuda, cudnn, mha

import transfer_surgery as ts
from transfer_surgery._running import as_written
from transfer_surgery.reports import plot_activation, plot_gates
from transfer_surgery.units import compiler_error

X = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))


class Noisy(nn.Module):
    """Draws random numbers of each kind, in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-3 * (torch.rand(()) + random.random() + np.random.rand())


def noisy() -> nn.Sequential:
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), Noisy(), nn.Linear(8, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


SPEC = ts.ModelSpec(f"{__file__}:plain", input_size=(4,))


def converted(make: Callable[[], nn.Sequential], target: str = "sin") -> nn.Sequential:
    return ts.convert(make(), target, example_input=X, seed=0)


def baked() -> nn.Sequential:
    return ts.bake(ts.swap_targets(converted(plain)))


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ts.wrap_optimizer(optimizer, model, transfer=ts.TransferSchedule(2, start=0))
    optimizer.step()
    ts.structural_risk(model).backward()


# Each takes a model or two, which are made before, and a folder.
CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], object]]] = {
    "find_activations": (noisy, lambda m, _: ts.find_activations(m, X)),
    "convert": (noisy, lambda m, _: ts.convert(m, granularity="neuron", example_input=X)),
    "match_targets": (
        lambda: converted(noisy),
        lambda m, _: ts.match_targets(m, X.split(32), weights="gradient", refit=True),
    ),
    "sensitivity": (lambda: converted(noisy), lambda m, _: ts.sensitivity(m, X.split(32))),
    "swap_targets": (
        lambda: converted(noisy),
        lambda m, _: ts.swap_targets(m, keep=0.5, batches=[X]),
    ),
    "swap_activations": (
        noisy,
        lambda m, _: ts.swap_activations(m, "sin", X.split(16), distill_steps=30, lr=0.01),
    ),
    "distill": (
        lambda: (ts.swap_targets(converted(noisy)), noisy()),
        lambda ms, _: ts.distill(*ms, X.split(32), steps=2),
    ),
    "report": (lambda: converted(noisy), lambda m, _: str(ts.report(m))),
    "record": (lambda: ts.History(converted(noisy)), lambda history, _: history.record(1)),
    "bake": (lambda: converted(noisy), lambda m, _: ts.bake(ts.swap_targets(m))),
    "revert": (lambda: converted(noisy), lambda m, _: ts.revert(m)),
    "fold_targets": (
        lambda: ts.bake(ts.swap_targets(converted(noisy))),
        lambda m, _: ts.fold_targets(m, X),
    ),
    "train": (lambda: converted(plain), lambda m, _: train(m)),
    "recompute": (
        lambda: converted(plain).eval(),
        lambda m, _: ts.recompute_activations(m)(X).sum().backward(),
    ),
    "plots": (
        lambda: converted(noisy),
        lambda m, _: (plot_gates(m), plot_activation(m, "1", batches=[X])),
    ),
    "gates": (
        lambda: (converted(plain), plain()),
        lambda ms, f: (
            ts.save_gates(ms[0], f / "gates"),
            ts.load_gates(ms[1], f / "gates", example_input=X),
        ),
    ),
    "model": (
        lambda: converted(plain),
        lambda m, f: (ts.save_model(m, f / "model", SPEC), ts.load_model(f / "model")),
    ),
    "baked": (
        lambda: ts.swap_targets(converted(plain)),
        lambda m, f: (ts.save_baked(m, f / "baked", SPEC), ts.load_baked(f / "baked")),
    ),
    "program": (baked, lambda m, f: ts.export_program(m, X, f / "net.pt2")),
    "compiler": (lambda: torch.device("cpu"), lambda device, _: compiler_error(device)),
    "onnx": (baked, lambda m, f: ts.export_onnx(m, X, f / "net.onnx")),
}


SLOW = ("compiler", "onnx")


def state() -> dict[str, Any]:
    loggers = [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "cudnn": (cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "precision": (torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32),
        "kernels": (cuda.flash_sdp_enabled(), mha.get_fastpath_enabled()),
        "denormals": torch.tensor(1e-40).mul(1).item(),
        "warnings": list(warnings.filters),
        "printing": (vars(torch._tensor_str.PRINT_OPTS), np.get_printoptions(), np.geterr()),
    } | {f"logger {log.name}": (log.level, log.disabled, log.propagate) for log in loggers}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in CALLS]
)
def test_calls_leave_the_state_of_the_process_alone(name: str, tmp_path: Path) -> None:
    make, call = CALLS[name]
    made, before = make(), state()
    call(made, tmp_path)
    after = state()
    assert {key: after[key] for key in before} == before


def test_what_the_user_draws_for_distill_is_drawn_from_the_users_numbers() -> None:
    """Else a test set that is drawn afterwards could be the very batches of the training."""
    model = ts.swap_targets(converted(plain))
    given: list[Tensor] = []

    def batches() -> Any:
        for _ in range(3):
            given.append(torch.randn(8, 4))
            yield given[-1]

    torch.manual_seed(5)
    ts.distill(model, plain(), batches(), steps=3)
    given.append(torch.randn(8, 4))
    torch.manual_seed(5)
    plain()  # the teacher
    assert torch.equal(torch.cat(given), torch.cat([torch.randn(8, 4) for _ in range(4)]))


DRAWN: list[float] = []


class Beside(nn.Module):
    """While it runs, another thread draws a random number."""

    def forward(self, x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: DRAWN.append(torch.rand(()).item()))
        thread.start()
        thread.join()
        return torch.relu(x)


def test_what_another_thread_draws_while_a_model_is_examined_does_not_come_again() -> None:
    torch.manual_seed(0)
    ts.convert(Beside(), example_input=X)
    DRAWN.append(torch.rand(()).item())
    torch.manual_seed(0)
    assert len(DRAWN) > 1
    assert [torch.rand(()).item() for _ in DRAWN] == DRAWN


def test_code_compiles_again_after_two_threads_have_run_it_as_written():
    compiled = []

    @torch.compile(backend=lambda graph, example: compiled.append(graph) or graph)
    def double(x):
        return 2 * x

    one, other = as_written(), as_written()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    double(torch.ones(2))
    assert not compiled
    other.__exit__(None, None, None)
    double(torch.ones(2))
    assert compiled
