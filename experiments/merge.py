"""Four adapters into one: DiffusionOPD (arXiv 2605.15055) beside adding and averaging, on the embedded model.

    python -m experiments.merge --workers 2             # everything
    python -m experiments.merge --quick --workers 2     # one seed, few steps and prompts
    python -m experiments.merge --report                # the table again, from merge.jsonl

1. One adapter for each of three held-out objects and a held-out style: D-OPSD (arXiv 2605.05204), the recipe's values.
2. From the four: their sum, their average, and students that train.py teaches with `--teacher-lora`, all for as many
   rounds: flow matching on what the teachers draw, Eq. 7 on the ODE, the KL per step at several noises.
Measured are the concepts, on new prompts with [V], and ordinary prompts: the same prompts and noises for all. Pictures
are drawn with the model's own solver steps on the ODE, whatever noise a student's rollouts had.

Differs from the paper: its teachers come from reinforcement learning and each has a reward; ours each know a concept.
In one model all concepts would be called "[V]", so captions name an object's class, too, as DreamBooth's "a [V] dog"
does: "a big [V] star on mint". So the shape, a quarter of an object's fidelity, is told to the base as well.

Starting again goes on where it stopped. Writes merge.jsonl and merge.md; runs/ and concepts/ can be deleted at the end.
Constants and the list of runs: merge_plan.py.
"""
if not __package__:
    import as_module  # noqa: F401

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import lora
import train
from experiments.merge_plan import (
    FULL,
    QUICK,
    ROWS,
    TEACHER,
    Plan,
    Settings,
    captions_folder,
    captions_of,
    combined,
    left,
    new_prompts,
    prepare,
)
from experiments.protocol import BASE, Job, Training, passes_per_step
from experiments.report import markdown, with_spread
from experiments.results import Results, fingerprint, line_of
from experiments.table import facts_of
from experiments.work import call_train, saved_step, train_words, work
from plumbing.checkpoints import EMBEDDED, model_folder
from plumbing.files import ROOT, InputError, check_writable, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.score import Judge, of_concept, of_ordinary, ordinary_prompts

MEASURES = ("concept", "ordinary", "ordinary, decided")     # of the table; the lines have all of tiny/score.py


@dataclass
class Options:
    quick: bool = option(False, "one seed, few steps and prompts: a first look")
    report: bool = option(False, "run nothing: the table of the results that are there")
    workers: int = option(1, "processes, each with one thread")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded: tiny/model")
    out: str | None = option(None, "folder of results; default experiments/results, with --quick out/quick-merge")


# ------------------------------------------------------------------------------------------------- doing it
class Laboratory:
    """Trains and measures; one per process."""

    def __init__(self, plan: Plan, number: int = 0) -> None:
        """number: of the process; each has a cache of its own, as two may not write the same file at once."""
        torch.set_num_threads(1)
        self.plan, self.cache, self.judge = plan, plan.out / f"cache{number}", Judge(plan.model)
        settings, judge = plan.settings, self.judge
        asked = {c.name: new_prompts(c, settings) for c in plan.concepts}
        asked[""] = ordinary_prompts(settings.ordinary_prompts, data.generator(settings.draw_seed, "ordinary prompts"))
        self.questions = {}                                         # the same for all methods and seeds
        for name, prompts in asked.items():
            noise = judge.noise(len(prompts.rows), data.generator(settings.draw_seed, "noise", name))
            self.questions[name] = prompts, judge.features.contexts(prompts.captions), noise

    def log(self, run: Training) -> Path:
        """What train.py prints."""
        return self.plan.folder(run) / "log.txt"

    def do(self, job: Job) -> Iterator[dict]:
        """A line for every point of a job, as soon as it is measured."""
        passes, seconds, adapter = self.adapter(job.training)
        for point, groups in zip(job.measurements, job.groups):
            measures = self.measure(point.training.concept, adapter, point.sampler)
            if job.training.concept:                                     # a teacher: the line of its concept has both
                measures |= self.measure("", adapter, point.sampler)
            yield line_of(point, groups, "", passes, seconds, measures)

    def measure(self, concept: str, adapter: lora.Adapter | None, steps: int) -> dict[str, float]:
        """On the test prompts of a concept, or on ordinary ones ("")."""
        prompts, contexts, noise = self.questions[concept]
        reading = self.judge.reader(self.judge.draw(contexts, noise, adapter, steps))
        return of_concept(reading, prompts) if concept else of_ordinary(reading, prompts)

    def adapter(self, run: Training) -> tuple[int, float, lora.Adapter | None]:
        """(forward passes and seconds of its training, the adapter); None is the base."""
        plan = self.plan
        if run.method == BASE:
            return 0, 0.0, None
        if run.concept:                                             # D-OPSD on the four pictures
            (concept,) = (c for c in plan.concepts if c.name == run.concept)
            return self.train(run, plan.teacher_steps, 1, ["--data", concept.folder])
        teachers = [plan.file(job.training) for job in plan.teachers(run.seed)]
        if run.method in ("sum", "average"):
            weight = 1 / len(teachers) if run.method == "average" else 1.0
            return 0, 0.0, combined([lora.load(file, self.judge.net) for file in teachers], weight)
        texts = [captions_folder(concept) for concept in plan.concepts]                 # DiffusionOPD: captions suffice
        return self.train(run, plan.settings.rounds, len(texts), ["--data", *texts, "--teacher-lora", *teachers])

    def train(self, run: Training, steps: int, tasks: int, words: list) -> tuple[int, float, lora.Adapter]:
        """Train, or continue, with train.py."""
        folder = self.plan.folder(run)
        words = [*map(str, words), "--model", str(self.plan.model), "--out", str(folder), "--cache", str(self.cache),
                 *train_words(run, steps), *(["--resume"] if saved_step(folder / train.STATE) else [])]
        seconds = call_train(words, folder, self.log(run), steps)
        passes = steps * tasks * passes_per_step(run.method, self.plan.recipe.rollout_steps)
        return passes, seconds, lora.load(self.plan.file(run), self.judge.net)


