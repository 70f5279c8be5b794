"""save_gates: whole or not at all, also when it is killed; without safetensors a clear message."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.checkpoints import X, chain, saved, spread
from transfer_surgery import ModelSpec, convert, load_gates, save_gates, save_model
from transfer_surgery.files import replace_file


def put(file, data):
    replace_file(file, lambda path: path.write_bytes(data))


def test_a_model_without_gates_is_not_saved(file):
    with pytest.raises(ValueError, match=r"call convert\(model, \.\.\.\) first"):
        save_gates(chain(), file)
    assert not file.exists()


def foreign(file):
    save_file({"foreign": torch.ones(3)}, file)


def a_model_of(model, file):
    save_model(model, file, ModelSpec("net.py:make"))


def a_model(file):
    a_model_of(convert(chain(), example_input=X), file)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (foreign, "was written by another program, not by transfer_surgery"),
        (
            lambda file: file.write_bytes(b"other program"),
            "is damaged, or is not a safetensors file",
        ),
        (a_model, "holds 'model', not gates"),
        (lambda file: file.mkdir(), "is a folder"),
        (lambda file: file.symlink_to(os.devnull), "is not a file"),
    ],
)
def test_a_file_that_holds_something_else_is_not_replaced(write, message, file):
    write(file)
    before = not file.is_file() or file.read_bytes()
    model = convert(chain(), example_input=X)
    with pytest.raises(ValueError, match=f"saved.safetensors {message}.* It is not replaced"):
        save_gates(model, file)
    assert before == (not file.is_file() or file.read_bytes())
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_saving_again_replaces_what_was_there(file):
    saved(file, gate="line")
    model = spread(convert(chain(), example_input=X), seed=2)
    save_gates(model, file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    loaded = load_gates(chain(), file, example_input=X)
    assert torch.equal(loaded[1].log_alpha, model[1].log_alpha)


@pytest.mark.parametrize("save", [save_gates, a_model_of])
def test_gates_that_are_not_a_number_do_not_replace_good_ones(save, file):
    model = convert(chain(), example_input=X)
    save(model, file)
    before = file.read_bytes()
    model[1].log_alpha.data[2] = torch.nan
    with pytest.raises(
        ValueError, match=r"1\.gate\.log_alpha has values that are not a number.*saved"
    ):
        save(model, file)
    assert file.read_bytes() == before


def test_weights_that_are_not_a_number_are_saved(file):
    model = convert(chain(), example_input=X)
    model[0].bias.data[2] = torch.nan
    a_model_of(model, file)


def test_an_empty_file_is_replaced_and_folders_are_made(file):
    file.touch()
    saved(file)
    saved(file.parent / "new" / "folder" / "file")


# --- the file itself -----------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    put(file, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                put(file, b"new")
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_bytes() == b"old"


def test_the_folder_in_between_has_another_name_each_time_and_is_closed_to_others(file):
    folders = []

    def write(path):
        folders.append(path.parent)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        path.touch()

    replace_file(file, write)
    replace_file(file, write)
    assert len({*folders, file.parent}) == 3
    assert not any(folder.exists() for folder in folders)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_the_mode_is_that_of_any_new_file(file):
    before = os.umask(0o027)
    try:
        put(file, b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_the_mode_stays_that_of_the_file_that_is_replaced(file):
    put(file, b"old")
    file.chmod(0o600)
    put(file, b"new")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_link_stays_and_what_it_points_to_is_replaced(file):
    target = file.with_name("target")
    file.symlink_to(target.name)
    for data in (b"old", b"new"):  # at first there is nothing where it points to
        put(file, data)
        assert file.is_symlink()
        assert not target.is_symlink()
        assert target.read_bytes() == data


# A process with torch in it is forked for each moment at which a save can be killed: whenever it
# opens or renames a file, and when a file has some length. Forking needs a process of one thread.
_KILLED_SAVES = """
import os, resource, signal, sys
import torch
from torch import nn
from transfer_surgery import ModelSpec, convert, load_gates, save_gates, save_model

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

def is_killed(kill, moment):
    folder = os.path.join(sys.argv[1], f"{kill.__name__} {moment}")
    file = os.path.join(folder, "gates")
    save_gates(gates(1.0), file)
    process = os.fork()
    if process == 0:
        kill(moment, folder) if kill is kill_at else kill(moment)
        save_gates(gates(2.0, "cos"), file)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    unit = load_gates(base(), file, X)[1]
    print(unit.target, unit.log_alpha.unique().item())
    return os.WIFSIGNALED(status)

for length in range(0, 900, 100):
    is_killed(kill_at_length, length)
moment = 1
while is_killed(kill_at, moment):
    moment += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_save_killed_at_any_moment_leaves_the_old_or_the_new_gates(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", _KILLED_SAVES, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert set(lines) == {"sin 1.0", "cos 2.0"}
    assert lines[0] == "sin 1.0"
    assert lines[-1] == "cos 2.0"


# --- safetensors is optional ---------------------------------------------------------------------


def test_without_safetensors_the_message_says_how_to_get_it(file, monkeypatch):
    model = saved(file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (save_gates, load_gates):
        with pytest.raises(ImportError, match=r"pip install 'transfer-surgery\[checkpoints\]'"):
            call(model, file)


def test_importing_the_package_does_not_need_safetensors():
    code = "import sys, transfer_surgery; assert 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
