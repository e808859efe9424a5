"""The experiments on the embedded model: D-OPSD beside its alternatives, with spread, tests and ablations.

    python -m experiments.table --workers 2                 # tables and curves; experiments/README.md says how long
    python -m experiments.table --workers 2 --lessons       # and what the numbers of the recipe do
    python -m experiments.table --quick --workers 2         # a small version, about ten minutes
    python -m experiments.table --report                    # tables and figures again, from results.jsonl

Starting again goes on where it stopped; so does Ctrl-C and starting again. Writes results.jsonl, tables.md, curves.png
and panel.png; runs/ (training), concepts/ (data) and pictures/ (of the panel) can be deleted when all is measured.
"""
if not __package__:
    import as_module  # noqa: F401

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import train
from experiments import concepts as drawing
from experiments import figures
from experiments.concepts import Concept
from experiments.measure import METRICS
from experiments.protocol import FULL, METHODS, QUICK, Job, Plan, Settings, to_facts
from experiments.report import Report
from experiments.results import Results, choose_rates
from experiments.work import Laboratory, work
from plumbing.checkpoints import EMBEDDED, model_folder, recipe_of
from plumbing.files import ROOT, InputError, check_writable, model_key, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.metrics import Reader
from tiny.world import Renderer

MODEL_PARTS = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "vlm")
RECIPE = ("rollout_steps", "inference_steps", "batch_size", "accumulate", "rank", "alpha", "ema", "loss", "size",
          "beta")


@dataclass
class Options:
    quick: bool = option(False, "two concepts, one seed, given learning rates: about ten minutes on two cores")
    lessons: bool = option(False, "also what the numbers of the recipe do, and why some claims of the paper fail")
    report: bool = option(False, "run nothing: tables and figures from the results that are there")
    method: list[str] = option([], f"run only this one of {', '.join(METHODS)}; repeatable")
    concept: list[str] = option([], "folder with 4 images of 64x64 and captions with [V], instead of the test "
                                    "concepts; repeatable")
    workers: int = option(1, "processes, each with one thread")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded: tiny/model")
    out: str | None = option(None, "folder of results; default experiments/results, with --quick out/quick-table")


def prepare(settings: Settings, out: Path, folders: list[Path]) -> list[Concept]:
    """The test concepts, or the user's instead, then the tuning concepts; the drawn ones are written below `out`.

    Raises InputError.
    """
    render, seed, parent = Renderer(), settings.draw_seed, out / "concepts"
    test, tuning = drawing.draw_concepts(settings.objects, settings.styles, settings.tuning_objects, seed)
    reader = Reader(render) if folders else None
    found = [drawing.read(folder, reader) for folder in folders] or \
        [drawing.write(kind, row, parent, seed, render) for kind, row in test]
    if {method for method, _ in settings.fixed} < set(METHODS):                 # else nothing is tuned
        words = [concept.words for concept in found]
        found += [drawing.write(kind, row, parent, seed, render, tuning=True) for kind, row in tuning
                  if drawing.described(kind, row) not in words]
    for i, concept in enumerate(found):
        if concept.name in [other.name for other in found[:i]]:
            raise InputError(f"{concept.folder}: a second concept of the name {concept.name}; rename the folder")
    return found


def facts_of(settings: Settings, found: list[Concept], model: Path) -> dict:
    """All that decides the numbers, as JSON: two results files with the same facts may be joined."""
    recipe = {**dataclasses.asdict(recipe_of(model)), "beta": train.Options.beta}
    about = {c.name: {"kind": c.kind, "words": c.words, "key": c.key, "tuning": c.tuning} for c in found}
    return {"protocol": to_facts(settings), "recipe": {name: recipe[name] for name in RECIPE}, "concepts": about,
            "model": model_key(model, *MODEL_PARTS), "metrics": METRICS}


class Progress:
    """One line for every measurement, and a list of what failed."""

    def __init__(self, results: Results) -> None:
        self.results, self.sampler, self.failed = results, results.facts["recipe"]["inference_steps"], []

    def perform(self, title: str, jobs: list[Job], workers: int, *arguments) -> None:
        """Do the jobs and keep every line as it comes."""
        count, done = sum(len(job.measurements) for job in jobs), 0
        print(f"{title}: {count} measurements of {len(jobs)} runs", flush=True)
        with contextlib.closing(work(jobs, workers, Laboratory, *arguments)) as messages:
            for job, (kind, content) in messages:
                if kind == "line":
                    done += 1
                    self.results.add(content)
                    self.print_line(content, f"{done}/{count}")
                elif kind == "failed":
                    self.failed.append(job.training.name)
                    print(f"error: {job.training.name}: {content}", file=sys.stderr, flush=True)

    def print_line(self, line: dict, where: str) -> None:
        shown = [f"{name} {line['measures'][name]:.3f}" for name in ("concept", "ordinary", "ordinary, decided")
                 if name in line["measures"]]
        sampler = "" if line["sampler"] == self.sampler else f", {line['sampler']} solver steps"
        print(f"  {where}  {line['run']}, step {line['step']}{sampler}  {'  '.join(shown)}", flush=True)


def write_report(results: Results, out: Path) -> None:
    """tables.md and the figures."""
    report = Report(results)
    write_bytes(out / "tables.md", report.text().encode())
    for path in [out / "tables.md", *figures.draw(report, out)]:
        print(path)


def run(settings: Settings, out: Path, workers: int = 1, model: Path = EMBEDDED, folders: list[Path] = (),
        lessons: bool = False) -> int:
    """Measure what is missing, then write the report; the exit status. Raises InputError."""
    check_writable(out, f"--out {out}")
    out, model = out.resolve(), model.resolve()
    found = prepare(settings, out, list(folders))
    facts = facts_of(settings, found, model)
    results = Results(out / "results.jsonl", facts)
    results.open()
    plan, progress = Plan(settings, facts["concepts"], facts["recipe"]), Progress(results)
    arguments = (plan, found, model, out)
    progress.perform("first part", plan.jobs(plan.first_part(), set(results.measured)), workers, *arguments)
    rates = choose_rates(plan, results)
    print("learning rates:", ", ".join(f"{method} {rate:g}" for method, rate in rates.items()) or "none", flush=True)
    progress.perform("second part", plan.jobs(plan.second_part(rates), set(results.measured)), workers, *arguments)
    if lessons:
        progress.perform("lessons", plan.jobs(plan.third_part(rates), set(results.measured)), workers, *arguments)
    write_report(results, out)
    if progress.failed:
        print(f"error: failed runs: {len(progress.failed)}, first {progress.failed[0]}; see above, then start again",
              file=sys.stderr)
    return 1 if progress.failed else 0


def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "D-OPSD beside its alternatives on the embedded model.")
    out = Path(options.out or (ROOT / "out" / "quick-table" if options.quick else ROOT / "experiments" / "results"))
    if options.workers < 1:
        raise InputError(f"--workers {options.workers}: no process to work in; give 1 or more")
    if options.quick and options.lessons:
        raise InputError("--quick --lessons: the small version has none; leave one of them out")
    if options.report:
        write_report(Results(out / "results.jsonl"), out)
        return 0
    settings = dataclasses.replace(QUICK if options.quick else FULL, methods=tuple(options.method) or METHODS)
    return run(settings, out, options.workers, model_folder(options.model), [Path(f) for f in options.concept],
               options.lessons)


if __name__ == "__main__":
    run_program(main)
