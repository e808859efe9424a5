"""The experiments on the embedded model: D-OPSD beside its alternatives, with spread, tests and ablations.

    python -m experiments.table --workers 2             # experiments/README.md says how long, and what else there is

Starting again goes on where it stopped; so does Ctrl-C and starting again. Writes results.jsonl, tables.md, curves.png
and panel.png; runs/ (training), concepts/ (data) and pictures/ (of the panel) can be deleted when all is measured.
"""
if not __package__:
    import as_module  # noqa: F401

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tiny import concepts as drawing
from experiments.figures import draw_curves, draw_panel
from experiments.measure import Examiner
from experiments.protocol import FULL, QUICK, ROWS, Plan, Settings, left
from experiments.report import Report
from experiments.results import KEEP, RECIPE, Results, choose_rates, facts_of, fingerprint
from experiments.runner import Common, Laboratory, exit_status, perform, results_folder
from loss import WEIGHTS
from plumbing.checkpoints import EMBEDDED, model_folder, recipe_of
from plumbing.files import ROOT, InputError, check_writable, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.metrics import Reader
from tiny.world import Renderer
from train import METHODS

CODE = ("train.py", "baselines.py", "loss.py", "rollout.py")    # what a new row's results follow from


@dataclass
class Options(Common):
    lessons: bool = option(False, "also what the numbers of the recipe do")
    row: list[str] = option([], f"run only this row of the tables, of {', '.join(ROWS)}; repeatable")
    method: str | None = option(None, "run only a new row: this method", choices=tuple(METHODS))
    loss: str | None = option(None, "run only a new row: --method, or dopsd, with this weight", choices=tuple(WEIGHTS))
    concept: list[str] = option([], "folder with 4 images of 64x64 and captions with [V], instead of the test "
                                    "concepts; repeatable")


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
        lessons: bool = False, known: Path | None = None) -> int:
    """Measure what is missing, then write the report; the exit status. known: folder of results that a new row shall
    stand beside. Raises InputError."""
    check_writable(out, f"--out {out}")
    out, model = out.resolve(), model.resolve()
    found = {concept.name: concept for concept in prepare(settings, out, list(folders))}
    facts = facts_of(settings.facts(), found.values(), model, recipe_of(model), RECIPE + KEEP)
    plan, new = Plan(settings, facts["concepts"], facts["recipe"]), [row for row in settings.rows if row not in ROWS]
    code = fingerprint({name: (ROOT / name).read_text() for name in CODE})
    results = Results(out / "results.jsonl", facts | ({"code": dict.fromkeys(new, code)} if new else {}))
    if new and known:
        with suppress(InputError):                                  # those are of other settings
            results.take_over(Results(known / "results.jsonl", facts), lambda run: plan.row_of(run) not in new)
    results.open()
    runs = out / "runs" / (results.key if new else "")              # other code has other runs
    laboratory = partial(Laboratory, model, runs, partial(Examiner, plan, found, out))
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
    rows = list(options.row)
    if options.method or options.loss:
        rows.append("+".join(filter(None, [options.method or "dopsd", options.loss])))
    known, new = results_folder(replace(options, out=None), "table"), [row for row in rows if row not in ROWS]
    out = Path(options.out or (ROOT / "out" / "-".join(["quick"] * options.quick + ["table", *new]) if new else known))
    if options.quick and options.lessons:
        raise InputError("--quick --lessons: the small version has none; leave one of them out")
    if options.report:
        write_report(Results(out / "results.jsonl"), out)
        return 0
    settings = replace(QUICK if options.quick else FULL, rows=tuple(rows or ROWS))
    return run(settings, out, options.workers, model_folder(options.model), [Path(f) for f in options.concept],
               options.lessons, known)


if __name__ == "__main__":
    run_program(main)
