"""benchmarks/kernel.py says plainly where it can measure nothing; its speeds are no test."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernel.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure")
def test_without_a_gpu_it_says_that_it_needs_one():
    done = subprocess.run([sys.executable, str(BENCHMARK)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "No CUDA device" in done.stdout
