"""A job leaves its result and nothing else, is not done twice, and outlives a kill."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, run_jobs
from machine import Machine
from protocol import Protocol

SHORT = Protocol(epochs=6, batch_size=128, lr=0.01, gamma=0.1, init="alpha")


def job(folder: Path, row: str = "resin->sin", protocol: Protocol = SHORT, **more: Any) -> Job:
    threads = torch.get_num_threads()  # a job sets them for its process, here that of the tests
    return Job("bessel", row, 1, protocol, Machine(threads=threads), folder, **more)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_job_leaves_its_result_and_nothing_else(tmp_path):
    folder = tmp_path / "new" / "folder"
    result = job(folder).run()
    assert names(folder) == ["resin-to-sin-1.json"]
    assert json.loads(job(folder).file.read_text()) == result == job(folder).finished()
    assert result["settings"] == {"task": "bessel", "limit": None} | SHORT.to_dict()
    assert (result["seed"], result["machine"]["device"]) == (1, "cpu")
    assert result["curve"]["epoch"] == [1, 2, 3, 4, 5, 6]
    assert str(tmp_path) not in json.dumps(result)


def test_finished_jobs_are_yielded_first_and_not_done_again(tmp_path):
    jobs = [job(tmp_path, row) for row in ("Copy", "resin->sin")]
    done = jobs[1].run()
    written = jobs[1].file.stat()
    results = list(run_jobs(jobs, workers=1))
    assert results[0] == done
    assert names(tmp_path) == ["copy-1.json", "resin-to-sin-1.json"]
    again = jobs[1].file.stat()
    assert (again.st_ino, again.st_mtime_ns) == (written.st_ino, written.st_mtime_ns)
    assert list(run_jobs(jobs, workers=1, minutes=0)) == [results[1], results[0]]


def test_results_of_other_settings_are_refused_before_anything_is_run(tmp_path):
    job(tmp_path).run()
    for other in (job(tmp_path, protocol=replace(SHORT, gamma=0.2)), job(tmp_path, limit=7)):
        with pytest.raises(ValueError, match=r"resin-to-sin-1\.json was made with other settings"):
            next(run_jobs([job(tmp_path, "relu"), other], workers=1))
    assert names(tmp_path) == ["resin-to-sin-1.json"]
    faster = replace(job(tmp_path), machine=Machine(precision="bf16"))
    assert faster.finished() is not None


def test_a_job_whose_time_is_up_keeps_a_checkpoint_for_its_own_settings(tmp_path):
    assert job(tmp_path / "none", until=time.time()).run() is None
    assert not (tmp_path / "none").exists()
    first = job(tmp_path, protocol=replace(SHORT, epochs=100_000), until=time.time() + 2)
    assert first.run() is None
    assert not first.file.exists()
    epoch = torch.load(first.checkpoint, weights_only=True)["epoch"]
    assert 1 <= epoch < 100_000
    assert f"epoch {epoch} of 100000" in first.file.with_suffix(".log").read_text()
    assert job(tmp_path).run()["curve"]["epoch"] == [1, 2, 3, 4, 5, 6]
    assert first.checkpoint.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import trainer
from jobs import Job
from machine import Machine
from protocol import Protocol

save = trainer.Training.save

def save_or_die(training, file):
    if training.epoch == 4:
        file.with_suffix(".part").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(training, file)

trainer.SAVE_EVERY = 0.0
trainer.Training.save = save_or_die
protocol = Protocol(epochs=6, batch_size=128, lr=0.01, gamma=0.1, init="alpha")
Job("bessel", "resin->sin", 1, protocol, Machine(), Path(sys.argv[2])).run()
"""


@pytest.mark.slow  # a process; in this one, test_trainer stops and resumes
def test_a_job_killed_while_it_writes_goes_on_from_its_last_checkpoint(tmp_path):
    folder = str(Path(__file__).parents[1])
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, str(tmp_path / "killed")])
    assert killed.returncode == -signal.SIGKILL
    again, whole = job(tmp_path / "killed"), job(tmp_path / "whole")
    assert torch.load(again.checkpoint, weights_only=True)["epoch"] == 3
    resumed, expected = again.run(), whole.run()
    for key in ("curve", "sites", "fit", "conv", "best", "diverged", "settings"):
        assert resumed[key] == expected[key]
    assert again.finished() == resumed
    assert not again.checkpoint.exists()
