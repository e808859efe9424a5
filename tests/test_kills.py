"""Runs killed at random moments, by three signals, then started again with the same command: the run without a stop.

`KILLS=100 python -m pytest tests/test_kills.py -n 2` is the long form; the suite does one.
"""
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_resume import SCHEDULE, STATE, assert_same_run, start

import train

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
STEPS = ("--steps", "12", "--save-every", "3", "--sample-every", "4")


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> tuple[list[str], Path, float]:
    """The command, the folder of a run without a stop, and its seconds. The cache is in the run's own folder."""
    words = [*base[:base.index("--cache")], *SCHEDULE, *STEPS]
    folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
    start(words, folder).communicate()
    return words, folder, time.monotonic() - began


@pytest.mark.parametrize("number", range(int(os.environ.get("KILLS", 1))))
def test_killed_at_a_random_moment(whole, tmp_path, number):
    """Encoding, stepping, saving, drawing: wherever it is hit, the features are not cached before."""
    rng, out, (words, folder, seconds) = random.Random(number), tmp_path / "killed", whole
    for attempt in range(4):
        resume = ["--resume"] if (out / STATE).exists() else []
        if not resume:                                                  # killed between the first files, perhaps
            for side in ("student", "teacher"):
                (out / f"{side}.safetensors").unlink(missing_ok=True)
        process = start([*words, *resume], out)
        try:
            process.wait(rng.uniform(0.3, 1) * seconds if attempt < 3 else None)
        except subprocess.TimeoutExpired:
            process.send_signal(rng.choice(SIGNALS))
        _, errors = process.communicate()
        assert "Traceback" not in errors or "KeyboardInterrupt" in errors, errors
    assert process.returncode == 0, errors
    assert_same_run(out, folder)
    panels = [sorted((run / "samples").iterdir()) for run in (out, folder)]
    assert [path.name for path in panels[0]] == [path.name for path in panels[1]]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*panels))
    assert train.main([*words, "--out", str(out), "--resume"]) == 0     # done, and nothing is broken
