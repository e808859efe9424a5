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
"""
if not __package__:
    import as_module  # noqa: F401

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import lora
from tiny import concepts as drawing
from tiny.concepts import Concept
from experiments.protocol import BASE, METHODS, Job, Measurement, Training, left, passes_per_step
from experiments.report import markdown, with_spread
from experiments.results import Results, facts_of, fingerprint
from experiments.runner import STUDENT, Laboratory, exit_status, perform, results_folder, saved_step
from plumbing import lora_files
from plumbing.checkpoints import EMBEDDED, model_folder, recipe_of
from plumbing.files import check_writable, write_bytes
from plumbing.options import option, parse
from plumbing.program import run as run_program
from plumbing.recipes import Recipe
from tiny.score import Judge, Prompts, concept_prompts, new_scenes, of_concept, of_ordinary, ordinary_prompts
from tiny.world import COLUMN, SHAPES, Renderer, caption, random_tell

MEASURES = ("concept", "ordinary", "ordinary, decided")     # of the table; the lines have all of tiny/score.py
TEACHER = "teacher alone"
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


@dataclass
class Options:
    quick: bool = option(False, "one seed, few steps and prompts: a first look")
    report: bool = option(False, "run nothing: the table of the results that are there")
    workers: int = option(1, "processes, each with one thread")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded: tiny/model")
    out: str | None = option(None, "folder of results; default experiments/results, with --quick out/quick-merge")


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


# ------------------------------------------------------------------------------------------------- adding adapters
def combined(adapters: list[lora.Adapter], weight: float = 1.0) -> lora.Adapter:
    """The adapter whose change of every layer is `weight` times the sum of theirs; its rank is the sum of the ranks.

    sum_i s_i B_i A_i = [s_1 B_1 | s_2 B_2 | ...] [A_1; A_2; ...]: exact, nothing is truncated. A layer may be missing
    in some.
    """
    weights = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.weights):
        parts = [(*adapter.weights[name], adapter.scale) for adapter in adapters if name in adapter.weights]
        weights[name] = (torch.cat([A.detach() for A, _, _ in parts]),                       # (sum of ranks, in)
                         torch.cat([weight * scale * B.detach() for _, B, scale in parts], 1))  # (out, sum of ranks)
    rank = max(len(A) for A, _ in weights.values())
    return lora.Adapter(weights, rank, alpha=rank)                                           # scale 1


# ------------------------------------------------------------------------------------------------- concepts and texts
def named(kind: str, row: Sequence[int], text: str) -> str:
    """A caption that says an object's class beside [V]: "a big [V] on mint" -> "a big [V] star on mint"."""
    return text.replace("[V]", f"[V] {SHAPES[row[COLUMN['shape']]]}") if kind == "object" else text


def new_prompts(concept: Concept, settings: Settings) -> Prompts:
    """New prompts with [V], and what they ask for."""
    g = data.generator(settings.draw_seed, "concept prompts", concept.name)
    prompts = concept_prompts(concept.kind, torch.tensor(concept.row), settings.concept_prompts, g)
    return dataclasses.replace(prompts, captions=[named(concept.kind, concept.row, text) for text in prompts.captions])


def captions_of(concept: Concept, settings: Settings) -> list[str]:
    """Different captions of new scenes with the concept, many of which leave something open. None is a test prompt."""
    g = data.generator(settings.draw_seed, "captions", concept.name)
    rows = new_scenes(concept.kind, torch.tensor(concept.row), 16 * settings.captions, g)
    texts = dict.fromkeys(named(concept.kind, concept.row, caption(row, random_tell(g), concept.kind)) for row in rows)
    tested = set(new_prompts(concept, settings).captions)
    return [text for text in texts if text not in tested][:settings.captions]


def captions_folder(concept: Concept) -> Path:
    return concept.folder.parents[1] / "captions" / concept.name


def prepare(settings: Settings, parent: Path) -> list[Concept]:
    """Write the concepts: parent/pictures/NAME, with captions, and parent/captions/NAME, captions alone."""
    (*objects, style), _ = drawing.draw_concepts(50, 1, 0, settings.draw_seed)
    of_different_shapes = drawing.firsts(objects, lambda found: int(found[1][COLUMN["shape"]]))
    render, found = Renderer(), []
    for kind, row in [*of_different_shapes[:settings.objects], style]:
        found.append(drawing.write(kind, row, parent / "pictures", settings.draw_seed, render,
                                   say=partial(named, kind, row.tolist())))
        lines = [json.dumps({"text": text}) + "\n" for text in captions_of(found[-1], settings)]
        write_bytes(captions_folder(found[-1]) / "metadata.jsonl", "".join(lines).encode())
    return found


