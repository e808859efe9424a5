"""A run and its folder: the state between two steps, saving and resuming it, its log, and what it was made with."""
import dataclasses
import functools
import importlib.metadata
import math
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from lora import Tuned
from plumbing import report
from plumbing.checkpoints import EMBEDDED
from plumbing.files import (ROOT, InputError, append_json_line, check_ours, keep_json_lines, open_safetensors,
                            read_json, real, write_json, write_tensors)
from plumbing.full import Full
from plumbing.lora_files import header
from plumbing.machine import disk_gb, in_words, peak_memory_gb, training_gb
from plumbing.quantized import FLOAT
from plumbing.recipes import Recipe
from plumbing.team import ALONE, Team, put
from plumbing.train_options import FULL, LORA, ONLY_LORA, names_of

# Options that may differ when a run is resumed: they change the rounding at most, or the data's fingerprint has them.
FREE = ("out", "steps", "save_every", "sample_every", "resume", "panel_prompt", "cache", "compile", "checkpointing",
        "device", "data", "keep", "caption", "save_all", "config")
STATE = "state.safetensors"
TRAINED = (STATE, "student.safetensors", "teacher.safetensors", "student", "teacher")


def out_folder(cfg) -> Path:
    """The folder of a run."""
    return Path(cfg.out or Path("out") / "+".join(names_of(cfg.data)))


def open_run(cfg, out: Path, fingerprint: dict[str, str], processes: int) -> None:
    """Check that `out` can become a run of these options, or is one to resume. Raises InputError; writes nothing."""
    if real(out) in map(real, cfg.data):
        raise InputError(f"--out {out}: this is the folder of --data; choose another --out")
    if cfg.resume:
        for name in (STATE, "config.json"):
            if not (out / name).is_file():
                raise InputError(f"--resume: {out / name}: no such file, so no run to continue; restore it, or "
                                 "leave --resume out to start one")
        config = read_json(out / "config.json", "options")
        before = {"quantize": FLOAT, "name": "student"} | config["options"]      # which an earlier version did not have
        if (earlier := config.get("processes", 1)) != processes:        # may share the same batches in another way
            batches, now = before["accumulate"] * earlier, cfg.accumulate * processes
            if batches != now:
                way = f"give --accumulate {batches // processes}" if batches % processes == 0 else \
                    f"which {processes} processes cannot share evenly, so take another number of them"
                raise InputError(f"--resume: --accumulate {cfg.accumulate} in {processes} processes is {now} batches "
                                 f"in a step, the run has {batches}; {way}, or start a new run with another --out")
            before["accumulate"] = cfg.accumulate
        for name, value in dataclasses.asdict(cfg).items():
            if name not in FREE and plain(before.get(name, value)) != plain(value):
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before[name]} and is now {value}; "
                                 "give the same value, or start a new run with another --out")
        known = config.get("data")                                      # of an earlier version one hash, which tells
        if differs := [what for what, value in fingerprint.items() if not isinstance(known, str)    # nothing any more
                       and (known if isinstance(known, dict) else {}).get(what) != value]:
            raise InputError(f"--resume: {' and '.join(differs)} are not those that this run began with (--data "
                             f"{', '.join(cfg.data)}); restore them, or start a new run with another --out")
        return
    if found := [name for name in (*TRAINED, f"{cfg.name}.safetensors") if os.path.exists(out / name)]:
        way = "continue it with --resume" if STATE in found else f"its {STATE} is gone, so move it away"
        raise InputError(f"--out {out}: holds another run ({found[0]}); {way}, or choose another --out")
    check_ours(out, f"--out {out}")


def plain(value):
    """An option's value with every path in one spelling."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if value == "embedded":
        return str(real(EMBEDDED))
    return str(real(value)) if isinstance(value, str) and value and os.path.exists(value) else value


@contextmanager
def alone(out: Path, team: Team = ALONE) -> Iterator[None]:
    """Keep other runs out of a run's folder; the system lets go of it however this one ends. Raises InputError."""
    if not team.is_first:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            import fcntl                                                # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"--out {out}: another process trains there; wait until it ends, or choose another "
                             "--out") from None
        except (ImportError, OSError):                                  # Windows, or a file system without locks
            pass
        yield


