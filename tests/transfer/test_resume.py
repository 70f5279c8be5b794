"""A training that is killed and resumed in a new process ends as if nothing had happened.

The training is `resume_script`: kill -9 in mid-transfer, two ways to write checkpoints.
"""

import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import resume_script
from tests.helpers.same_bits import assert_same_bits

CASES = [
    ("sgd", "whole", "outside"),
    ("sgd gamma", "parts", "writing"),
]


def start(folder, setting, route, moment=""):
    script = [sys.executable, "-W", "error", resume_script.__file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([*script, str(folder), setting, route, moment], **pipes)


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0
    return output


def killed(process, moment):
    """Wait for its end by SIGKILL, which it gives to itself or gets from here."""
    with process:
        if moment == "outside":
            assert process.stdout.readline() == "starts at 0\n"
            assert process.stdout.readline() == "kill me\n"
            process.kill()
        return process.wait() == -signal.SIGKILL


def final(folder):
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.fixture
def one_thread():
    """As in the script: for so small a network more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of trainings that nothing interrupted and that wrote no checkpoints."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = start(folder, ",".join(setting for setting, _, _ in CASES), "none")
    yield lambda setting: process.wait() == 0 and folder / setting
    process.communicate()


@pytest.mark.parametrize(("setting", "route", "moment"), CASES)
def test_a_killed_training_ends_like_an_uninterrupted_one_bit_for_bit(
    setting, route, moment, tmp_path, uninterrupted
):
    assert killed(start(tmp_path, setting, route, moment), moment)
    folder = tmp_path / setting
    assert not (folder / "final.pt").exists()
    assert bool(list(folder.glob("*.tmp"))) == (moment == "writing")
    last = resume_script.EVERY if moment == "writing" else 2 * resume_script.EVERY
    assert finish(start(tmp_path, setting, route)) == f"starts at {last}\n"
    assert_same_bits(final(folder), final(uninterrupted(setting)))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("route", ["whole", "parts"])
@pytest.mark.parametrize("setting", resume_script.SETTINGS)
def test_every_setting_resumes_bit_for_bit_in_mid_transfer(setting, route, tmp_path):
    save, resume = resume_script.ROUTES[route]
    run = resume_script.start(setting, seed=0)
    for step in range(1, resume_script.STEPS + 1):
        resume_script.train_step(*run)
        if step == resume_script.KILLED_WRITING:
            save(tmp_path, step, run, dying=False)
            open_gates = {n: v.clone() for n, v in run[0].state_dict().items() if "gate" in n}
    end = [run[0].state_dict(), run[1].state_dict(), torch.get_rng_state()]
    # Not at either end, where the gates would draw no noise and the schedule would not move them.
    assert any(((gates > -8) & (gates < 6)).any() for gates in open_gates.values())
    step, resumed = resume(tmp_path, setting)
    assert all(torch.equal(resumed[0].state_dict()[n], gates) for n, gates in open_gates.items())
    for _ in range(step, resume_script.STEPS):
        resume_script.train_step(*resumed)
    assert_same_bits([resumed[0].state_dict(), resumed[1].state_dict(), torch.get_rng_state()], end)
