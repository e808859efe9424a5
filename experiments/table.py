"""The experiments on the embedded model: D-OPSD beside its alternatives, with spread, tests and ablations.

    python -m experiments.table --workers 2             # experiments/README.md says how long, and what else there is

Starting again goes on where it stopped; so does Ctrl-C and starting again. Writes results.jsonl, tables.md, curves.png
and panel.png; runs/ (training), concepts/ (data) and pictures/ (of the panel) can be deleted when all is measured.
"""
if not __package__:
    import as_module  # noqa: F401

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tiny import concepts as drawing
from experiments.figures import draw_curves, draw_panel
from experiments.measure import Examiner
from experiments.protocol import FULL, QUICK, ROWS, Plan, Settings, left
from experiments.report import Report
from experiments.results import KEEP, RECIPE, Results, choose_rates, facts_of, fingerprint_of_captions
from experiments.runner import Laboratory, exit_status, perform, results_folder
from plumbing.checkpoints import EMBEDDED, model_folder, recipe_of
from plumbing.files import InputError, check_writable, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.metrics import Reader
from tiny.world import Renderer

@dataclass
class Options:
    quick: bool = option(False, "two concepts, one seed, given learning rates: about ten minutes on two cores")
    lessons: bool = option(False, "also what the numbers of the recipe do")
    report: bool = option(False, "run nothing: tables and figures from the results that are there")
    row: list[str] = option([], f"run only this row of the tables, of {', '.join(ROWS)}; repeatable")
    concept: list[str] = option([], "folder with 4 images of 64x64 and captions with [V], instead of the test "
                                    "concepts; repeatable")
    workers: int = option(1, "number of processes, each with one thread")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded, which is tiny/model")
    out: str | None = option(None, "folder of results (default: experiments/results, with --quick out/quick-table)")


def prepare(settings: Settings, out: Path, folders: list[Path]) -> list[drawing.Concept]:
    """The test concepts or the user's, then the tuning concepts; drawn ones go below `out`. Raises InputError."""
    render = Renderer()
    write = partial(drawing.write, parent=out / "concepts", seed=settings.draw_seed, render=render)
    test, tuning = drawing.draw_concepts(settings.objects, settings.styles, settings.tuning_objects, settings.draw_seed)
    reader = Reader(render) if folders else None
    found = [drawing.read(folder, reader) for folder in folders] or [write(kind, row) for kind, row in test]
    if dict(settings.fixed).keys() < set(ROWS):                              # else nothing is tuned
        words = [concept.words for concept in found]
        found += [write(kind, row, tuning=True) for kind, row in tuning if drawing.described(kind, row) not in words]
    for i, concept in enumerate(found):
        if concept.name in [other.name for other in found[:i]]:
            raise InputError(f"{concept.folder}: a second concept of the name {concept.name}; rename the folder")
    return found


def write_report(results: Results, out: Path) -> None:
    """tables.md and the figures, as far as there is something to show."""
    report, tables = Report(results), out / "tables.md"
    write_bytes(tables, report.text().encode())
    print(tables, *draw_curves(report, out / "curves.png"), *draw_panel(report, out / "panel.png"), sep="\n")


def run(settings: Settings, out: Path, workers: int = 1, model: Path = EMBEDDED, folders: list[Path] = (),
        lessons: bool = False) -> int:
    """Measure what is missing, then write the report; the exit status. Raises InputError."""
    check_writable(out, f"--out {out}")
    out, model = out.resolve(), model.resolve()
    found = {concept.name: concept for concept in prepare(settings, out, list(folders))}
    facts = {**facts_of(settings.facts(), found.values(), model, recipe_of(model), RECIPE + KEEP),
             "kept": fingerprint_of_captions(drawing.ORDINARY)}
    results, plan = Results(out / "results.jsonl", facts), Plan(settings, facts["concepts"], facts["recipe"])
    results.open()
    laboratory = partial(Laboratory, model, out / "runs", partial(Examiner, plan, found, out))
    data = {name: concept.folder for name, concept in found.items()}
    keep = partial(drawing.captions_file, out / "captions", settings.draw_seed, found)

    def do(title: str, parts: dict) -> list[str]:
        return perform(title, left(plan.jobs(parts, data, keep), results.measured), results, workers, laboratory)
    failed = do("first part", plan.first_part())
    plan.rates = choose_rates(plan, results)
    print("learning rates:", ", ".join(f"{name} {rate:g}" for name, rate in plan.rates.items()) or "none", flush=True)
    failed += do("second part", plan.second_part()) + (do("lessons", plan.third_part()) if lessons else [])
    write_report(results, out)
    return exit_status(failed)


def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "D-OPSD beside its alternatives on the embedded model.")
    out = results_folder(options, "table")
    if options.quick and options.lessons:
        raise InputError("--quick --lessons: the small version has none; leave one of them out")
    if options.report:
        write_report(Results(out / "results.jsonl"), out)
        return 0
    settings = replace(QUICK if options.quick else FULL, rows=tuple(options.row) or tuple(ROWS))
    return run(settings, out, options.workers, model_folder(options.model), [Path(f) for f in options.concept],
               options.lessons)


if __name__ == "__main__":
    run_program(main)
