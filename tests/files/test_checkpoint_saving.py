"""save_gates: whole or not at all, also when it is killed; without safetensors a clear message."""

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.checkpoints import X, chain, saved, spread
from transfer_surgery import convert, load_gates, save_gates


def test_a_model_without_gates_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match=r"call convert\(model, \.\.\.\) first"):
        save_gates(chain(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_config_of_another_program_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    model = convert(chain(), example_input=X)
    with pytest.raises(ValueError, match=r"another program.* into a folder of their own"):
        save_gates(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_saving_again_replaces_what_was_there(tmp_path):
    saved(tmp_path, gate="line")
    saved(tmp_path)
    model = spread(convert(chain(), example_input=X), seed=2)
    save_gates(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "gates.safetensors"]
    loaded = load_gates(chain(), tmp_path, example_input=X)
    assert torch.equal(loaded[1].log_alpha, model[1].log_alpha)


# A process with torch in it is forked for each moment at which a save can be killed: whenever it
# opens or renames a file, and when a file has some length. Forking needs a process of one thread.
_KILLED_SAVES = """
import os, resource, signal, sys
import torch
from torch import nn
from transfer_surgery import convert, load_gates, save_gates

torch.set_num_threads(1)
X = torch.zeros(1, 4)

def base():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU())

def gates(number, target="sin"):
    model = convert(base(), target, example_input=X)
    model[1].log_alpha.data.fill_(number)
    return model

def kill_at(moment, folder):
    events = 0
    def watch(event, args):
        nonlocal events
        if event == "os.rename" or (event == "open" and str(args[0]).startswith(folder)):
            events += 1
            if events == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)

def kill_at_length(length):
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, length))

def is_killed(target, kill, moment):
    folder = os.path.join(sys.argv[1], f"{target} {kill.__name__} {moment}")
    save_gates(gates(1.0), folder)
    process = os.fork()
    if process == 0:
        kill(moment, folder) if kill is kill_at else kill(moment)
        save_gates(gates(2.0, target), folder)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    try:
        unit = load_gates(base(), folder, X)[1]
        print(target, unit.target, unit.log_alpha.unique().item())
    except ValueError as error:
        assert "are of different saves" in str(error), error
        print(target, "refused")
    return os.WIFSIGNALED(status)

for target in ("sin", "cos"):
    for length in range(0, 800, 100):
        is_killed(target, kill_at_length, length)
    moment = 1
    while is_killed(target, kill_at, moment):
        moment += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_gates(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _KILLED_SAVES, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    same, other = ([state for to, state in lines if to == target] for target in ("sin", "cos"))
    assert same[0] == other[0] == "sin 1.0"
    assert set(same) == {"sin 1.0", "sin 2.0"}
    assert set(other) == {"sin 1.0", "refused", "cos 2.0"}
    assert same[-1] == "sin 2.0"
    assert other[-1] == "cos 2.0"


# --- safetensors is optional ---------------------------------------------------------------------


def test_without_safetensors_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    model = convert(chain(), example_input=X)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_gates, load_gates):
        with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[checkpoints\]'"):
            call(model, tmp_path)


def test_importing_the_package_does_not_need_safetensors():
    code = "import sys, transfer_surgery; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
