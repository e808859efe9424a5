"""Several processes that train one model: two of them on the CPU make the steps of one with as many batches."""
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics
from safetensors import safe_open
from safetensors.torch import load_file

import train
from plumbing.files import ROOT, InputError
from plumbing.full import tuned_of
from plumbing.team import Team, leave

EACH = """import json, sys
import train
from plumbing import program
from plumbing.team import leave
program.run(lambda: leave(max(train.main(words) for words in json.loads(sys.argv[1]))))
"""


def started(script: Path, words: list[str], processes: int = 2) -> subprocess.CompletedProcess:
    """A script in processes that torchrun starts."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*start, str(script), *words], capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def together(runs: list[list[str]]) -> subprocess.CompletedProcess:
    """train.main of each, one after the other, in two processes."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(EACH)
        script.flush()
        return started(Path(script.name), [json.dumps(runs)])


@pytest.mark.quick
def test_who_takes_which_batch():
    """Over a step, all batches of one process with more of them, each once."""
    for step in (0, 3):
        alone = list(Team().numbers(step, 6))
        assert alone == list(range(6 * step, 6 * step + 6))
        for size in (2, 3):
            shared = [list(Team(rank, size).numbers(step, 6 // size)) for rank in range(size)]
            assert sorted(sum(shared, [])) == alone and {len(part) for part in shared} == {6 // size}
    tensors = [torch.ones(2), None]
    Team().mean_(tensors)
    assert torch.equal(tensors[0], torch.ones(2)) and Team().any(3) == 3
    Team().wait("nobody"), Team().check_same({"code": "a"})


def nearly(a: Path, b: Path, files: tuple[str, ...]) -> float:
    """The largest difference between tensors of the same name."""
    worst = 0.0
    for name in files:
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys() and len(left) > 10
        worst = max(worst, *(float((left[key] - right[key]).abs().max()) for key in left))
    return worst


ADAPTERS = ("student.safetensors", "teacher.safetensors")
NETWORKS = tuple(f"{side}/transformer/diffusion_pytorch_model.safetensors" for side in ("student", "teacher"))


def test_two_processes_make_the_steps_of_one(base, tmp_path):
    """LoRA and all weights: ten steps of two with one batch each, as of one with two; also stopped in between, and
    continued alone."""
    lora, full = ["--steps", "10", "--sample-every", "5"], ["--tune", "full", "--lr", "1e-3", "--sample-every", "4"]
    base = [*base[:base.index("--cache")], "--cache", str(tmp_path / "features")]       # which the first run fills
    words = {"lora": [*base, *lora], "full": [*base[:base.index("--rank")], *base[base.index("--alpha") + 2:], *full]}
    runs = [[*words["lora"], "--out", str(tmp_path / "lora")],
            [*words["full"], "--steps", "3", "--out", str(tmp_path / "full")],
            [*words["full"], "--steps", "5", "--out", str(tmp_path / "full"), "--resume"],
            [*words["full"], "--steps", "3", "--out", str(tmp_path / "states"), "--grad-states", "1",
             "--sample-every", "0"]]
    done = together(runs)
    assert done.returncode == 0, done.stderr
    for kind, files, steps in (("lora", ADAPTERS, "10"), ("full", NETWORKS, "5")):
        alone = tmp_path / f"{kind} alone"
        assert train.main([*words[kind], "--steps", steps, "--accumulate", "2", "--out", str(alone)]) == 0
        assert nearly(tmp_path / kind, alone, files) < 1e-5
        ours, theirs = metrics(tmp_path / kind), metrics(alone)
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        assert all(abs(line["loss"] - other["loss"]) < 1e-4 for line, other in zip(ours, theirs))
        panels = [{path.name for path in (out / "samples").iterdir()} for out in (tmp_path / kind, alone)]
        assert panels[0] - {"step_000003.png"} == panels[1] and len(panels[1]) > 2     # where the first one stopped
    # One process goes on where two stopped; the other way round its batches have to be shared evenly.
    again = [*words["full"], "--out", str(tmp_path / "full"), "--resume", "--steps", "6"]
    with pytest.raises(InputError, match="--accumulate 1 in 1 processes is 1 batches in a step, the run has 2; give "
                                         "--accumulate 2"):
        train.main(again)
    assert train.main([*again, "--accumulate", "2"]) == 0
    assert train.main([*words["full"], "--steps", "6", "--accumulate", "2", "--out", str(tmp_path / "full alone"),
                       "--resume"]) == 0
    assert nearly(tmp_path / "full", tmp_path / "full alone", NETWORKS) < 1e-5


def test_bad_input_is_told_once(base, tmp_path):
    words = [*base[:base.index("--cache")], "--steps", "1", "--out", str(tmp_path / "run")]
    done = together([[*words, "--rank", "0"]])
    assert done.returncode != 0 and done.stderr.count("error: --rank 0: not a usable number") == 1
    assert not (tmp_path / "run").exists()


SECOND = """import os, signal, sys, time
import train
from plumbing import program
how, *words = sys.argv[1:]
clip = train.clip_and_check
def third(run, *rest):
    if run.step == 2 and run.team.rank == 1:
        if how == "fails":
            raise ValueError("the second process is broken")
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(0.5)
    return clip(run, *rest)
train.clip_and_check = third
if how == "differs" and os.environ["RANK"] == "1":
    words += ["--seed", "1"]
program.run(lambda: train.main(words))
"""


@pytest.mark.parametrize("how", ["fails", "is stopped", "differs"])
def test_all_end_together(base, tmp_path, how):
    """One that fails, Ctrl-C, other options: nobody waits for ever, and the last good state is kept."""
    words = [*base[:base.index("--cache")], "--steps", "1000", "--save-every", "1000", "--out", str(tmp_path / "run")]
    (tmp_path / "second.py").write_text(SECOND)
    done = started(tmp_path / "second.py", [how, *words])
    assert done.returncode != 0
    if how == "differs":
        assert "process 1 of 2 has other options than process 0" in done.stderr
        return
    if how == "fails":
        assert "the second process is broken" in done.stderr and "error: another process has ended" in done.stderr
    with safe_open(tmp_path / "run" / "state.safetensors", "pt") as file:
        steps = int(file.metadata()["step"])
    assert steps == 2 if how == "fails" else 2 < steps < 10
    out = ["--out", str(tmp_path / "run"), "--accumulate", "2", "--resume"]
    assert train.main([*words, *out, "--steps", str(steps + 1)]) == 0


@pytest.mark.quick
@pytest.mark.parametrize("several, asked", [(True, [7]), (False, [])])
def test_one_of_several_does_not_tidy_up(monkeypatch, several, asked):
    """Python's own end let gloo's thread abort some finished runs, and `torchrun` called them failed."""
    ended = []
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: several)
    monkeypatch.setattr("os._exit", ended.append)
    assert leave(7) == 7 and ended == asked


@pytest.mark.quick
def test_full_dreambooth_is_for_one_process(checkpoint):
    with pytest.raises(InputError, match="--method dreambooth: with --tune full not in several processes"):
        tuned_of(SimpleNamespace(tune="full", method="dreambooth"), checkpoint, None, torch.float32, Team(0, 2), None)
