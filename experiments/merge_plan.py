"""What experiments/merge.py needs before anything runs: its constants, concepts, captions, sums of adapters, all runs.

A `Training`, its `Measurement`s and `Job`s are those of protocol.py; nothing here trains or measures.
"""
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import lora
from experiments import concepts as drawing
from experiments.concepts import Concept
from experiments.protocol import BASE, Job, Measurement, Training
from experiments.results import Results
from experiments.work import saved_step
from plumbing.checkpoints import recipe_of
from plumbing.files import write_bytes
from plumbing.recipes import Recipe
from tiny.score import Prompts, concept_prompts, new_scenes
from tiny.world import COLUMN, SHAPES, Renderer, caption, random_tell

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
TRAINED = ("dopsd", "sft-teacher")


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
def named(text: str, concept: Concept) -> str:
    """A caption that says an object's class beside [V]: "a big [V] on mint" -> "a big [V] star on mint"."""
    shape = SHAPES[concept.row[COLUMN["shape"]]]
    return text.replace("[V]", f"[V] {shape}") if concept.kind == "object" else text


def new_prompts(concept: Concept, settings: Settings) -> Prompts:
    """New prompts with [V], and what they ask for."""
    g = data.generator(settings.draw_seed, "concept prompts", concept.name)
    prompts = concept_prompts(concept.kind, torch.tensor(concept.row), settings.concept_prompts, g)
    return dataclasses.replace(prompts, captions=[named(text, concept) for text in prompts.captions])


def captions_of(concept: Concept, settings: Settings) -> list[str]:
    """Different captions of new scenes with the concept, many of which leave something open. None is a test prompt."""
    g = data.generator(settings.draw_seed, "captions", concept.name)
    rows = new_scenes(concept.kind, torch.tensor(concept.row), 16 * settings.captions, g)
    texts = dict.fromkeys(named(caption(row, random_tell(g), concept.kind), concept) for row in rows)
    tested = set(new_prompts(concept, settings).captions)
    return [text for text in texts if text not in tested][:settings.captions]


def captions_folder(concept: Concept) -> Path:
    return concept.folder.parents[1] / "captions" / concept.name


def prepare(settings: Settings, parent: Path) -> list[Concept]:
    """Write the concepts: parent/pictures/NAME, with captions, and parent/captions/NAME, captions alone."""
    (*objects, style), _ = drawing.draw_concepts(50, 1, 0, settings.draw_seed)
    firsts: dict[int, tuple] = {}                                                       # the first object of each shape
    for kind, row in objects:
        firsts.setdefault(int(row[COLUMN["shape"]]), (kind, row))
    render, found = Renderer(), []
    for kind, row in [*list(firsts.values())[:settings.objects], style]:
        concept = drawing.write(kind, row, parent / "pictures", settings.draw_seed, render)
        for file in sorted(concept.folder.glob("*.txt")):
            write_bytes(file, named(file.read_text(), concept).encode())
        found.append(dataclasses.replace(concept, key=drawing.key_of(data.read_folder(concept.folder))))
        lines = [json.dumps({"text": text}) + "\n" for text in captions_of(concept, settings)]
        write_bytes(captions_folder(concept) / "metadata.jsonl", "".join(lines).encode())
    return found


# ------------------------------------------------------------------------------------------------- what is to be done
@dataclass(frozen=True)
class Plan:
    """The list of all runs and measurements, and where their files are."""
    settings: Settings
    concepts: tuple[Concept, ...]
    model: Path
    out: Path                           # folder of training runs

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.model)

    @property
    def teacher_steps(self) -> int:
        return self.settings.teacher_steps or self.recipe.steps

    def job(self, label: str, seed: int | None = None, concept: str = "") -> Job:
        """A row of the table for one seed; concept: of a teacher, "" is all of them.

        All but teachers are measured at each concept and then, as concept "", at ordinary prompts.
        """
        method, options = ROWS[label]
        steps = self.teacher_steps if concept else self.settings.rounds if method in TRAINED else 0
        lr = self.recipe.lr if method in TRAINED else None
        runs = [Training(method, name, seed, lr, options)
                for name in ([concept] if concept else [*(c.name for c in self.concepts), ""])]
        points = tuple(Measurement(run, steps, self.recipe.inference_steps) for run in runs)
        return Job(runs[-1], points, ((),) * len(points))

    def teachers(self, seed: int) -> list[Job]:
        return [self.job(TEACHER, seed, c.name) for c in self.concepts]

    def jobs(self) -> tuple[list[Job], list[Job]]:
        """Base and teachers, then what needs the teachers."""
        seeds, labels = self.settings.seeds, list(ROWS)[2:]
        return ([self.job(BASE)] + [job for seed in seeds for job in self.teachers(seed)],
                [self.job(label, seed) for seed in seeds for label in labels])

    def with_lost(self, teachers: list[Job], students: list[Job]) -> list[Job]:
        """Also teachers that were measured, but whose file is gone and needed: to be trained again, not measured."""
        asked = {job.training for job in teachers}
        needed = [job.training for seed in dict.fromkeys(job.training.seed for job in students) for job in self.teachers(seed)]
        return teachers + [Job(run, (), ()) for run in needed
                           if run not in asked and saved_step(self.file(run)) < self.teacher_steps]

    def folder(self, run: Training) -> Path:
        return self.out / run.name

    def file(self, run: Training) -> Path:
        """The adapter that a run makes."""
        return self.folder(run) / "student.safetensors"


def left(jobs: list[Job], results: Results) -> list[Job]:
    """Of each job the points that are not measured."""
    found = []
    for job in jobs:
        points = tuple(point for point in job.measurements if point not in results.measured)
        found += [Job(job.training, points, ((),) * len(points))] if points else []
    return found
