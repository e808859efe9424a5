"""train.py stopped in every way: killed, Ctrl-C, full disk, non-finite numbers; and continued bit for bit."""
import contextlib
import errno
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest
import torch
from conftest import metrics, on_each_loss, program, random_transformer
from safetensors.torch import load_file

import data
import lora
import train
from plumbing import files, run_folder
from plumbing.backbone import Backbone
from plumbing.files import ROOT, InputError
from plumbing.program import run as run_program
from plumbing.run_folder import Run

STATE = "state.safetensors"
FILES = ("student.safetensors", "teacher.safetensors", STATE)
SCHEDULE = ("--accumulate", "2", "--seed", "5")  # three pictures, batches of 2 + 1: the epoch ends within a step


def assert_same_run(a: Path, b: Path) -> None:
    """Every tensor of every file has the same bits, and every step the same numbers."""
    for name in FILES:
        left, right = load_file(a / name), load_file(b / name)
        assert left.keys() == right.keys() and len(left) > 50
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)
    assert metrics(a) == metrics(b)


# ---------------------------------------------------------------------------------------------------- a run's folder
@pytest.mark.quick
def test_names_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")
    assert run_folder.names_of(["a/star", "b/paint.v1", "rows.jsonl"]) == ["star", "paint.v1", "rows"]
    assert run_folder.names_of(["a/star", "other", "b/star"]) == ["star-1", "other", "star-3"]
    cfg = train.Options(data=["a/star", "b/paint"])
    assert run_folder.out_folder(cfg) == Path("out/star+paint")
    cfg.out = "here"
    assert run_folder.out_folder(cfg) == Path("here")