class Run:
    """A run between two steps: what is tuned, its optimizer, the number of steps done, and where all this is kept."""

    def __init__(self, cfg, out: Path, tuned: Tuned | Full, with_teacher: bool) -> None:
        """with_teacher: whether the teacher's adapter is worth a file of its own."""
        self.cfg, self.out, self.tuned, self.team = cfg, out, tuned, tuned.team
        self.with_teacher, self.step, self.header = with_teacher, 0, dict[str, str]()
        self.recent, self.lowest = deque[float](maxlen=20), math.inf    # losses, and the least that their mean was
        self.optimizer = torch.optim.AdamW(tuned.parameters().values(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8,
                                           weight_decay=0.0, foreach=None if cfg.tune == LORA else False)   # no copies

    def state(self) -> dict[str, torch.Tensor]:
        """What is tuned, and Adam's moments; themselves, not copies, and perhaps in parts."""
        return self.tuned.state() | {f"adam.{name}.{key}": value for name, parameter in self.tuned.parameters().items()
                                     for key, value in self.optimizer.state[parameter].items()}

    def save(self) -> None:
        """The adapters for other programs, then one file from which `load` continues; each whole or not at all."""
        state = self.team.gathered(self.state())
        facts = {"method": self.cfg.method, "base": Path(self.cfg.model).name, "quantize": self.cfg.quantize,
                 "step": str(self.step), **self.header}
        for folder in [self.out] + [self.out / f"step_{self.step:06d}"] * self.cfg.save_all:
            self.tuned.save(folder, facts, self.with_teacher)
        if self.team.is_first:
            write_tensors(self.out / STATE, state, {"step": str(self.step)})

    @contextmanager
    def saved_on_errors(self) -> Iterator[None]:
        """Save the last good state when something goes wrong, once there is one: errors come between whole steps."""
        try:
            yield
        except Exception:
            if self.step and self.tuned.walkers == 1:                   # else it takes all processes to save
                with suppress(InputError):                              # what went wrong first is what is told
                    self.save()
            raise
        if self.team.is_first:                                          # done, or interrupted and saved
            report.write(self.out)

    def load(self) -> None:
        """Continue from the state file. Raises InputError when it is damaged or does not belong to these options."""
        with open_safetensors(self.out / STATE) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            step = (file.metadata() or {}).get("step", "")
        for parameter in self.tuned.parameters().values():
            self.optimizer.state[parameter] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(parameter),
                                               "exp_avg_sq": torch.zeros_like(parameter)}
        own = self.state()
        wrong = own.keys() ^ state.keys() or {
            name for name, tensor in state.items() if tensor.shape != own[name].shape or tensor.dtype != torch.float32
            or not tensor.isfinite().all() or name.endswith("exp_avg_sq") and (tensor < 0).any()}
        if wrong or not step.isdecimal() or len(step) > 9:
            raise InputError(f"{self.out / STATE}: {min(wrong, default='its step')} is missing, unknown, not finite or "
                             "of another shape or kind; restore the file, or start a new run with another --out")
        self.step = int(step)
        if self.step > self.cfg.steps:
            raise InputError(f"--steps {self.cfg.steps}: the run in {self.out} has done {self.step}; give more")
        if self.step == self.cfg.steps:
            print(f"note: the run in {self.out} has done its {self.step} steps; a larger --steps goes on")
        for name, tensor in own.items():
            put(tensor, state[name])

    def log(self, loss: float, losses: dict[str, float], norm: float, seconds: float) -> str:
        """One more line of metrics.jsonl; returns it for people. losses: of each task; loss is their weighted mean."""
        if not self.team.is_first:
            return ""
        self.watch(loss)
        memory, each = peak_memory_gb(self.tuned.device), {"losses": losses} if len(losses) > 1 else {}
        append_json_line(self.out / "metrics.jsonl", {"step": self.step, "loss": loss, **each, "gradient_norm": norm,
                                                      "seconds": seconds, "peak_memory_gb": memory})
        shown = "".join(f" {name} {value:.4f}" for name, value in losses.items()) if each else f" {loss:.4f}"
        said = f"loss{shown}, grad {norm:.3f}, {seconds:.2f} s/step, {in_words(memory)}"
        if not sys.stderr.isatty() and (self.step % self.cfg.save_every == 0 or self.step == self.cfg.steps):
            print(f"step {self.step} of {self.cfg.steps}: {said}", flush=True)      # instead of a bar
        return said

    def watch(self, loss: float) -> None:
        """One line on stderr, once, when the mean of twenty losses is a hundred times what it was."""
        self.recent.append(loss)
        mean = sum(self.recent) / 20 if len(self.recent) == 20 else math.inf
        has_grown = mean > 100 * self.lowest
        if has_grown:
            print(f"warning: step {self.step}: the loss has grown a hundredfold, to {mean:.3g}; a smaller --lr may be "
                  "needed", file=sys.stderr)
        self.lowest = math.inf if has_grown else min(self.lowest, mean)

    def begin(self, recipe: str, data: dict[str, str], tasks: list) -> None:
        """Write config.json, and drop what metrics.jsonl has of later steps. data: the fingerprint of the data."""
        learned = [one.row for task in tasks if task.in_panels for one in task.dataset.examples]
        if self.cfg.tune == LORA:
            self.header = header(self.cfg, self.tuned.model, [text for row in learned for text in row.captions])
        if self.team.is_first:
            keep_json_lines(self.out / "metrics.jsonl", lambda numbers: numbers["step"] <= self.step)
            write_json(self.out / "config.json", {
                "recipe": recipe, "options": dataclasses.asdict(self.cfg), "data": data, "processes": self.team.size,
                "edits": any(row.sources for row in learned), **provenance()})


