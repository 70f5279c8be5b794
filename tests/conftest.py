"""What every test gets: one thread per worker, a seed, no network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before the imports below, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that a test starts

import hypothesis
import pytest
import torch

from transfer_surgery.activations import registry as activations

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: a test that would download fails at once and says so."""
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
        if host != "localhost" and host != "::1" and not host.startswith("127."):
            raise RuntimeError(f"tests work offline, but this one connects to {host}")


sys.addaudithook(_refuse_network)


class _TorchRandom:
    """Torch's generator as hypothesis wants it: every example starts from the same state."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_torch_random = _TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(_torch_random)
# No deadline: the first call of a kernel is slow. In CI the same examples every time.
hypothesis.settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("project")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def own_registry() -> Iterator[None]:
    """A test's activations do not outlive it."""
    tables = [(table, dict(table)) for table in (activations._REGISTRY, activations.CALLS)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with `cifar10.npz` and `weights/` that TRANSFER_SURGERY_DATA names."""
    folder = os.environ.get("TRANSFER_SURGERY_DATA")
    if not folder:
        pytest.skip(
            "needs real data: set TRANSFER_SURGERY_DATA to a folder with cifar10.npz and weights/"
        )
    return Path(folder)
