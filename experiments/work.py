"""Doing the jobs: train with train.py, measure, hand back one line per measurement; alone or in several processes.

A run is trained in pieces, `--steps 10`, then `--resume --steps 25` and so on, and measured between them; train.py
makes that the same run as one without a stop. Processes share no state, and each has one thread and models of its own,
so results do not depend on their number.
"""
import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection
from pathlib import Path

import torch

import lora
import train
from experiments.concepts import Concept
from experiments.measure import Examiner, validate
from experiments.protocol import BASE, TEACHER, VALIDATION, Job, Measurement, Plan, Training
from experiments.results import line_of
from plumbing import files
from plumbing.files import InputError
from plumbing.pictures import save_png
from tiny.score import Judge
from tiny.world import grid

Message = tuple[str, object]    # ("line", dict), and at the end ("done", None) or ("failed", reason and log)
PATIENCE = 30                   # seconds that an interrupted worker has to finish its step and save


class Laboratory:
    """Trains and measures; one per process."""

    def __init__(self, plan: Plan, concepts: list[Concept], model: Path, out: Path, number: int = 0) -> None:
        """number: of the process; each has a cache of its own, as two may not write the same file at once."""
        torch.set_num_threads(1)
        self.plan, self.model, self.out = plan, model, out
        self.concepts = {concept.name: concept for concept in concepts}
        self.cache = out / "runs" / f"cache{number}"
        self.judge = Judge(model)
        self.examiner = Examiner(self.judge, plan.settings)

    def folder(self, run: Training) -> Path:
        return self.out / "runs" / run.name

    def log(self, run: Training) -> Path:
        """What train.py prints."""
        return self.folder(run) / "log.txt"

    def do(self, job: Job) -> Iterator[dict]:
        """A line for every point of a job, as soon as it is measured."""
        for point, groups in zip(job.measurements, job.groups):
            kind, passes, seconds, adapter = "", 0, 0.0, None
            if point.training.method == VALIDATION:
                s = self.plan.settings
                measures = validate(self.judge.reader, s.draw_seed, s.validation_scenes, s.diverse_noises)
            else:
                concept = self.concepts[point.training.concept]
                kind = concept.kind
                if point.training.is_trained:
                    seconds, adapter = self.train(point.training, point.step, concept)
                    passes = self.plan.passes(point.training, point.step)
                measures, shown, prompts = self.examiner.examine(concept, adapter, point.sampler,
                                                                 with_picture=point.training.method == TEACHER)
                self.keep_pictures(point, groups, shown, prompts)
            yield line_of(point, groups, kind, passes, seconds, measures)
        gc.collect()

    def train(self, run: Training, step: int, concept: Concept) -> tuple[float, lora.Adapter]:
        """Train or continue until `step`; seconds that all steps so far took, and the student."""
        folder = self.folder(run)
        saved = [saved_step(folder / name) for name in (train.STATE, "student.safetensors")]
        if max(saved) > step:                                       # its measurement was lost: start anew
            shutil.rmtree(folder)
            saved = [0]
        words = ["--data", str(concept.folder), "--model", str(self.model), "--out", str(folder), "--cache",
                 str(self.cache), *train_words(run, step), *(["--resume"] if saved[0] else [])]
        seconds = call_train(words, folder, self.log(run), step)
        return seconds, lora.load(folder / "student.safetensors", self.judge.net)

    def keep_pictures(self, point: Measurement, groups: tuple[str, ...], shown: list, prompts: list[str]) -> None:
        """A strip for the panel: of table 1, first seed, of the concepts that the curves are about."""
        run = point.training
        in_table = run.method in (BASE, TEACHER) or (
            "table 1" in groups and run.seed == self.plan.settings.seeds[0])
        if in_table and point.sampler == self.plan.sampler and run.concept in self.plan.curve_concepts:
            strip = grid(torch.stack([p for p in shown if p is not None]), columns=len(shown), scale=1)
            save_png(strip, picture_file(self.out, run), {"prompts": json.dumps(prompts)})


