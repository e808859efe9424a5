"""Four adapters into one: DiffusionOPD (arXiv 2605.15055) beside adding and averaging, on the embedded model.

    python -m experiments.merge --workers 2             # everything
    python -m experiments.merge --quick --workers 2     # one seed, few steps and prompts
    python -m experiments.merge --report                # the table again, from merge.jsonl

D-OPSD (arXiv 2605.05204) as published, without --keep, makes an adapter for each of three held-out objects and a
held-out style. From the four: their sum, their average, and students that train.py teaches with `--teacher-lora`, all
for as many rounds: flow matching on what the teachers draw, Eq. 7 on the ODE, the KL per step at several noises.
Pictures are drawn with the model's own solver steps on the ODE, whatever noise a student's rollouts had.

Differs from the paper: its teachers come from reinforcement learning and each has a reward; ours each know a concept.
All concepts are called "[V]", so captions name an object's class, too, as DreamBooth's "a [V] dog" does: "a big [V]
star on mint". So the shape, a quarter of an object's fidelity, is told to the base as well.

Starting again goes on where it stopped. Writes merge.jsonl and merge.md; runs/ and concepts/ can be deleted at the end.
"""
if not __package__:
    import as_module  # noqa: F401

from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import data
import lora
from experiments.protocol import BASE, GRADIENT_PASS, Job, Measurement, Training, cost_of, left
from experiments.results import Results, facts_of, fingerprint
from experiments.runner import STUDENT, Laboratory, exit_status, perform, program_of
from plumbing import lora_files
from plumbing.checkpoints import EMBEDDED, recipe_of
from plumbing.files import check_writable, write_bytes
from plumbing.program import run as run_program
from plumbing.recipes import Recipe
from plumbing.train_options import NONE
from train import METHODS
from tiny import concepts as drawing
from tiny.adapters import combined
from tiny.comparison import markdown, with_spread
from tiny.concepts import Concept
from tiny.score import Judge, Prompts, named_captions, named_prompts, of_concept, of_ordinary, ordinary_prompts
from tiny.world import COLUMN, Renderer

USUAL = ("ordinary", "ordinary, decided")  # of the table; the lines have all of tiny/score.py
TEACHER = "teacher alone"
RECIPE = {"lr": 3e-4, "batch_size": 4, "keep": NONE, "grad_states": None}   # the methods as published
ROWS = {  # label -> method, options of train.py where they differ from the recipe
    BASE: (BASE, ()),
    TEACHER: ("dopsd", ()),
    "sum": ("sum", ()),
    "average": ("average", ()),
    "SFT on teacher samples": ("sft-teacher", ()),
    "merged, v, ODE": ("dopsd", (("loss", "v"), ("noise", 0.0))),
    "merged, KL, ODE": ("dopsd", (("loss", "kl"), ("noise", 0.0))),
    "merged, KL, SDE a = .3": ("dopsd", (("loss", "kl"), ("noise", 0.3))),
    "merged, KL, SDE a = .7": ("dopsd", (("loss", "kl"), ("noise", 0.7))),
}


@dataclass(frozen=True)
class Settings:
    """All that decides the numbers besides the model and its recipe."""
    objects: int = 3                    # of different shapes; and one style
    seeds: tuple[int, ...] = (0, 1, 2)  # of training
    teacher_steps: int | None = None    # optimizer steps of each teacher; None: the recipe's
    rounds: int = 150                   # optimizer steps of the students: a batch of every concept each
    captions: int = 40                  # for each concept, to learn from its teacher; none is a test prompt
    concept_prompts: int = 40           # test prompts with [V] for each concept
    ordinary_prompts: int = 120         # and without
    draw_seed: int = 2605               # of concepts, captions, prompts and noises


FULL = Settings()
QUICK = Settings(seeds=(0,), teacher_steps=60, rounds=40, concept_prompts=16, ordinary_prompts=40)


