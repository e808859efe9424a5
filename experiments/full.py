"""Full fine-tuning on a larger set: the second table of D-OPSD (arXiv 2605.05204), on the embedded model.

    python -m experiments.full --workers 2             # everything
    python -m experiments.full --quick --workers 2     # one seed, few steps and prompts
    python -m experiments.full --report                # the tables again, from full.jsonl

200 captioned pictures in a style that pre-training never drew, all weights trained (`--tune full`): how near do
pictures of new captions come to the style, and what is left of ordinary prompts? Two sets have the same pictures; their
captions say "in [V] style", or, as in the paper, nothing of the style. Learning rates are chosen on another style.

Starting again goes on where it stopped. Writes full.jsonl, full.md and full.png; runs/ and concepts/ can be deleted.
"""
if not __package__:
    import as_module  # noqa: F401

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from experiments.plots import plot
from experiments.protocol import BASE, TEACHER, Curve, Job, Measurement, Training, cost_of, left
from experiments.report import cells, means_of
from experiments.results import KEEP, RECIPE, Results, choose_rates, facts_of, score_of_rate
from experiments.runner import Laboratory, exit_status, perform, program_of, saved_step
from plumbing.backbone import Transformer
from plumbing.checkpoints import EMBEDDED, backbone_of, recipe_of
from plumbing.files import check_writable, write_bytes
from plumbing.full import Full
from plumbing.program import run as run_program
from plumbing.train_options import NONE
from tiny.comparison import NOT_RUN, markdown
from tiny.concepts import ORDINARY
from tiny.score import Judge
from tiny.style_set import TRUE, StyleMeasures, StyleSet
from tiny.world import Renderer

TUNE = ("tune", "full")                 # of ROWS: label -> method, options of train.py
ROWS = {"SFT": ("sft", (TUNE,)), "PSO": ("pso", (TUNE,)),
        "D-OPSD as published": ("dopsd", (TUNE, ("keep", NONE))), "D-OPSD with keep": ("dopsd", (TUNE,))}
STYLES = (("teal", "ruled"), ("teal", "ruled", True), ("chalk", "checked"))     # of sets; the last one is for tuning
MEASURES = {"concept": "style", "style, distance": "distance to the style", "concept, rest": "rest of the caption",
            "style, decided": "its marks decided", "ordinary": "ordinary", "ordinary, decided": "marks decided"}