def call_train(words: list[str], folder: Path, log: Path, step: int) -> float:
    """Run train.py into `folder`, with what it prints in `log`; seconds that its steps until `step` took."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        status = train.main(words)
    if status == 130:
        raise KeyboardInterrupt
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return sum(line["seconds"] for line in lines if line["step"] <= step)


def train_words(run: Training, step: int) -> list[str]:
    """The command line of train.py for a run until `step`, without its folders."""
    flags = {"device": "cpu", "method": run.method, "lr": run.lr, "seed": run.seed, "steps": step, "sample_every": 0,
             "save_every": 100, **dict(run.options)}
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def picture_file(out: Path, run: Training) -> Path:
    """Pictures of a run for the panel."""
    return out / "pictures" / f"{run.concept}_{Training(run.method).name}.png"


def saved_step(path: Path) -> int:
    """The optimizer step that a file of train.py was saved after; 0 if there is none."""
    if not path.is_file():
        return 0
    with files.open_safetensors(path) as file:
        return int((file.metadata() or {}).get("step", 0))


# ---------------------------------------------------------------------------------------------------- processes
def attempt(laboratory, job: Job) -> Iterator[Message]:
    """The messages of one job. What goes wrong in it is a message, too: the others go on."""
    try:
        for line in laboratory.do(job):
            yield "line", line
    except (Exception, SystemExit) as error:                        # argparse leaves with SystemExit
        log = laboratory.log(job.training)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        yield "failed", f"{reason.splitlines()[0]} (log: {log})"
    else:
        yield "done", None


def work(jobs: list[Job], workers: int, make: Callable, *arguments) -> Iterator[tuple[Job, Message]]:
    """Do the jobs, in this process or in several; yields every message with its job.

    make(*arguments, number) gives the laboratory of a process. Stops all work when the caller stops asking.
    """
    if not jobs:
        return
    if workers > 1:
        yield from in_processes(jobs, min(workers, len(jobs)), make, arguments)
        return
    threads = torch.get_num_threads()
    laboratory = make(*arguments, 0)
    try:
        for job in jobs:
            for message in attempt(laboratory, job):
                yield job, message
    finally:
        torch.set_num_threads(threads)


def serve(pipe: connection.Connection, number: int, make: Callable, arguments: tuple) -> None:
    """The life of a worker process: jobs come through the pipe until None comes, messages go back."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()                        # Ctrl-C of a terminal reaches the parent only, which passes it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=stop_with_parent, daemon=True).start()
    with contextlib.suppress(KeyboardInterrupt, EOFError, OSError):
        laboratory = make(*arguments, number)
        while (job := pipe.recv()) is not None:
            for message in attempt(laboratory, job):
                pipe.send(message)


def stop_with_parent() -> None:
    """Wait until the parent is gone, however it ended, then end this process as Ctrl-C would."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGINT)


def start(count: int, make: Callable, arguments: tuple) -> dict[connection.Connection, multiprocessing.Process]:
    """Worker processes by their pipes. Ctrl-C does nothing to them until they can handle it."""
    context, found = multiprocessing.get_context("spawn"), {}
    handler, threads = signal.signal(signal.SIGINT, signal.SIG_IGN), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"                             # read when a process loads torch
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, number, make, arguments), daemon=True)
            process.start()
            theirs.close()
            found[ours] = process
    finally:
        signal.signal(signal.SIGINT, handler)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    return found


def stop(processes: dict[connection.Connection, multiprocessing.Process], busy: set[connection.Connection]) -> None:
    """One Ctrl-C for each that is busy, time to save, then the end. The others end with their pipe."""
    for pipe, process in processes.items():
        if pipe in busy and process.is_alive():
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGINT)
        pipe.close()
    for process in processes.values():
        process.join(PATIENCE)
        process.terminate()


def in_processes(jobs: list[Job], workers: int, make: Callable, arguments: tuple) -> Iterator[tuple[Job, Message]]:
    """`work` in several processes: who is free gets the next job."""
    waiting, doing = list(jobs), {}
    processes = start(workers, make, arguments)
    try:
        for pipe in processes:
            doing[pipe] = waiting.pop(0)
            pipe.send(doing[pipe])
        while doing:
            for pipe in connection.wait(list(doing)):
                job = doing[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    del doing[pipe]
                    yield job, ("failed", "its process ended; is there enough memory for all workers?")
                    continue
                if message[0] != "line":
                    del doing[pipe]
                    if waiting:
                        doing[pipe] = waiting.pop(0)
                        pipe.send(doing[pipe])
                yield job, message
        for job in waiting:
            yield job, ("failed", "all processes have ended")
    finally:
        stop(processes, set(doing))