# ------------------------------------------------------------------------------------------------- concepts and texts
def texts_of(concept: Concept, settings: Settings) -> tuple[Prompts, list[str]]:
    """What a concept is measured on, and the captions, none of them a test prompt, that it is taught with."""
    prompts = named_prompts(concept, settings.concept_prompts, settings.draw_seed)
    return prompts, named_captions(concept, settings.captions, settings.draw_seed, besides=prompts.captions)


def captions_folder(concept: Concept) -> Path:
    return concept.folder.parents[1] / "captions" / concept.name


def prepare(settings: Settings, parent: Path) -> list[Concept]:
    """Write the concepts: parent/pictures/NAME, with captions, and parent/captions/NAME, captions alone."""
    (*objects, style), _ = drawing.draw_concepts(50, 1, 0, settings.draw_seed)
    objects = drawing.firsts(objects, lambda drawn: int(drawn[1][COLUMN["shape"]]))[:settings.objects]
    render, found = Renderer(), []
    for kind, row in [*objects, style]:
        concept = drawing.write(kind, row, parent / "pictures", settings.draw_seed, render, named=True)
        drawing.write_json_lines(captions_folder(concept) / "metadata.jsonl",
                         ({"text": text} for text in texts_of(concept, settings)[1]))
        found.append(concept)
    return found


# ------------------------------------------------------------------------------------------------- what is to be done
@dataclass
class Plan:
    """The list of all trainings and measurements, and where their files are."""
    settings: Settings
    concepts: list[Concept]
    recipe: Recipe
    runs: Path                          # folder of training runs

    def teacher_files(self, seed: int) -> list[Path]:
        """The adapters of all concepts, in order."""
        return [self.runs / self.job(TEACHER, seed, c).training.name / STUDENT for c in self.concepts]

    def job(self, label: str, seed: int | None = None, concept: Concept | None = None) -> Job:
        """A row of the table for one seed; concept: of a teacher.

        All but teachers are measured at each concept and then, as concept "", at ordinary prompts.
        """
        method, options = ROWS[label]
        if concept:                                                 # D-OPSD on the four pictures
            names, sources, words = [concept.name], [concept.folder], []
            steps = self.settings.teacher_steps or self.recipe.steps
        else:                                                       # DiffusionOPD: captions suffice
            names, steps = [*(c.name for c in self.concepts), ""], self.settings.rounds
            sources, words = list(map(captions_folder, self.concepts)), ["--teacher-lora", *self.teacher_files(seed)]
        steps, lr = (steps, self.recipe.lr) if method in METHODS else (0, None)
        words += ["--batch-size", self.recipe.batch_size, "--keep", NONE]
        points = [Measurement(Training(method, name, seed, lr, options), steps) for name in names]
        cost = len(sources) * cost_of(method, asdict(self.recipe))
        return Job(points[-1].training, tuple(points), ("--data", *map(str, [*sources, *words])), cost, step=steps)

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """Base and teachers, then what needs the teachers."""
        seeds, labels = self.settings.seeds, list(ROWS)[2:]
        return ([self.job(BASE)] + [self.job(TEACHER, seed, concept) for seed in seeds for concept in self.concepts],
                [self.job(label, seed) for seed in seeds for label in labels])

    def left(self, done: Container[Measurement]) -> tuple[list[Job], list[Job]]:
        """Of both what is not measured, and the teachers of such students: trained again if their files are gone."""
        first, second = self.jobs()
        students = left(second, done)
        seeds = {job.training.seed for job in students}
        needed = [job for job in first if job.training.seed in seeds and job.measurements[0] in done]
        return left(first, done) + [replace(job, measurements=()) for job in needed], students