def perform(title: str, jobs: list[Job], workers: int, plan: Plan, results: Results) -> int:
    """Do the jobs, keep every line as it comes; how many jobs failed."""
    print(f"{title}: {sum(len(job.measurements) for job in jobs)} measurements of {len(jobs)} runs", flush=True)
    failed = 0
    with contextlib.closing(work(jobs, workers, Laboratory, plan)) as messages:
        for job, (kind, content) in messages:
            if kind == "line":
                results.add(content)
                shown = "  ".join(f"{m} {content['measures'][m]:.3f}" for m in MEASURES if m in content["measures"])
                print(f"  {job.training.name}, {content['concept'] or 'ordinary prompts'}: {shown}", flush=True)
            elif kind == "failed":
                failed += 1
                print(f"error: {job.training.name}: {content}", file=sys.stderr, flush=True)
    return failed


# ------------------------------------------------------------------------------------------------- the table
def table(results: Results) -> str:
    """merge.md: rows are methods, cells mean ± standard deviation over seeds; "not run" where nothing was measured."""
    concepts, s, rows = results.facts["concepts"], results.facts["protocol"], []
    for label, (method, options) in ROWS.items():
        lines = [line for point, line in results.measured.items()
                 if (point.training.method, point.training.options) == (method, options)]
        cells = [spread([line for line in lines if line["concept"] == name], "concept", 1) for name in concepts]
        cells += [spread(lines, "concept", len(concepts))]
        cells += [spread(lines, measure, len(concepts) if label == TEACHER else 1) for measure in MEASURES[1:]]
        cells += [str(max((line[cost] for line in lines), default=0) or "") for cost in ("step", "passes")]
        rows.append([label, *cells])
    head = ["", *(facts["words"] for facts in concepts.values()), "mean of the concepts", *MEASURES[1:], "steps",
            "passes"]
    about = (f"Settings {results.key}, seeds {', '.join(map(str, s['seeds']))}: {s['concept_prompts']} prompts with "
             f"[V] for each concept, {s['ordinary_prompts']} ordinary ones. Concept columns: share of the concept's "
             "attributes that are right. ± is the standard deviation over seeds; the base has none. The row of the "
             "teachers has in each concept's column its own teacher, in the others the mean over all of them. Passes: "
             "forward passes of batches for one seed (teachers: for one of them).")
    return "\n\n".join(["# Several adapters into one", about, *markdown(head, rows)]) + "\n"


def spread(lines: list[dict], measure: str, count: int) -> str:
    """Mean ± standard deviation over seeds, of the mean over `count` lines of each; other seeds are not yet whole."""
    by_seed: dict[int | None, list[float]] = {}
    for line in lines:
        if measure in line["measures"]:
            by_seed.setdefault(line["seed"], []).append(line["measures"][measure])
    return with_spread([sum(values) / count for values in by_seed.values() if len(values) == count], "{:.3f}")


# ------------------------------------------------------------------------------------------------- the command
def write_table(results: Results, out: Path) -> None:
    text = table(results)
    write_bytes(out / "merge.md", text.encode())
    print(f"{text}\n{out / 'merge.md'}")


def run(settings: Settings, out: Path, workers: int = 1, model: Path = EMBEDDED) -> int:
    """Measure what is missing, then write the table; the exit status. Raises InputError."""
    check_writable(out, f"--out {out}")
    out, model = out.resolve(), model.resolve()
    plan = Plan(settings, tuple(prepare(settings, out / "concepts" / "merge")), model, out / "runs")
    facts = facts_of(settings, plan.concepts, model)
    facts |= {"teachers": {"lr": plan.recipe.lr, "steps": plan.teacher_steps},
              "captions": {c.name: fingerprint({"texts": captions_of(c, settings)}) for c in plan.concepts}}
    results = Results(out / "merge.jsonl", facts)
    results.open()
    plan = dataclasses.replace(plan, out=out / "runs" / f"merge-{results.key}")     # other settings have other runs
    teachers, students = (left(jobs, results) for jobs in plan.jobs())
    failed = perform("base and teachers", plan.with_lost(teachers, students), workers, plan, results)
    failed += perform("from several adapters one", students, workers, plan, results)
    write_table(results, out)
    if failed:
        print(f"error: failed runs: {failed}; see above, then start again", file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "Several adapters into one: added, averaged, distilled; on the embedded model.")
    out = Path(options.out or (ROOT / "out" / "quick-merge" if options.quick else ROOT / "experiments" / "results"))
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: no process to work in; give 1 or more")
    if options.report:
        write_table(Results(out / "merge.jsonl"), out)
        return 0
    return run(QUICK if options.quick else FULL, out, options.workers, model_folder(options.model))


if __name__ == "__main__":
    run_program(main)
