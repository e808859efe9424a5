"""experiments/, the parts that need no model: statistics against enumeration, worker processes with made-up jobs."""
import itertools
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tiny import processes
from tiny.comparison import bootstrap, mean_and_spread, paired, sign_flip
from experiments.protocol import Job, Training
from plumbing.files import ROOT, InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- statistics
def test_sign_flips_against_enumeration():
    d = [0.3, -0.1, 0.25, 0.4, 0.05]
    observed = abs(sum(d) / 5)
    means = [abs(sum(s * x for s, x in zip(signs, d)) / 5) for signs in itertools.product((-1, 1), repeat=5)]
    assert sign_flip(d) == pytest.approx(sum(mean >= observed - 1e-12 for mean in means) / 32)
    assert sign_flip([1.0] * 10) == 2 / 2 ** 10                          # only all plus and all minus are as large
    assert sign_flip([0.0] * 5) == sign_flip([0.7]) == 1
    d = torch.randn(14, generator=seeded(0)) + 0.4
    assert sign_flip(d.tolist(), exact=0) == pytest.approx(sign_flip(d.tolist()), abs=0.01)
    assert sign_flip([1.0] * 30) == pytest.approx(1 / 20_001)


@pytest.mark.quick
def test_intervals_and_pairs():
    low, high = bootstrap(torch.randn(400, generator=seeded(1)).tolist())
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(2 ** 0.5)) and mean_and_spread([4.0]) == (4.0, 0.0)

    def lines(**values):
        return [{"concept": name[0], "seed": int(name[1]), "measures": {"concept": v}} for name, v in values.items()]
    found = paired(lines(a0=.5, a1=.7, b0=.9, c0=1.), lines(b0=.4, a1=.6, a0=.3, d0=0.), "concept")
    assert found.count == 3 and found.mean == pytest.approx((.2 + .1 + .5) / 3)
    assert found.p == 2 / 8 and found.p_concepts == 2 / 4
    assert paired(lines(a0=.5), lines(b0=.5), "concept") is None


# ---------------------------------------------------------------------------------------------------- processes
class Fake:
    """A laboratory without models: what a job does depends on its name."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder

    def log(self, job: Job) -> Path:
        return self.folder / f"{job.training.name}.txt"

    def do(self, job: Job):
        yield {"name": job.training.name}
        if job.training.name == "fails":
            raise InputError("so it goes")
        if job.training.name == "dies":
            os._exit(3)
        if job.training.name == "slow":
            (self.folder / "begun").touch()
            time.sleep(1)
            (self.folder / "ended").touch()
        if job.training.name == "late":
            (self.folder / "too late").touch()


@pytest.mark.quick
def test_one_process_goes_on_after_a_failure(tmp_path):
    jobs = [Job(Training(name)) for name in ("fails", "works")]
    found = [(job.training.name, message) for job, message in processes.work(jobs, 1, partial(Fake, tmp_path))]
    assert found == [("fails", {"name": "fails"}), ("fails", f"so it goes (log: {tmp_path / 'fails.txt'})"),
                     ("works", {"name": "works"}), ("works", None)]
    assert "InputError: so it goes" in (tmp_path / "fails.txt").read_text()


def messages_by_job(tmp_path: Path, *names: str) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in names}
    for job, message in processes.work([Job(Training(name)) for name in names], 2, partial(Fake, tmp_path)):
        found[job.training.name].append(message)
    return found


def test_several_processes_go_on_after_a_failure(tmp_path):
    found = messages_by_job(tmp_path, "fails", "works", "also")
    assert found == {"fails": [{"name": "fails"}, f"so it goes (log: {tmp_path / 'fails.txt'})"],
                     "works": [{"name": "works"}, None], "also": [{"name": "also"}, None]}


def test_a_process_that_is_killed_is_said_of_every_job_that_is_left(tmp_path):
    jobs = [Job(Training("dies")) for _ in range(4)]
    messages = [message for _, message in processes.work(jobs, 2, partial(Fake, tmp_path))]
    assert messages == ["a process ended; is there enough memory for all workers?"] * 4


def test_a_job_in_work_is_ended_and_none_begins_when_the_parent_stops(tmp_path):
    """Which is what Ctrl-C in the parent leads to."""
    jobs = [Job(Training(name)) for name in ("slow", "works", *("slow",) * 2, *("late",) * 8)]
    messages = processes.work(jobs, 2, partial(Fake, tmp_path))
    while next(messages)[0].training.name != "works" or not (tmp_path / "begun").exists():
        pass
    messages.close()
    assert (tmp_path / "ended").exists() and not (tmp_path / "too late").exists()


@pytest.mark.quick
def test_time_left_by_hand(monkeypatch):
    """Jobs of 10, 20 and 70: with the first and half of the second a fifth is done, so four times as long is left."""
    now = [100.0]
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    clock = processes.Clock({"a": 10, "b": 20, "c": 70})
    assert str(clock) == "time left unknown"
    clock.does("a", 1 / 2), clock.does("a", 1 / 2), clock.does("a"), clock.does("b", 0.5)
    now[0] = 100 + 5 * 60
    assert str(clock) == "about 20 min left"
    clock.does("c")                                                      # which failed: nothing is left of it
    now[0] = 100 + 9 * 60
    assert str(clock) == "about 1 min left"
    clock.does("b")
    assert str(clock) == "less than a minute left" and str(processes.Clock({})) == "time left unknown"


# ---------------------------------------------------------------------------------------------------- the programs
@pytest.mark.parametrize("start, folder", [(["-m", "experiments.table"], ROOT),
                                           ([str(ROOT / "experiments" / "table.py")], None)])
def test_a_module_and_a_file_are_the_same_program(start, folder, tmp_path):
    """The file is started in a folder of the user's, where a file with the name of one of our modules does no harm."""
    (tmp_path / "data.py").write_text("raise SystemExit('not this file')")
    ended = subprocess.run([sys.executable, *start, "--workers", "0"], cwd=folder or tmp_path, capture_output=True,
                           text=True)
    assert (ended.returncode, ended.stderr) == (2, "error: --workers 0: no process to work in; give 1 or more\n")