@pytest.mark.quick
def test_a_saved_run_is_loaded_with_its_optimizer(tmp_path):
    """Ten steps at once equal four, a new object from the file, and six more; without Adam's moments they do not."""
    cfg = train.Options(data=["a"], lr=1e-2, steps=10)

    def begin() -> run_folder.Run:
        return run_folder.Run(cfg, tmp_path, lora.Tuned(random_transformer(), 2, 2, seed=0), with_teacher=True)

    def walk(run: run_folder.Run, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            run.step += 1
            for i, tensor in enumerate(run.tuned.parameters().values()):
                tensor.grad = torch.full_like(tensor, (run.step * (i + 1)) % 7 - 2.9)
            run.optimizer.step()
            run.tuned.ema_(0.5)
        return [tensor.detach().clone() for tensor in run.tuned.state().values()]

    whole, part, forgetful = walk(begin(), 10), begin(), begin()
    walk(part, 4)
    part.save()
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    again = begin()
    again.load()
    assert again.step == 4
    assert all(torch.equal(a, b) for a, b in zip(whole, walk(again, 6), strict=True))
    forgetful.load()
    forgetful.optimizer.state.clear()
    assert not all(torch.equal(a, b) for a, b in zip(whole, walk(forgetful, 6), strict=True))


# ---------------------------------------------------------------------------------------------------- killed

def saved_step(out: Path) -> int:
    with files.open_safetensors(out / STATE) as file:
        return int(file.metadata()["step"])


def start(base: list[str], out: Path, *flags) -> subprocess.Popen:
    words = [*program("train.py"), *base, *SCHEDULE, "--out", str(out), *map(str, flags)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_lines(process: subprocess.Popen, out: Path, count: int) -> None:
    """Until metrics.jsonl has `count` lines."""
    deadline = time.time() + 120
    path = out / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.002)


# ---------------------------------------------------------------------------------------------------- resume
def test_killed_and_resumed_equals_uninterrupted(base, run, tmp_path):
    step = random.Random(2605).randint(6, 25)
    out = tmp_path / "killed"
    process = start(base, out, "--steps", 10 ** 6, "--save-every", 2)
    wait_for_lines(process, out, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = saved_step(out)
    assert found >= step - 2 and found % 2 == 0
    steps = ("--steps", found + 3)
    run("killed", *SCHEDULE, *steps, "--resume")
    assert_same_run(out, run("whole", *SCHEDULE, *steps))
    assert [line["step"] for line in metrics(out)] == list(range(1, found + 4))


def test_resume_in_parts_with_other_free_options(run, tmp_path):
    run("parts", *SCHEDULE, "--steps", 2)
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:      # steps after the save, the last cut off
        file.write('{"step": 3, "loss": 1.0, "gradient_norm": 1.0}\n{"step": 4, "lo')
    run("parts", *SCHEDULE, "--steps", 3, "--resume", "--save-every", 1, "--cache", tmp_path / "other_cache")
    run("parts", *SCHEDULE, "--steps", 5, "--resume", "--sample-every", 5)
    assert_same_run(tmp_path / "parts", run("whole", *SCHEDULE, "--steps", 5))
    assert (tmp_path / "parts" / "samples" / "step_000005.png").is_file()
    run("parts", *SCHEDULE, "--steps", 5, "--resume")                            # nothing left to do
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_resume_of_sft(run, tmp_path):
    flags = ("--method", "sft")
    run("parts", *flags, "--steps", 1)
    run("parts", *flags, "--steps", 3, "--resume")
    run("whole", *flags, "--steps", 3)
    left, right = load_file(tmp_path / "parts" / STATE), load_file(tmp_path / "whole" / STATE)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("flags", [
    "--keep KEPT", "--method sft", "--method dreambooth --keep KEPT", "--method pso", "--tune full --steps 1",
    "--method off-policy --noise 0.3 --seed 7 --save-all --no-checkpointing --panel-prompt x --panel-prompt y"])
def test_a_repeated_run_is_the_same(base, tmp_path, photos, capsys, monkeypatch, flags):
    """`--config` alone says all, and nothing that the recipe has filled in is remarked upon; elsewhere, a path of the
    file that is relative leads elsewhere."""
    (tmp_path / "kept.jsonl").write_text('{"text": "a red star"}\n{"text": "a blue moon"}\n')
    monkeypatch.chdir(photos.parent)
    flags = flags.replace("KEPT", str(tmp_path / "kept.jsonl")).split()
    small = base[2:base.index("--rank")] + base[base.index("--rollout-steps"):]     # --tune full takes no rank
    words = ["--data", photos.name, *small, "--steps", "2"]
    first, again = tmp_path / "first", tmp_path / "again"
    assert train.main([*words, "--out", str(first), *flags]) == 0
    config = str(first / "config.json")
    capsys.readouterr()
    assert train.main(["--config", config, "--out", str(again)]) == 0
    left, right = load_file(first / STATE), load_file(again / STATE)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert metrics(first) == metrics(again) and "no use here" not in capsys.readouterr().err
    with pytest.raises(InputError, match=f"--out {first}: holds another run .*, or choose another --out"):
        train.main(["--config", config])
    assert train.main(["--config", config, "--resume", "--steps", "3"]) == 0 and saved_step(first) == 3
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="^photos: no such folder; give a folder of images"):
        train.main(["--config", config, "--out", "more"])


def test_seed_changes_everything(run):
    first, second = run("a", "--steps", 1), run("b", "--steps", 1, "--seed", 1)
    assert metrics(first) != metrics(second)
    left, right = load_file(first / STATE), load_file(second / STATE)
    assert not torch.equal(left["student.layers.0.attention.to_q.A"], right["student.layers.0.attention.to_q.A"])


def changed(content: dict, name: str, tensor) -> dict:
    return {**content, name: tensor}


ADAM, WEIGHT = "adam.layers.0.attention.to_q.A.exp_avg", "student.layers.0.attention.to_q.A"
STATES = {  # what a state file may have been damaged to
    "without moments": lambda c: {name: t for name, t in c.items() if not name.startswith("adam.")},
    "without one moment": lambda c: {name: t for name, t in c.items() if name != ADAM},
    "a moment of another shape": lambda c: changed(c, ADAM, torch.zeros(2, 2)),
    "a moment that is not finite": lambda c: changed(c, ADAM, c[ADAM] / 0),
    "without the adapter": lambda c: {name: t for name, t in c.items() if name != WEIGHT},
    "an adapter of another rank": lambda c: changed(c, WEIGHT, torch.zeros(7, 32)),
    "an unknown tensor": lambda c: changed(c, "other", torch.zeros(2)),
    "without a step": lambda c: c, "half a file": lambda c: c, "empty": lambda c: {}}


@pytest.mark.quick
def test_damaged_states_are_one_line(run, tmp_path):
    out = run("damaged", "--steps", 1)
    content, whole = load_file(out / STATE), (out / STATE).read_bytes()
    metrics_before = (out / "metrics.jsonl").read_bytes()
    for name, damage in STATES.items():
        files.write_tensors(out / STATE, damage(content), {} if name == "without a step" else {"step": "1"})
        if name == "half a file":
            (out / STATE).write_bytes(whole[:len(whole) // 2])
        before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
        with pytest.raises(InputError, match=re.escape(str(out / STATE))):
            run("damaged", "--steps", 2, "--resume")
        assert before == {path: path.read_bytes() for path in out.iterdir() if path.is_file()}, name
    (out / STATE).write_bytes(whole)
    for tail in (b"garbage\n", b'{"a": 1}\n', b"[]\n", b'{"step": "x"}\n', b"\x00\xff\n"):
        (out / "metrics.jsonl").write_bytes(metrics_before + tail + metrics_before)
        with pytest.raises(InputError, match="metrics.jsonl: has lines that are not of this run; mend it or move it"):
            run("damaged", "--steps", 2, "--resume")
        assert (out / STATE).read_bytes() == whole
    (out / "metrics.jsonl").write_bytes(metrics_before + b'{"step": 2, \xff\x00')     # a crash cut this one off
    run("damaged", "--steps", 2, "--resume")
    assert_same_run(out, run("whole", "--steps", 2))


def test_earlier_adapters_can_be_kept(run, tmp_path):
    out = run("kept", "--steps", 3, "--save-every", 2, "--save-all")
    assert sorted(path.name for path in out.glob("step_*")) == ["step_000002", "step_000003"]
    for step in (2, 3):
        whole = run(f"to {step}", "--steps", step)
        for name in FILES[:2]:
            kept = load_file(out / f"step_{step:06d}" / name)
            for other in (whole, *([out] if step == 3 else [])):
                tensors = load_file(other / name)
                assert kept.keys() == tensors.keys() and all(torch.equal(kept[key], tensors[key]) for key in kept)


@pytest.mark.quick
def test_a_loss_that_grows_is_said_once(checkpoint, capsys):
    run = Run.__new__(Run)
    run.recent, run.lowest, run.step = deque(maxlen=20), math.inf, 7
    for loss in [1.0] * 30 + [0.1] * 30 + [9.9] * 30:                   # 99 times its lowest mean
        run.watch(loss)
    assert capsys.readouterr().err == ""
    for _ in range(60):
        run.watch(10.1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "warning: step 7: the loss has grown a hundredfold, to 10" in error
    for loss in [20.0] * 60 + [2100.0] * 60:                            # and again, from there
        run.watch(loss)
    assert capsys.readouterr().err.count("hundredfold") == 1


# ---------------------------------------------------------------------------------------------------- Ctrl-C
def test_ctrl_c_saves_and_exits_with_130(base, run, tmp_path):
    out = tmp_path / "stopped"
    process = start(base, out, "--steps", 10 ** 6, "--save-every", 10 ** 6)
    wait_for_lines(process, out, 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    step = saved_step(out)
    assert step >= 3 and [line["step"] for line in metrics(out)] == list(range(1, step + 1))
    assert f"step {step}" in errors and str(out) in errors and "--resume" in errors
    run("stopped", *SCHEDULE, "--steps", step + 2, "--resume")
    assert_same_run(out, run("whole", *SCHEDULE, "--steps", step + 2))


def press_ctrl_c(monkeypatch, times: int, call: int, number: int = signal.SIGINT) -> None:
    """Ctrl-C, or another signal, in the middle of the `call`-th evaluation of the loss."""
    count = [0]

    def pressed(loss):
        count[0] += 1
        for _ in range(times if count[0] == call else 0):
            os.kill(os.getpid(), number)
        return loss
    on_each_loss(monkeypatch, pressed)


@pytest.mark.quick
def test_ctrl_c_finishes_the_step(run, monkeypatch, capsys):
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, times=1, call=3)                                     # the first state of step 2
        out = run("stopped", "--steps", 5, status=130)
    assert saved_step(out) == 2 and "step 2" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) == handler
    assert_same_run(out, run("whole", "--steps", 2))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_system_that_shuts_down_or_hangs_up_leaves_a_saved_run(run, monkeypatch, number, status):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, times=1, call=3, number=number)
        out = run("stopped", "--steps", 5, status=status)
    assert saved_step(out) == 2 and signal.getsignal(number) == before


@pytest.mark.quick
def test_second_ctrl_c_stops_at_once(run, monkeypatch):
    press_ctrl_c(monkeypatch, times=2, call=3)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", "--steps", 5, "--save-every", 1)
    monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------- numbers
def spoil(monkeypatch, call: int, spoiled) -> None:
    """Replace the loss of the `call`-th state by spoiled(loss)."""
    count = [0]

    def wrapper(loss):
        count[0] += 1
        return spoiled(loss) if count[0] == call else loss
    on_each_loss(monkeypatch, wrapper)


SPOILED = {"loss nan": lambda loss: loss * float("nan"), "loss infinite": lambda loss: loss * float("inf"),
           "gradient only": lambda loss: loss.detach() + (loss - loss.detach()).sqrt()}


@pytest.mark.parametrize("how", SPOILED)
def test_non_finite_numbers_keep_the_last_good_state(run, monkeypatch, tmp_path, how):
    with monkeypatch.context() as patch:
        spoil(patch, 6, SPOILED[how])                                            # the second state of step 3
        with pytest.raises(InputError, match="step 3: .*--lr") as caught:
            run("bad", "--steps", 5)
    assert "\n" not in str(caught.value) and str(tmp_path / "bad") in str(caught.value)
    assert_same_run(tmp_path / "bad", run("good", "--steps", 2))
    run("bad", "--steps", 4, "--resume")
    assert_same_run(tmp_path / "bad", run("longer", "--steps", 4))


def test_exploding_learning_rate(run, tmp_path):
    with pytest.raises(InputError, match="--lr"):
        run("exploded", "--steps", 9, "--lr", "1e30", "--save-every", 1)
    state = load_file(tmp_path / "exploded" / STATE)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_non_finite_at_the_first_step(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        spoil(patch, 1, SPOILED["loss nan"])
        with pytest.raises(InputError, match="step 1: .*; nothing was learned yet, so .* or the data is broken"):
            run("bad", "--steps", 5)
    assert not (tmp_path / "bad" / STATE).exists()
    run("bad", "--steps", 2)                                            # with whatever helps
    assert_same_run(tmp_path / "bad", run("good", "--steps", 2))


# ---------------------------------------------------------------------------------------------------- other errors
@pytest.mark.parametrize("step, saved", [(1, 0), (3, 2)])
def test_an_error_in_a_step_saves_what_was_learned(run, tmp_path, monkeypatch, step, saved):
    """A cache that is gone, say. Before the first step there is nothing to save, and the folder stays free."""
    with monkeypatch.context() as patch:
        batch = data.Dataset.batch
        patch.setattr(data.Dataset, "batch", lambda self, number: batch(self, number if number < step - 1 else None))
        with pytest.raises(TypeError):
            run("broken", "--steps", 5)
    assert saved_step(tmp_path / "broken") == saved if saved else not (tmp_path / "broken" / STATE).exists()
    run("broken", "--steps", 4, *(["--resume"] if saved else []))
    assert_same_run(tmp_path / "broken", run("whole", "--steps", 4))


def test_out_of_memory_in_the_first_step_saves_nothing(run, tmp_path, monkeypatch):
    """So that the remedies that are named, a smaller rank, say, help in the same folder."""
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with monkeypatch.context() as patch:
        on_each_loss(patch, exhausted)
        with pytest.raises(torch.OutOfMemoryError):
            run("small", "--steps", 2)
    run("small", "--steps", 2, "--rank", 1)


@pytest.mark.quick
def test_a_computer_without_memory_is_one_line(capsys):
    def exhausted():
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:126] err == 0. DefaultCPUAllocator: can't allocate memory: "
                           "you tried to allocate 64 bytes. Error code 12 (Cannot allocate memory)")
    with pytest.raises(SystemExit) as caught:
        run_program(exhausted)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "64 bytes" in said and "--batch-size" in said
    with pytest.raises(RuntimeError, match="another"):
        run_program(lambda: (_ for _ in ()).throw(RuntimeError("another")))


# ---------------------------------------------------------------------------------------------------- resources
def no_space(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_saving_keeps_the_previous_state(run, tmp_path, monkeypatch):
    """The n-th file of a resumed run cannot be written, for every n; each time the run can still be continued."""
    whole = run("whole", "--steps", 4)
    for n in range(1, 20):
        run(f"full{n}", "--steps", 2)
        fsync, count = os.fsync, [0]

        def failing(descriptor):
            count[0] += 1
            (no_space if count[0] == n else fsync)(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", failing)
            try:
                run(f"full{n}", "--steps", 4, "--resume")
                break
            except InputError as error:
                assert "No space left" in str(error) and "free some space" in str(error) and "\n" not in str(error)
        assert not list((tmp_path / f"full{n}").rglob("*.tmp"))
        assert saved_step(tmp_path / f"full{n}") in (2, 4)              # saved at the second attempt, or as before
        run(f"full{n}", "--steps", 4, "--resume")
        assert_same_run(tmp_path / f"full{n}", whole)
    assert n >= 5                                                # at least config, student, teacher and state failed


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_while_logging(run, tmp_path):
    out = run("full", "--steps", 2)
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(InputError, match="metrics.jsonl: .*[Ss]pace"):
        run("full", "--steps", 4, "--resume")
    assert saved_step(out) == 3                                         # of the step whose line was not written
    (out / "metrics.jsonl").unlink()
    run("full", "--steps", 4, "--resume")
    assert torch.equal(*(load_file(path / STATE)["student.layers.0.attention.to_q.B"]
                         for path in (out, run("whole", "--steps", 4))))


def test_out_of_memory_names_the_options(base, tmp_path, monkeypatch, capsys):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 8 GiB")
    on_each_loss(monkeypatch, exhausted)
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: train.main([*base, "--out", str(tmp_path / "small")]))
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert caught.value.code == 2 and len(errors) == 1
    for word in ("out of memory", "2.00 GiB", "--batch-size", "--size", "--rank", "--checkpointing", "--accumulate"):
        assert word in errors[0]


def test_out_of_memory_in_a_later_step_loses_nothing(run, tmp_path, monkeypatch):
    """Steps since the last save are kept, and the advice given (--checkpointing) can be followed on --resume."""
    calls = []

    def exhausted_in_step_3(loss):
        calls.append(1)
        if len(calls) > 2 * 2:                                         # K = 2 states a step
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss
    on_each_loss(monkeypatch, exhausted_in_step_3)
    with pytest.raises(torch.OutOfMemoryError):
        run("small", "--steps", 4, "--save-every", 100)
    assert saved_step(tmp_path / "small") == 2
    monkeypatch.undo()
    run("small", "--steps", 4, "--resume", "--checkpointing")
    whole = load_file(run("whole", "--steps", 4) / STATE)
    for name, tensor in load_file(tmp_path / "small" / STATE).items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-6)


def test_interrupted_before_the_loop_is_130(base, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(Backbone, "load", interrupted)
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: train.main([*base, "--out", str(tmp_path / "early")]))
    assert caught.value.code == 130 and "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    assert train.main([*base, "--out", str(tmp_path / "early"), "--steps", "1"]) == 0


def test_saved_adapters_are_never_newer_than_needed(run, tmp_path, monkeypatch):
    """Stopped between student.safetensors and the state file: the state is the older one, and the run continues."""
    run("cut", "--steps", 2)
    save, count = lora.save, [0]

    def stopped(*args):
        save(*args)
        count[0] += 1
        if count[0] == 1:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(lora, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            run("cut", "--steps", 3, "--resume")
    assert saved_step(tmp_path / "cut") == 2
    run("cut", "--steps", 4, "--resume")
    assert_same_run(tmp_path / "cut", run("whole", "--steps", 4))


def test_resume_with_edited_data_is_refused(base, run, photos, tmp_path):
    """Same path, same options, another caption: the run would silently become another one."""
    data = tmp_path / "data"
    data.mkdir()
    for file in photos.iterdir():
        (data / file.name).write_bytes(file.read_bytes())
    run("edited", "--data", data, "--steps", 1)
    before = (tmp_path / "edited" / STATE).read_bytes()
    (data / "0.txt").write_text("a big red star")
    with pytest.raises(InputError, match="--resume: captions are not those that this run began with"):
        run("edited", "--data", data, "--steps", 2, "--resume")
    assert (tmp_path / "edited" / STATE).read_bytes() == before


def test_a_foreign_config_is_not_overwritten(run, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"dim": 3840}')
    with pytest.raises(InputError, match="holds something else"):
        run("foreign", "--steps", 1)
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["config.json"]


# ------------------------------------------------------------------------------------------------ one folder, one run
@pytest.mark.parametrize("name", FILES)
def test_trained_weights_are_never_overwritten(run, tmp_path, name):
    """Also where the state is gone."""
    out = run("first", "--steps", 1)
    for other in FILES:
        if other != name:
            (out / other).unlink()
    before = (out / name).read_bytes()
    with pytest.raises(InputError, match=rf"^--out .*first: holds another run \({name}\); " + (
            "continue it with --resume" if name == STATE else "its state.safetensors is gone, so move it away")):
        run("first", "--steps", 1)
    assert (out / name).read_bytes() == before


def test_the_folder_of_the_data_is_no_folder_for_a_run(run, tmp_path, photos):
    content = sorted(photos.iterdir())
    with pytest.raises(InputError, match="^--out .*: this is the folder of --data; choose another --out$"):
        run("x", "--out", photos / ".." / photos.name)
    assert sorted(photos.iterdir()) == content


def test_one_process_at_a_time(run, tmp_path):
    """A second start and a second resume are refused while one runs, and go on after it, even if it was killed."""
    out = run("shared", "--steps", 1)
    program = ("import sys, time; from pathlib import Path; from plumbing.run_folder import alone\n"
               "with alone(Path(sys.argv[1])):\n    print('there', flush=True); time.sleep(600)")
    with subprocess.Popen([sys.executable, "-c", program, str(out)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"there\n"
        before = (out / "config.json").read_bytes()
        with pytest.raises(InputError, match="^--out .*shared: another process trains there; wait until it ends"):
            run("shared", "--steps", 2, "--resume")
        assert (out / "config.json").read_bytes() == before
        other.kill()
    run("shared", "--steps", 2, "--resume")
    assert saved_step(out) == 2


def test_two_starts_of_one_run(run, tmp_path, monkeypatch):
    """Who was still encoding while another began and ended does not write over it."""
    load = train.load

    def late(*parts):
        monkeypatch.setattr(train, "load", load)
        with monkeypatch.context() as patch:
            patch.setattr(train, "alone", lambda *_: contextlib.nullcontext())
            run("twice", "--steps", 1)
        return load(*parts)
    monkeypatch.setattr(train, "load", late)
    with pytest.raises(InputError, match="holds another run"):
        run("twice", "--steps", 2)
    assert saved_step(tmp_path / "twice") == 1


def test_a_run_that_is_done(run, tmp_path, capsys):
    """Fewer steps are refused before config.json is written; the same number says how to go on."""
    out = run("done", "--steps", 3)
    before = (out / "config.json").read_bytes()
    with pytest.raises(InputError, match="^--steps 2: the run in .*done has done 3; give more$"):
        run("done", "--steps", 2, "--resume")
    assert (out / "config.json").read_bytes() == before
    capsys.readouterr()
    run("done", "--steps", 3, "--resume")
    assert "has done its 3 steps; a larger --steps goes on" in capsys.readouterr().out


def test_other_spellings_of_the_same_paths(run, tmp_path, photos, checkpoint, monkeypatch):
    """A slash more, a relative path, data that has moved: the same run."""
    run("spelled", "--steps", 1)
    monkeypatch.chdir(checkpoint.parent)
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    run("spelled", "--steps", 2, "--resume", "--data", f"{moved}/", "--model", checkpoint.name)
    assert saved_step(tmp_path / "spelled") == 2


def test_without_a_terminal_steps_are_lines_and_the_end_says_where_things_are(run, capsys):
    out = run("lines", "--steps", 5, "--save-every", 2, "--sample-every", 5)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("step ", "done "))]
    assert [line.split(":")[0] for line in said[:3]] == ["step 2 of 5", "step 4 of 5", "step 5 of 5"]
    assert said[3] == f"done     {out / 'student.safetensors'}, report in {out / 'report.html'}" and "loss" in said[0]