class Examiner:
    """Measures concepts on their test prompts, and what has none on ordinary prompts; a teacher on both."""

    def __init__(self, plan: Plan, judge: Judge) -> None:
        self.plan, self.judge, settings = plan, judge, plan.settings
        self.prompts = {c.name: texts_of(c, settings)[0] for c in plan.concepts}
        g = data.generator(settings.draw_seed, "ordinary prompts")
        self.prompts[""] = ordinary_prompts(settings.ordinary_prompts, g)
        self.inputs = {name: judge.inputs(prompts, data.generator(settings.draw_seed, "noise", name))
                       for name, prompts in self.prompts.items()}           # the same for all methods and seeds

    def __call__(self, measurement: Measurement, adapter: lora.Adapter | None) -> dict[str, float]:
        training, measures = measurement.training, {}
        if training.method in ("sum", "average"):
            teachers = [lora_files.load(file, self.judge.net) for file in self.plan.teacher_files(training.seed)]
            adapter = combined(teachers, 1 / len(teachers) if training.method == "average" else 1.0)
        is_teacher = (training.method, training.options) == ROWS[TEACHER]
        for name in [training.concept, ""] if is_teacher else [training.concept]:
            reading = self.judge.reader(self.judge.draw(*self.inputs[name], adapter, self.plan.recipe.inference_steps))
            measures |= (of_concept if name else of_ordinary)(reading, self.prompts[name])
        return measures


# ------------------------------------------------------------------------------------------------- the table
def table(results: Results) -> str:
    """merge.md: rows are methods, cells mean ± standard deviation over seeds; "not run" where nothing was measured."""
    concepts, s, rows = results.facts["concepts"], results.facts["protocol"], []
    for label, (method, options) in ROWS.items():
        lines = [line for line in results.measured.values()
                 if (line["method"], line["options"]) == (method, dict(options))]
        usual = len(concepts) if label == TEACHER else 1            # lines with ordinary prompts, for one seed
        cells = [spread([line for line in lines if line["concept"] == name], "concept") for name in concepts]
        cells += [spread(lines, "concept", len(concepts)), *(spread(lines, name, usual) for name in USUAL)]
        rows.append([label, *cells, *(f"{worth:g}" if worth else "" for worth in (
            max((line[cost] for line in lines), default=0) for cost in ("step", "cost")))])
    head = ["", *(facts["words"] for facts in concepts.values()), "mean of the concepts", *USUAL, "steps", "cost"]
    about = (f"Settings {results.key}, seeds {', '.join(map(str, s['seeds']))}: {s['concept_prompts']} prompts with "
             f"[V] for each concept, {s['ordinary_prompts']} ordinary ones. Concept columns: share of the concept's "
             "attributes that are right. ± is the standard deviation over seeds; the base has none. The row of the "
             "teachers has in each concept's column its own teacher, in the others the mean over all of them. Cost: "
             f"forward passes of one picture, with a gradient {GRADIENT_PASS:g}, for one seed (or one teacher).")
    return "\n\n".join(["# Several adapters into one", about, markdown(head, rows)]) + "\n"


def spread(lines: list[dict], measure: str, count: int = 1) -> str:
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
    concepts = prepare(settings, out / "concepts" / "merge")
    recipe = replace(recipe_of(model), **RECIPE)
    plan = Plan(settings, concepts, recipe, out / "runs")
    teacher = plan.job(TEACHER, concept=concepts[0])
    facts = facts_of(asdict(settings), concepts, model, recipe)
    facts |= {"teachers": {"lr": teacher.training.lr, "steps": teacher.step},
              "captions": {c.name: fingerprint({"texts": texts_of(c, settings)[1]}) for c in concepts}}
    results = Results(out / "merge.jsonl", facts)
    results.open()
    plan.runs = out / "runs" / f"merge-{results.key}"               # other settings have other runs
    laboratory = partial(Laboratory, model, plan.runs, partial(Examiner, plan))
    teachers, students = plan.left(results.measured)
    failed = perform("base and teachers", teachers, results, workers, laboratory)
    failed += perform("from several adapters one", students, results, workers, laboratory)
    write_table(results, out)
    return exit_status(failed)


def main(argv: list[str] | None = None) -> int:
    return program_of("merge", __doc__.splitlines()[0], FULL, QUICK, run, write_table, argv)


if __name__ == "__main__":
    run_program(main)
