"""The measures of the experiments: all are read back exactly from pictures (tiny/metrics.py), no learned judge.

Prompts and noises are the same for all methods; those with [V] depend on the concept only. Diversity says little where
the marks are not decided: then it is a coin of the reader, not of the picture.
"""
import functools
import json
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from tiny.concepts import Concept
from experiments.protocol import BASE, TEACHER, VALIDATION, Measurement, Plan, Training
from plumbing.pictures import open_image, save_png, to_tensor
from tiny.metrics import diversity
from tiny.score import Judge, Prompts, concept_prompts, of_concept, of_ordinary, ordinary_prompts
from tiny.validation import validate
from tiny.world import grid

METRICS = 1                 # version: raise it when a number would come out differently
MEASURES = ("concept", "concept, whole", "concept, rest", "concept, distance", "diversity", "ordinary",
            "ordinary, distance", "ordinary, decided")      # experiments/README.md has a table of what each is
SHOWN = (2, 1)              # of the panel: prompts with [V], ordinary prompts


class Examiner:
    """Measures adapters by the prompts and noises of a protocol, and keeps the pictures that a panel shows."""

    def __init__(self, plan: Plan, concepts: dict[str, Concept], out: Path, judge: Judge) -> None:
        self.plan, self.settings, self.concepts, self.out, self.judge = plan, plan.settings, concepts, out, judge
        self.questions = functools.cache(self.ask)                  # the same for all methods
        g = data.generator(self.settings.draw_seed, "ordinary prompts")
        self.ordinary = ordinary_prompts(self.settings.ordinary_prompts, g)
        self.usual = judge.features.contexts(self.ordinary.captions)
        self.noise = judge.noise(self.settings.ordinary_prompts, g)

    def ask(self, name: str) -> tuple[Prompts, list[Tensor], list[Tensor], Tensor, Tensor]:
        """The prompts with [V] of a concept; their contexts without a picture (the student's) and with one (the
        teacher's); noises, one for each prompt, and several for each of the first few, which diversity needs."""
        settings, judge, concept = self.settings, self.judge, self.concepts[name]
        g = data.generator(settings.draw_seed, "concept prompts", name)
        prompts = concept_prompts(concept.kind, torch.tensor(concept.row), settings.concept_prompts, g)
        pictures = torch.cat([to_tensor(open_image(row.image)) for row in data.read_folder(concept.folder)])
        shown = pictures[torch.arange(len(prompts.rows)) % len(pictures)]
        said, seen = (judge.features.contexts(prompts.captions, images) for images in (None, shown))
        noises = len(prompts.rows), min(settings.diverse_prompts, len(prompts.rows)) * settings.diverse_noises
        return prompts, said, seen, *(judge.noise(count, g) for count in noises)

    def __call__(self, measurement: Measurement, adapter: lora.Adapter | None) -> dict:
        """The measures. The teacher's view has no ordinary ones: there is no picture to show for such prompts."""
        training, settings, reader = measurement.training, self.settings, self.judge.reader
        if training.method == VALIDATION:
            return validate(reader, settings.draw_seed, settings.validation_scenes, settings.diverse_noises)
        prompts, said, seen, noise, noise_again = self.questions(training.concept)
        contexts, times = seen if training.method == TEACHER else said, settings.diverse_noises
        drawn = self.judge.draw(contexts, noise, adapter, self.plan.sampler)
        measures, shown = of_concept(reader(drawn), prompts), drawn[:SHOWN[0]]
        if not training.is_trained or {"table 1", "table 2"} & set(measurement.groups):
            several = [context for context in contexts[:len(noise_again) // times] for _ in range(times)]
            again = self.judge.draw(several, noise_again, adapter, self.plan.sampler)
            measures["diversity"] = diversity(reader(again), times, reader.render)
        if training.method != TEACHER:
            drawn = self.judge.draw(self.usual, self.noise, adapter, self.plan.sampler)
            measures |= of_ordinary(reader(drawn), self.ordinary)
            shown = torch.cat([shown, drawn[:SHOWN[1]]])
        self.keep(measurement, shown, prompts.captions[:SHOWN[0]] + self.ordinary.captions[:SHOWN[1]])
        return measures

    def keep(self, measurement: Measurement, shown: Tensor, prompts: list[str]) -> None:
        """A strip for the panel: of table 1, first seed, of the concepts that the curves are about."""
        training, plan = measurement.training, self.plan
        in_table = training.method in (BASE, TEACHER) or (
            "table 1" in measurement.groups and training.seed == plan.settings.seeds[0])
        if in_table and training.concept in plan.curve_concepts:
            save_png(grid(shown, columns=len(prompts), scale=1),
                     picture_file(self.out, plan.row_of(training), training.concept), {"prompts": json.dumps(prompts)})


def picture_file(out: Path, row: str, concept: str) -> Path:
    """Pictures of a row of table 1 for the panel."""
    return out / "pictures" / f"{concept}_{Training(row).name}.png"