# ------------------------------------------------------------------------------------------------- what is to be done
@dataclass
class Plan:
    """The list of all trainings and measurements, and where their files are."""
    settings: Settings
    concepts: tuple[Concept, ...]
    recipe: Recipe
    runs: Path                          # folder of training runs

    @property
    def teacher_steps(self) -> int:
        return self.settings.teacher_steps or self.recipe.steps

    def file(self, training: Training) -> Path:
        """The adapter that a training makes."""
        return self.runs / training.name / STUDENT

    def job(self, label: str, seed: int | None = None, concept: Concept | None = None) -> Job:
        """A row of the table for one seed; concept: of a teacher.

        All but teachers are measured at each concept and then, as concept "", at ordinary prompts.
        """
        method, options = ROWS[label]
        names = [concept.name] if concept else [*(c.name for c in self.concepts), ""]
        if concept:                                                 # D-OPSD on the four pictures
            steps, sources, words = self.teacher_steps, [concept.folder], []
        else:                                                       # DiffusionOPD: captions suffice
            steps, sources = self.settings.rounds, [captions_folder(c) for c in self.concepts]
            words = ["--teacher-lora", *map(self.file, self.teachers(seed))]
        steps, lr = (steps, self.recipe.lr) if method in METHODS else (0, None)
        trainings = [Training(method, name, seed, lr, options) for name in names]
        passes = len(sources) * self.recipe.accumulate * passes_per_step(method, self.recipe.rollout_steps)
        return Job(trainings[-1], tuple(Measurement(t, steps, self.recipe.inference_steps) for t in trainings),
                   ("--data", *map(str, [*sources, *words])), passes, step=steps)

    def teachers(self, seed: int) -> list[Training]:
        return [self.job(TEACHER, seed, concept).training for concept in self.concepts]

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """Base and teachers, then what needs the teachers."""
        seeds, labels = self.settings.seeds, list(ROWS)[2:]
        return ([self.job(BASE)] + [self.job(TEACHER, seed, concept) for seed in seeds for concept in self.concepts],
                [self.job(label, seed) for seed in seeds for label in labels])

    def left(self, done: dict) -> tuple[list[Job], list[Job]]:
        """Of both what is not measured; and, to be trained again, teachers that are needed but whose file is gone."""
        first, second = self.jobs()
        students, seeds = left(second, done), {job.training.seed for job in left(second, done)}
        lost = [dataclasses.replace(job, measurements=()) for job in first if job.training.seed in seeds
                and job.measurements[0] in done and saved_step(self.file(job.training)) < job.step]
        return left(first, done) + lost, students


class Examiner:
    """Measures concepts on their test prompts, and what has none on ordinary prompts; a teacher on both."""

    def __init__(self, plan: Plan, judge: Judge) -> None:
        self.plan, self.judge, settings = plan, judge, plan.settings
        asked = {c.name: new_prompts(c, settings) for c in plan.concepts}
        asked[""] = ordinary_prompts(settings.ordinary_prompts, data.generator(settings.draw_seed, "ordinary prompts"))
        self.questions = {}                                         # the same for all methods and seeds
        for name, prompts in asked.items():
            noise = judge.noise(len(prompts.rows), data.generator(settings.draw_seed, "noise", name))
            self.questions[name] = prompts, judge.features.contexts(prompts.captions), noise

    def __call__(self, measurement: Measurement, adapter: lora.Adapter | None) -> dict[str, float]:
        training = measurement.training
        if training.method in ("sum", "average"):
            teachers = [lora_files.load(self.plan.file(teacher), self.judge.net)
                        for teacher in self.plan.teachers(training.seed)]
            adapter = combined(teachers, 1 / len(teachers) if training.method == "average" else 1.0)
        is_teacher, measures = (training.method, training.options) == ROWS[TEACHER], {}
        for name in [training.concept, *([""] if is_teacher else [])]:
            prompts, contexts, noise = self.questions[name]
            reading = self.judge.reader(self.judge.draw(contexts, noise, adapter, measurement.sampler))
            measures |= of_concept(reading, prompts) if name else of_ordinary(reading, prompts)
        return measures


# ------------------------------------------------------------------------------------------------- the table
def table(results: Results) -> str:
    """merge.md: rows are methods, cells mean ± standard deviation over seeds; "not run" where nothing was measured."""
    concepts, s, rows = results.facts["concepts"], results.facts["protocol"], []
    for label, (method, options) in ROWS.items():
        lines = [line for m, line in results.measured.items()
                 if (m.training.method, m.training.options) == (method, options)]
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
    return "\n\n".join(["# Several adapters into one", about, markdown(head, rows)]) + "\n"


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
    plan = Plan(settings, tuple(prepare(settings, out / "concepts" / "merge")), recipe_of(model), out / "runs")
    facts = facts_of(dataclasses.asdict(settings), plan.concepts, model)
    facts |= {"teachers": {"lr": plan.recipe.lr, "steps": plan.teacher_steps},
              "captions": {c.name: fingerprint({"texts": captions_of(c, settings)}) for c in plan.concepts}}
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
    options = parse(Options, argv, "Several adapters into one: added, averaged, distilled; on the embedded model.")
    out = results_folder(options, "merge")
    if options.report:
        write_table(Results(out / "merge.jsonl"), out)
        return 0
    return run(QUICK if options.quick else FULL, out, options.workers, model_folder(options.model))


if __name__ == "__main__":
    run_program(main)
