"""Jobs in several processes, each with one thread: a job that fails stops no other, and Ctrl-C reaches each once.

Who does the jobs is a laboratory, one for each process: `do(job)` yields a dictionary for everything it finds, and
`log(job)` is the file that takes the traceback of what goes wrong.
"""
import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import connection
from typing import Any

import torch

from plumbing.files import InputError

PATIENCE = 30                       # seconds that an interrupted worker has to finish its step and save
Pipe = connection.Connection
Processes = dict[Pipe, multiprocessing.process.BaseProcess]


def attempt(laboratory, job) -> Iterator[dict | str | None]:
    """The lines of one job, then None; or, for what goes wrong in it, the reason and the log: the others go on."""
    try:
        yield from laboratory.do(job)
    except (Exception, SystemExit) as error:                        # argparse leaves with SystemExit
        log = laboratory.log(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as file:
            traceback.print_exc(file=file)
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        yield f"{reason.splitlines()[0]} (log: {log})"
    else:
        yield None


def work(jobs: list, workers: int, make: Callable) -> Iterator[tuple[Any, dict | str | None]]:
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


def serve(pipe: Pipe, make: Callable) -> None:
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
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGINT)


def start(count: int, make: Callable) -> Processes:
    """Worker processes by their pipes. Ctrl-C does nothing to them until they can handle it."""
    context = multiprocessing.get_context("spawn")
    found: Processes = {}
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


def stop(processes: Processes, busy: set[Pipe]) -> None:
    """One Ctrl-C for each that is busy, time to save, then the end. The others end with their pipe."""
    for pipe, process in processes.items():
        if pipe in busy and process.is_alive() and process.pid:
            with contextlib.suppress(OSError):
                os.kill(process.pid, signal.SIGINT)
        pipe.close()
    for process in processes.values():
        process.join(PATIENCE)
        process.terminate()


def in_processes(jobs: list, workers: int, make: Callable) -> Iterator[tuple[Any, dict | str | None]]:
    """`work` in several processes: who is free gets the next job."""
    waiting, processes = list(jobs), start(workers, make)
    doing: dict[Pipe, Any] = {}

    def next_job(pipe: Pipe) -> None:
        doing.pop(pipe, None)
        if waiting:
            doing[pipe] = waiting.pop(0)
            pipe.send(doing[pipe])
    try:
        for pipe in processes:
            next_job(pipe)
        while doing:
            ready = connection.wait(list(doing))
            for pipe in [pipe for pipe in doing if pipe in ready]:
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
