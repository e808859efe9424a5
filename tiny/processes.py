"""Jobs in several processes, each with one thread: a job that fails stops no other.

Who does the jobs is a laboratory, one for each process: `do(job)` yields a dictionary for everything it finds, and
`log(job)` is the file that takes the traceback of what goes wrong.
"""
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from plumbing.files import InputError

class Clock:
    """How long jobs still take, by the time that others took and by how much work each is."""

    def __init__(self, work: dict[Hashable, float]) -> None:
        """work: of each job, in any unit."""
        self.work, self.left, self.started = work, dict(work), time.monotonic()

    def does(self, job: Hashable, part: float = 1.0) -> None:
        """A part of a job is done; 1: nothing is left of it, whatever was done before."""
        self.left[job] = max(0.0, self.left[job] - part * self.work[job])

    def __str__(self) -> str:
        whole, left = sum(self.work.values()), sum(self.left.values())
        if whole == left:
            return "time left unknown"
        minutes = (time.monotonic() - self.started) * left / (whole - left) / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"


here: dict[str, Any] = {}           # in a worker: its laboratory, and whether the work is over


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

    make(number) gives the laboratory of a process. When the caller stops asking, no further job begins.
    """
    if not jobs:
        return
    if workers == 1:
        laboratory = make(0)
        yield from ((job, message) for job in jobs for message in attempt(laboratory, job))
        return
    context = multiprocessing.get_context("spawn")
    numbers, over = context.SimpleQueue(), context.Event()
    for number in range(workers):
        numbers.put(number)
    with ProcessPoolExecutor(workers, context, begin, (make, numbers, over)) as pool:
        done = {pool.submit(messages_of, job): job for job in jobs}
        try:
            for future in as_completed(done):
                try:
                    messages = future.result()
                except BrokenProcessPool:
                    messages = ["a process ended; is there enough memory for all workers?"]
                for message in messages:
                    yield done[future], message
        finally:
            over.set()                                              # some jobs are on their way to a worker already
            pool.shutdown(cancel_futures=True)


def begin(make: Callable, numbers, over) -> None:
    """In a worker. Ctrl-C is the parent's to handle, and train.py's, which saves; without its parent a worker ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    here.update(laboratory=make(numbers.get()), over=over)


def end_with(parent) -> None:
    parent.join()
    os._exit(1)


def messages_of(job) -> list[dict | str | None]:
    """In a worker."""
    return [] if here["over"].is_set() else list(attempt(here["laboratory"], job))
