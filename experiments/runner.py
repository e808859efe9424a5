"""Doing the jobs of an experiment: train with train.py, measure, keep one line per measurement; in several processes.

What is measured already is not done again, so an experiment that was stopped goes on. A run is trained in pieces,
`--steps 10`, then `--resume --steps 25` and so on, and measured between them; train.py makes that the same run as one
without a stop. Processes share no state, and each has one thread and models of its own, so results do not depend on
their number.
"""
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import connection
from pathlib import Path

import torch

import lora
import train
from experiments.protocol import Job, Training
from experiments.results import Results, line_of
from plumbing import files, lora_files
from plumbing.files import ROOT, InputError
from plumbing.run_folder import STATE
from tiny.score import Judge

STUDENT = "student.safetensors"     # what train.py makes
PATIENCE = 30                       # seconds that an interrupted worker has to finish its step and save
Processes = dict[connection.Connection, multiprocessing.Process]


# ---------------------------------------------------------------------------------------------------- one job
class Laboratory:
    """Trains and measures; one per process."""

    def __init__(self, model: Path, runs: Path, examiner: Callable, number: int = 0) -> None:
        """runs: folder of training runs. examiner(judge) gives what measures: (measurement, adapter) -> measures.

        number: of the process; each has a cache of its own, as two may not write the same file at once.
        """
        torch.set_num_threads(1)
        self.model, self.runs, self.cache = model, runs, runs / f"cache{number}"
        self.judge = Judge(model)
        self.examine = examiner(self.judge)

    def log(self, training: Training) -> Path:
        """What train.py prints."""
        return self.runs / training.name / "log.txt"

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
        saved = [saved_step(folder / name) for name in (STATE, STUDENT)]
        if max(saved) > step:                                       # its measurement was lost: start anew
            shutil.rmtree(folder)
            saved = [0, 0]
        if saved != [step, step]:
            words = [*job.words, "--model", str(self.model), "--out", str(folder), "--cache", str(self.cache),
                     *train_words(job.training, step), *(["--resume"] if saved[0] else [])]
            folder.mkdir(parents=True, exist_ok=True)
            with (open(self.log(job.training), "a") as file, contextlib.redirect_stdout(file),
                  contextlib.redirect_stderr(file)):
                status = train.main(words)
            if status == 130:
                raise KeyboardInterrupt
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return (sum(line["seconds"] for line in lines if line["step"] <= step),
                lora_files.load(folder / STUDENT, self.judge.net))


def train_words(training: Training, step: int) -> list[str]:
    """The command line of train.py for a training until `step`, without data and folders."""
    flags = {"device": "cpu", "method": training.method, "lr": training.lr, "seed": training.seed, "steps": step,
             "sample_every": 0, "save_every": 100, **dict(training.options)}
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def saved_step(path: Path) -> int:
    """The optimizer step that a file of train.py was saved after; 0 if there is none."""
    if not path.is_file():
        return 0
    with files.open_safetensors(path) as file:
        return int((file.metadata() or {}).get("step", 0))


# ---------------------------------------------------------------------------------------------------- all jobs
def perform(title: str, jobs: list[Job], results: Results, workers: int, make: Callable) -> list[str]:
    """Do the jobs, keep every line as it comes and print it; the names of what failed. make: see `work`."""
    count, done, failed = sum(len(job.measurements) for job in jobs), 0, []
    print(f"{title}: {count} measurements of {len(jobs)} runs", flush=True)
    with contextlib.closing(work(jobs, workers, make)) as messages:
        for job, message in messages:
            if isinstance(message, dict):
                results.add(message)
                done += 1
                print(f"  {done}/{count}  {in_words(message, results)}", flush=True)
            elif message is not None:
                failed.append(job.training.name)
                print(f"error: {job.training.name}: {message}", file=sys.stderr, flush=True)
    return failed


def in_words(line: dict, results: Results) -> str:
    """The most important of a line."""
    shown = [f"{name} {line['measures'][name]:.3f}" for name in ("concept", "ordinary", "ordinary, decided")
             if name in line["measures"]]
    usual = line["sampler"] == results.facts["recipe"]["inference_steps"]
    sampler = "" if usual else f", {line['sampler']} solver steps"
    return f"{line['run']}, step {line['step']}{sampler}  {'  '.join(shown)}"


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


# ---------------------------------------------------------------------------------------------------- processes
def attempt(laboratory, job: Job) -> Iterator[dict | str | None]:
    """The lines of one job, then None; or, for what goes wrong in it, the reason and the log: the others go on."""
    try:
        yield from laboratory.do(job)
    except (Exception, SystemExit) as error:                        # argparse leaves with SystemExit
        log = laboratory.log(job.training)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        yield f"{reason.splitlines()[0]} (log: {log})"
    else:
        yield None


def work(jobs: list[Job], workers: int, make: Callable) -> Iterator[tuple[Job, dict | str | None]]:
    """Do the jobs, in this process or in several; yields every message of `attempt` with its job.

    make(number) gives the laboratory of a process. Stops all work when the caller stops asking.
    """
    if workers > 1:
        yield from in_processes(jobs, min(workers, len(jobs)), make)
    elif jobs:
        threads, laboratory = torch.get_num_threads(), make(0)
        try:
            for job in jobs:
                for message in attempt(laboratory, job):
                    yield job, message
        finally:
            torch.set_num_threads(threads)


def serve(pipe: connection.Connection, make: Callable) -> None:
    """The life of a worker process: jobs come through the pipe until it is closed, messages go back."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()                        # Ctrl-C of a terminal reaches the parent only, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        laboratory = make()
        while True:
            for message in attempt(laboratory, pipe.recv()):
                pipe.send(message)


def stop_with_parent() -> None:
    """Wait until the parent is gone, however it ended, then end this process as Ctrl-C would."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def start(count: int, make: Callable) -> Processes:
    """Worker processes by their pipes. Ctrl-C does nothing to them until they can handle it."""
    context, found = multiprocessing.get_context("spawn"), {}
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            found[ours] = context.Process(target=serve, args=(theirs, partial(make, number)), daemon=True)
            found[ours].start()
            theirs.close()
    finally:
        signal.signal(signal.SIGINT, handler)
    return found


def stop(processes: Processes, busy: set[connection.Connection]) -> None:
    """One Ctrl-C for each that is busy, time to save, then the end. The others end with their pipe."""
    for pipe, process in processes.items():
        if pipe in busy and process.is_alive():
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGINT)
        pipe.close()
    for process in processes.values():
        process.join(PATIENCE)
        process.terminate()


def in_processes(jobs: list[Job], workers: int, make: Callable) -> Iterator[tuple[Job, dict | str | None]]:
    """`work` in several processes: who is free gets the next job."""
    waiting, doing, processes = list(jobs), {}, start(workers, make)

    def next_job(pipe: connection.Connection) -> None:
        doing.pop(pipe, None)
        if waiting:
            doing[pipe] = waiting.pop(0)
            pipe.send(doing[pipe])
    try:
        for pipe in processes:
            next_job(pipe)
        while doing:
            for pipe in connection.wait(list(doing)):
                job = doing[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    del doing[pipe]
                    message = "its process ended; is there enough memory for all workers?"
                else:
                    if not isinstance(message, dict):
                        next_job(pipe)
                yield job, message
        for job in waiting:
            yield job, "all processes have ended"
    finally:
        stop(processes, set(doing))
