"""Doing the jobs of an experiment: train with train.py, measure, keep one line per measurement; in several processes.

What is measured already is not done again, so an experiment that was stopped goes on. A run is trained in pieces,
`--steps 10`, then `--resume --steps 25` and so on, and measured between them; train.py makes that the same run as one
without a stop. Processes share no state, so results do not depend on their number.
"""
import contextlib
import gc
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import lora
import train
from experiments.protocol import Job, Training
from experiments.report import DRAWN
from experiments.results import Results, line_of
from plumbing import files, lora_files
from plumbing.checkpoints import model_folder
from plumbing.files import ROOT, InputError
from plumbing.options import option, parse
from tiny.processes import Clock, work
from plumbing.run_folder import STATE
from plumbing.train_options import NONE
from tiny.score import Judge

STUDENT = "student.safetensors"     # what train.py makes


@dataclass
class Common:
    """Options of all long experiments."""
    quick: bool = option(False, "a small version: one seed, few steps and prompts")
    report: bool = option(False, "run nothing: the table of the results that are there")
    workers: int = option(1, "number of processes, each with one thread")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded, which is tiny/model")
    out: str | None = option(None, "folder of results (default: experiments/results, with --quick a folder in out/)")


class Laboratory:
    """Trains and measures; one per process."""

    def __init__(self, model: Path, runs: Path, examiner: Callable, number: int = 0) -> None:
        """runs: folder of training runs. examiner(judge) gives what measures: (measurement, adapter) -> measures.
        number: of the process; each has a cache of its own, as two may not write the same file at once."""
        torch.set_num_threads(1)
        self.model, self.runs, self.cache, self.judge = model, runs, runs / f"cache{number}", Judge(model)
        self.examine = examiner(self.judge)

    def log(self, job: Job) -> Path:
        """What train.py prints."""
        return self.runs / job.training.name / "log.txt"

    def do(self, job: Job) -> Iterator[dict]:
        """A line for every measurement of a job, as soon as it is made."""
        seconds, adapter = self.train(job, job.step) if job.step else (0.0, None)
        for measurement in job.measurements:
            if job.training.is_trained:
                seconds, adapter = self.train(job, measurement.step)
            yield line_of(measurement, job, seconds, self.examine(measurement, adapter))
        gc.collect()

    def train(self, job: Job, step: int) -> tuple[float, lora.Adapter]:
        """Train or continue until `step`; seconds that all steps so far took, and the student."""
        folder = self.runs / job.training.name
        saved = {saved_step(folder / name) for name in (STATE, STUDENT)}
        if folder.exists() and (max(saved) > step or not saved_step(folder / STATE)):   # lost its measurement, or was
            shutil.rmtree(folder)                                                       # killed early: start anew
        if saved != {step}:
            self.start(job, step, *(["--resume"] if saved_step(folder / STATE) else []))
        return self.seconds(job, step), lora_files.load(folder / STUDENT, self.judge.net)

    def start(self, job: Job, step: int, *flags: str) -> None:
        """train.py until `step`."""
        folder = self.runs / job.training.name
        words = ["--model", str(self.model), "--out", str(folder), "--cache", str(self.cache),
                 *train_words(job.training, step), *job.words, *flags]
        folder.mkdir(parents=True, exist_ok=True)
        with (open(self.log(job), "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
            if train.main(words) == 130:
                raise KeyboardInterrupt

    def seconds(self, job: Job, step: int) -> float:
        """That all optimizer steps until `step` took."""
        lines = map(json.loads, (self.runs / job.training.name / "metrics.jsonl").read_text().splitlines())
        return sum(line["seconds"] for line in lines if line["step"] <= step)


def train_words(training: Training, step: int) -> list[str]:
    """The command line of train.py for a training until `step`, without data, captions to keep and folders."""
    flags = {"device": "cpu", "method": training.method, "lr": training.lr, "seed": training.seed, "steps": step,
             "sample_every": 0, "save_every": 100, **dict(training.options)}
    if flags.get("keep") != NONE:
        flags.pop("keep", None)                                     # Plan.jobs says where the captions are
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def saved_step(path: Path) -> int:
    """The optimizer step that a file of train.py was saved after; 0 if there is none."""
    if not path.is_file():
        return 0
    with files.open_safetensors(path) as file:
        return int((file.metadata() or {}).get("step", 0))


def perform(title: str, jobs: list[Job], results: Results, workers: int, make: Callable) -> list[str]:
    """Do the jobs, keep every line as it comes and print it; the names of what failed. make: see `work`."""
    count, done, failed = sum(len(job.measurements) for job in jobs), 0, []
    clock = Clock({job: job.work() for job in jobs})
    print(f"{title}: {count} measurements of {len(jobs)} runs", flush=True)
    with contextlib.closing(work(jobs, workers, make)) as messages:
        for job, message in messages:
            by_one = isinstance(message, dict) and workers == 1             # several tell of a job when it is done
            clock.does(job, 1 / len(job.measurements) if by_one else 1)
            if isinstance(message, dict):
                results.add(message)
                done += 1
                found = message["measures"]
                print(f"  {done}/{count}, {clock}  {message['run']}, step {message['step']}",
                      *(f" {name} {found[name]:.3f}" for name in DRAWN if name in found), flush=True)
            elif message is not None:
                failed.append(job.training.name)
                print(f"error: {job.training.name}: {message}", file=sys.stderr, flush=True)
    return failed


def exit_status(failed: list[str]) -> int:
    if failed:
        print(f"error: failed runs: {len(failed)}, first {failed[0]}; see above, then start again", file=sys.stderr)
    return 1 if failed else 0


def results_folder(options, name: str) -> Path:
    """Where the program `name` writes, by its options --out and --quick. Raises InputError on --workers 0."""
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: no process to work in; give 1 or more")
    default = ROOT / "out" / f"quick-{name}" if options.quick else ROOT / "experiments" / "results"
    return Path(options.out or default)


def program_of(name: str, about: str, whole, quick, run: Callable, write: Callable, argv: list[str] | None) -> int:
    """A smaller experiment; the exit status. whole, quick: settings. run(settings, out, workers, model) measures,
    write(results, out) makes the tables of NAME.jsonl."""
    options = parse(Common, argv, about)
    out = results_folder(options, name)
    if options.report:
        write(Results(out / f"{name}.jsonl"), out)
        return 0
    return run(quick if options.quick else whole, out, options.workers, model_folder(options.model))
