"""save_gates: whole or not at all, also when it is killed; without safetensors a clear message."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import X, chain, full_disk, saved, spread
from transfer_surgery import (
    ModelSpec,
    bake,
    convert,
    export_program,
    load_gates,
    save_gates,
    save_model,
)
from transfer_surgery.files import read_gates, replace_file


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
    assert load_file(file)["0.bias"].isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="another user")
def test_files_and_folders_of_another_user_are_refused_by_name():
    with tempfile.TemporaryDirectory() as folder:
        file, other = Path(folder, "saved"), Path(folder, "other")
        model = saved(file)
        file.chmod(0)
        other.mkdir()
        Path(folder).chmod(0o711)
        os.seteuid(65534)
        try:
            for use in (read_gates, lambda path: save_gates(model, path)):
                with pytest.raises(PermissionError, match="saved"):
                    use(file)
            with pytest.raises(OSError, match=r"other/gates cannot be written: .*Permission"):
                save_gates(model, other / "gates")
        finally:
            os.seteuid(0)
        assert not list(other.iterdir())


def test_an_empty_file_is_replaced_and_folders_are_made(file):
    file.touch()
    for path in (file, file.parent / "new" / "folder" / "file"):
        saved(path)
        assert read_gates(path).keys() == {"1"}


@pytest.mark.parametrize("save", [save_gates, a_model_of])
def test_a_part_of_gates_is_not_saved(save, file):
    model = convert(chain(), example_input=X)
    model[1].gate.log_alpha = torch.nn.Parameter(torch.zeros(0))  # a rank's part under FSDP 1
    with pytest.raises(ValueError, match=r"1: log_alpha has the shape \(0,\) .*use fully_shard"):
        save(model, file)
    assert not file.exists()


def test_tied_views_and_transposed_weights_come_back(file):
    model = convert(chain(), example_input=X)
    weight = torch.randn(3, 4)
    for name, value in (("one", weight), ("same", weight), ("part", weight[1:]), ("t", weight.T)):
        model.register_buffer(name, value)
    a_model_of(model, file)
    found = load_file(file)
    assert torch.equal(found["one"], weight)
    assert torch.equal(found["same"], weight)
    assert torch.equal(found["part"], weight[1:])
    assert torch.equal(found["t"], weight.T)


@pytest.mark.parametrize(
    "value",
    [torch.eye(3).to_sparse(), torch.ones(3, device="meta")],
    ids=["sparse", "meta"],
)
def test_values_that_are_no_dense_tensors_are_refused_by_name(value, file):
    model = convert(chain(), example_input=X)
    model.register_buffer("odd", value)
    with pytest.raises(ValueError, match=r"^odd is no dense tensor of numbers: .* is not written"):
        a_model_of(model, file)
    assert not file.exists()


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks of memory")
def test_saving_takes_no_second_copy_of_the_model(file):
    model = convert(chain(), example_input=X)
    model.register_buffer("large", torch.ones(2**24))  # 64 MiB
    for _ in range(2):  # into a new file, and over it
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory("VmRSS")
        a_model_of(model, file)
        assert memory("VmHWM") - before < 32 * 2**10


def memory(name):
    """A line of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@pytest.mark.skipif(os.name != "posix", reason="limits of files")
def test_a_full_disk_is_an_os_error_and_leaves_the_old_file(file):
    model = saved(file)
    before = file.read_bytes()
    plain = bake(convert(chain(), example_input=X)).eval()
    with full_disk():
        for path in (file, file.parent / "new" / "folder" / "saved.safetensors"):
            with pytest.raises(OSError, match=r"saved\.safetensors cannot be written: .*"):
                save_gates(model, path)
        with pytest.raises(OSError, match=r"program\.pt2 cannot be written: .*too large"):
            export_program(plain, X, file.with_name("program.pt2"))
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# --- the file itself -----------------------------------------------------------------------------


def test_a_failure_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    put(file, b"old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *_: 1 / 0)
            with pytest.raises(OSError, match="cannot be written: division by zero"):
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
    other = file.with_name("gates")
    before = os.umask(0o027)
    try:
        put(file, b"data")
        saved(other)
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE(other.stat().st_mode) == 0o640


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