DRAWN = {name: MEASURES[name] for name in ("concept", "style, distance", "ordinary", "ordinary, decided")}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers besides the model and its recipe."""
    pictures: int = 200                 # of each set
    seeds: tuple[int, ...] = (0, 1, 2)  # of training; learning rates with the first one
    steps: tuple[int, ...] = (50, 100, 150)                 # optimizer steps at which is measured
    rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4)     # learning rates tried for each row, with as many steps
    prompts: int = 60                   # new captions of the style, and ordinary prompts
    draw_seed: int = 2605               # of pictures, prompts and noises
    fixed: tuple[tuple[str, float], ...] = ()               # (row, learning rate): taken instead of trying
    rows: tuple[str, ...] = tuple(ROWS)

    def sets(self) -> list[StyleSet]:
        return [StyleSet(*style[:2], self.pictures, self.prompts, self.draw_seed, *style[2:]) for style in STYLES]


ALL = Settings()
QUICK = Settings(pictures=60, seeds=(0,), steps=(20, 60), prompts=40, fixed=tuple((row, 3e-4) for row in ROWS))


class Plan:
    """All trainings and measurements. recipe: of recipes.Recipe; rates: row -> learning rate, when they are chosen."""

    def __init__(self, settings: Settings, recipe: dict) -> None:
        self.settings, self.recipe, self.rates, self.given = settings, recipe, {}, dict(settings.fixed)
        *self.test, tuning = (one.name for one in settings.sets())
        self.tuning_concepts = [tuning]

    def reference(self, view: str, sets: Iterable[str]) -> list[Measurement]:
        return [Measurement(Training(view, name)) for name in sets]

    def trained(self, row: str, name: str, seed: int, rate: float) -> list[Measurement]:
        """After each number of steps."""
        method, options = ROWS[row]
        return [Measurement(Training(method, name, seed, rate, options), step) for step in self.settings.steps]

    def tuning(self, row: str, rate: float) -> list[Measurement]:
        return self.trained(row, *self.tuning_concepts, self.settings.seeds[0], rate)[-1:]

    def curve(self, row: str, name: str) -> Curve:
        """All seeds of a row after each number of steps; the base after none."""
        runs = [self.trained(row, name, seed, self.rates.get(row, 0)) for seed in self.settings.seeds]
        return {0: self.reference(BASE, [name]), **dict(zip(self.settings.steps, map(list, zip(*runs))))}

    def job(self, measurements: list[Measurement], sets: Path) -> Job:
        """A run with its measurements. sets: folder of the sets."""
        training, words, cost = measurements[0].training, [], 0.0
        if training.is_trained:
            keeps = (training.method, training.options) == ROWS["D-OPSD with keep"]
            words = ["--data", str(sets / training.concept), *(["--keep", str(ORDINARY)] if keeps else []),
                     "--save-all", "--save-every", str(math.gcd(*(m.step for m in measurements)))]
            states = self.recipe["grad_states"] if keeps else None
            cost = (1 + keeps) * cost_of(training.method, {**self.recipe, "grad_states": states})
        return Job(training, tuple(measurements), tuple(words), cost, kind="style")


def examiner(plan: Plan, judge: Judge) -> Callable[[Measurement, Transformer | None], dict[str, float]]:
    measure = StyleMeasures(plan.settings.sets(), judge, plan.recipe["inference_steps"])
    return lambda m, student: measure(m.training.concept, student, BASE if m.training.is_trained else m.training.method)


class FullLaboratory(Laboratory):
    """Trains all steps at once, and keeps what was saved on the way as long as something is to be measured on it."""
    def train(self, job: Job, step: int) -> tuple[float, Transformer]:
        folder = self.runs / job.training.name
        saved = folder / f"step_{step:06d}" / Full.saved
        if saved_step(saved / "diffusion_pytorch_model.safetensors") != step:
            shutil.rmtree(folder, ignore_errors=True)
            self.start(job, job.measurements[-1].step)
        network = backbone_of(self.model).load(self.model, "cpu", torch.float32, transformer=str(saved))
        return self.seconds(job, step), network

    def do(self, job: Job) -> Iterator[dict]:
        yield from super().do(job)
        shutil.rmtree(self.runs / job.training.name, ignore_errors=True)


# ------------------------------------------------------------------------------------------------- tables and command
def write_tables(results: Results, out: Path) -> None:
    """full.md and full.png, as far as there is something to show."""
    s = Settings(**results.facts["protocol"])
    plan, about = Plan(s, results.facts["recipe"]), (
        f"Settings {results.key}, {s.prompts} new captions and as many ordinary prompts, {s.steps[-1]} optimizer "
        f"steps. ± is over seeds {', '.join(map(str, s.seeds))}. More: experiments/README.md.")
    parts, curves, goals = ["# Full fine-tuning on a larger set", about], {}, {}
    plan.rates = choose_rates(plan, results)
    for name, title in zip(plan.test, ("captions with [V]", "captions without [V]")):
        curves[title] = {row: {step: means_of(results, points, DRAWN) for step, points in plan.curve(row, name).items()}
                         for row in ROWS}
        goals[title] = means_of(results, plan.reference(TEACHER, [name]), DRAWN)
        asked = {view: plan.reference(view, [name]) for view in (TRUE, TEACHER, BASE)}
        asked |= {row: plan.curve(row, name)[s.steps[-1]] for row in ROWS}
        parts += [f"## {name}, {title}", markdown(["", *MEASURES.values(), "cost", "seconds", "measured"], [
            [label, *cells(lines, tuple(MEASURES)), *cells(lines, ("cost", "seconds"), "{:.0f}", spread=False),
             f"{len(lines)} of {len(points)}"] for label, points in asked.items() for lines in [results.of(points)]]),
                  f"{' / '.join(DRAWN.values())}, over optimizer steps:",
                  markdown(["", *map(str, (0, *s.steps))], [[row, *(
                      " / ".join(f"{mean:.3f}" for mean in means.values()) or NOT_RUN for means in curve.values())]
                      for row, curve in curves[title].items()])]
    tried = [[row, *(NOT_RUN if (score := score_of_rate(plan, results, row, rate)) is None else f"{score:.3f}"
                     for rate in s.rates), f"{plan.rates.get(row, 0):g}"] for row in ROWS]
    parts += ["## Learning rates", f"Style minus the losses of ordinary accuracy and decided marks, on "
              f"{plan.tuning_concepts[0]}.", markdown(["", *(f"{rate:g}" for rate in s.rates), "chosen"], tried)]
    write_bytes(out / "full.md", ("\n\n".join(parts) + "\n").encode())
    print(out / "full.md", *plot(out / "full.png", curves, DRAWN, goals), sep="\n")


def run(settings: Settings, out: Path, workers: int = 1, model: Path = EMBEDDED) -> int:
    """Measure what is missing, then write the tables; the exit status. Raises InputError."""
    check_writable(out, f"--out {out}")
    out, model, render = out.resolve(), model.resolve(), Renderer()
    folder, sets = out / "concepts" / "full", settings.sets()
    drawn = [one.write(folder, render, tuning=one is sets[-1]) for one in sets]
    facts = facts_of(asdict(settings), drawn, model, recipe_of(model), RECIPE + KEEP)
    results = Results(out / "full.jsonl", facts)
    results.open()
    plan = Plan(settings, results.facts["recipe"])
    laboratory = partial(FullLaboratory, model, out / "runs" / f"full-{results.key}", partial(examiner, plan))

    def do(title: str, asked: list[list[Measurement]]) -> list[str]:
        return perform(title, left([plan.job(part, folder) for part in asked], results.measured), results, workers,
                       laboratory)
    known = [[m] for view in (BASE, TEACHER, TRUE) for m in plan.reference(view, plan.test + plan.tuning_concepts)]
    tried = [plan.tuning(row, rate) for row in ROWS if row not in plan.given for rate in settings.rates]
    failed = do("references and learning rates", known + tried)
    plan.rates = choose_rates(plan, results)
    failed += do("the tables", [plan.trained(row, name, seed, plan.rates[row]) for name in plan.test
                                for seed in settings.seeds for row in plan.rates])
    write_tables(results, out)
    return exit_status(failed)


def main(argv: list[str] | None = None) -> int:
    return program_of("full", __doc__.splitlines()[0], ALL, QUICK, run, write_tables, argv)


if __name__ == "__main__":
    run_program(main)