def print_summary(cfg, recipe: Recipe, folder: Path, run: Run, tasks: list) -> None:
    """What the run is about to do. tasks: of train.py."""
    shown = ("method", "loss", "rollout_steps", "grad_states", "lr", "rank", "alpha", "ema", "batch_size", "accumulate")
    memory = in_words(training_gb(cfg, folder, getattr(torch, cfg.dtype), run.tuned.model, run.team.size))
    print(f"report   {run.out / report.NAME}\nmodel    {folder} on {run.tuned.device}, {cfg.dtype}, about {memory}"
          f"{', blocks recomputed' * cfg.checkpointing}")
    values = [f"{name} {getattr(cfg, name)}" for name in shown if getattr(cfg, name) is not None
              and not (cfg.tune == FULL and name in ONLY_LORA)]
    print(f"recipe   {recipe.name}: {', '.join(values)}")
    print(f"trained  {run.tuned}" + f", in {run.team.size} processes" * (not run.team.is_alone))
    for task in tasks:
        buckets = ", ".join(f"{count} of {width}x{height}" + (f" with {sources} source(s)" if sources else "")
                            for (height, width, sources), count in task.dataset.buckets.items())
        what = "images  " if task.dataset.examples[0].row.image else "captions"
        print(f"{what} {len(task.dataset.examples)}" + f" of {task.name}" * (len(tasks) > 1) + f": {buckets}")
    disk = in_words(disk_gb(cfg, getattr(torch, cfg.dtype), run.tuned.model))
    print(f"steps    {run.step} -> {cfg.steps}, run in {run.out}, up to {disk} on disk", flush=True)


@functools.cache
def provenance() -> dict:
    """What a run was made with: versions of the packages, commit of this code."""
    packages = ("torch", "transformers", "safetensors", "einops", "pillow", "tqdm")
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, stderr=subprocess.DEVNULL, text=True)
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit.strip(), "versions": {name: importlib.metadata.version(name) for name in packages}}
