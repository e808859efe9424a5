"""Scores tuned adapters on the embedded model: `python -m tiny.score --data examples/star --lora NAME=FILE ...`

For the base, the teacher's view and every adapter, at the model's own four steps and without any learned judge:
- concept: new prompts with [V] (places, sizes and backdrops not in the data; for a style, other objects); how many of
  the concept's attributes are right, how much of the rest of the prompt, and the distance to the nearest picture of the
  world;
- ordinary: prompts without [V] about objects that training never drew: accuracy of all that the prompt says, same
  distance, and how decided the marks of the backdrop are.
Writes panel.png (columns: base, the adapters, the teacher's view) and scores.json.
Only for data of this world, with captions that say [V]: other pictures cannot be read back.
`Judge`, `of_concept` and `of_ordinary` are also the measures of experiments/.
"""
import argparse
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
from networks import vae as autoencoder
from plumbing import lora_files
from plumbing.checkpoints import EMBEDDED, backbone_of
from plumbing.files import InputError, write_json
from plumbing.pictures import crop, open_image, panel, save_png, to_image, to_tensor
from plumbing.program import run
from plumbing.quantized import FLOAT, INT8
from rollout import Velocity
from tiny.concepts import Concept
from tiny.contexts import load_features
from tiny.evaluate import Table, check, in_batches
from tiny.metrics import Reader, Reading, accuracy, fidelity, told_accuracy, told_attributes, whole
from tiny.models import grid_of
from tiny.world import (ATTRIBUTES, COLUMN, CONCEPT_ATTRIBUTES, OBJECT_ATTRIBUTES, SIDE, STYLE_ATTRIBUTES, caption,
                        draw_scenes, generator, random_tell)

# What a caption with [V] says besides: objects are drawn without a style, so their caption is silent about it.
REST = {"object": tuple(name for name in ATTRIBUTES if name not in OBJECT_ATTRIBUTES + STYLE_ATTRIBUTES),
        "style": tuple(name for name in ATTRIBUTES if name not in STYLE_ATTRIBUTES)}
COLUMNS = {"new prompts with [V]": {"concept": "concept", "concept, whole": "whole", "concept, rest": "rest",
                                    "concept, distance": "distance"},
           "ordinary prompts": {"ordinary": "right", "ordinary, decided": "decided", "ordinary, distance": "distance"}}
TAKEN = ("base", "teacher's view")      # names of columns that are there anyway
FOREIGN = 0.12  # distance to the world of what is no picture of it. Those in examples/ are at .002 at most, what the
                # models draw is at .06 on average; details of a photograph, gradients and noise are at .14 at least.


@dataclass(frozen=True)
class Prompts:
    """What is asked for. rows: the scenes (n, 9) that the captions are about."""
    rows: Tensor
    captions: list[str]
    told: list[tuple[str, ...]]     # what each caption mentions; empty for captions with [V], which mention all
    kind: str                       # of the concept that [V] stands for, "object" or "style"; "" without [V]


def read_pictures(folder: str, editing: bool = False, caption: str = "") -> tuple[list[data.Row], Tensor]:
    """Rows of a data folder and their pictures (n, 3, 64, 64).

    caption: of pictures without one. Raises InputError unless all rows (editing) or none have source images, and where
    a caption does not say [V].
    """
    rows = data.read_folder(folder, caption=caption)
    if any(bool(row.sources) != editing for row in rows):
        says = "no data for editing; use tiny.score" if editing else "data for editing; use tiny.score_edits"
        raise InputError(f"{folder}: {says}")
    for row in rows:
        if "[V]" not in row.captions[0]:
            raise InputError(f'{row.image}: its caption "{row.captions[0]:.80}" does not say [V], the concept that is '
                             "scored; give data whose captions do, such as examples/star")
    return rows, torch.cat([to_tensor(crop(open_image(row.image), (SIDE, SIDE))) for row in rows])


def read_scenes(rows: list[data.Row], pictures: Tensor, reader: Reader) -> Tensor:
    """The attributes (n, 9) of the pictures of rows. Raises InputError on a picture that is none of this world."""
    reading = reader(pictures)
    for row, distance in zip(rows, reading.distance.tolist()):
        if distance > FOREIGN:
            raise InputError(f"{row.image}: not a picture of the embedded models' world ({distance:.2f} away from the "
                             f"nearest one, at most {FOREIGN} is), so nothing in it can be read back; score data such "
                             "as examples/star, and judge other data by the panels that train.py draws")
    return reading.rows


def concept_of(folder: str, reader: Reader, caption: str = "") -> tuple[str, Tensor, Tensor]:
    """("object" or "style", the attributes read from the first picture (9,), all pictures (n, 3, 64, 64))."""
    rows, pictures = read_pictures(folder, caption=caption)
    kind = "style" if "in [V] style" in rows[0].captions[0] else "object"
    return kind, read_scenes(rows, pictures, reader)[0], pictures


def new_scenes(kind: str, concept: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Scenes (count, 9) with the concept; everything else is drawn."""
    rows = draw_scenes(count, g, styled=0.0)
    columns = [COLUMN[name] for name in CONCEPT_ATTRIBUTES[kind]]
    rows[:, columns] = concept[columns]
    return rows


def concept_prompts(kind: str, concept: Tensor, count: int, g: torch.Generator, named: bool = False) -> Prompts:
    """New prompts with [V]; concept (9,): a scene that has it. named: say the shape of an object beside [V]."""
    rows = new_scenes(kind, concept, count, g)
    return Prompts(rows, [caption(row, concept=kind, named=named) for row in rows], [], kind)


def named_prompts(concept: Concept, count: int, seed: int) -> Prompts:
    """New prompts with [V] and the shape of an object."""
    g = data.generator(seed, "concept prompts", concept.name)
    return concept_prompts(concept.kind, torch.tensor(concept.row), count, g, named=True)


def named_captions(concept: Concept, count: int, seed: int, besides: Container[str]) -> list[str]:
    """Different captions of new scenes, named likewise, many of which leave something open; none is in `besides`."""
    g = data.generator(seed, "captions", concept.name)
    rows = new_scenes(concept.kind, torch.tensor(concept.row), 16 * count, g)
    texts = dict.fromkeys(caption(row, random_tell(g), concept.kind, named=True) for row in rows)
    return [text for text in texts if text not in besides][:count]


def ordinary_prompts(count: int, g: torch.Generator) -> Prompts:
    """Prompts about objects that no stage ever drew, many of which leave something open."""
    rows = draw_scenes(count, g, held_out="object")
    told = [random_tell(g) for _ in rows]
    return Prompts(rows, [caption(row, tell) for row, tell in zip(rows, told)], told, "")


class Judge:
    """A checkpoint of the embedded kind, and the reader of its pictures."""

    def __init__(self, folder: Path, quantize: str = FLOAT) -> None:
        self.features, self.reader = load_features(folder, quantize), Reader()
        self.vae = autoencoder.load(folder, "cpu")
        self.net = backbone_of(folder).load(folder, "cpu", torch.float32, quantize=quantize)

    def noise(self, count: int, g: torch.Generator) -> Tensor:
        """(count, C, 16, 16) at sigma = 1."""
        return torch.randn(count, self.vae.channels, SIDE // 4, SIDE // 4, generator=g)

    def inputs(self, prompts: Prompts, g: torch.Generator) -> tuple[list[Tensor], Tensor]:
        """Contexts of prompts and a noise for each: what all adapters draw from."""
        return self.features.contexts(prompts.captions), self.noise(len(prompts.rows), g)

    @torch.no_grad()
    def draw(self, contexts: list[Tensor], noise: Tensor, adapter: lora.Adapter | None = None, steps: int = 4
             ) -> Tensor:
        """Pictures (n, 3, 64, 64)."""
        def walk_of(part: list[Tensor]) -> Velocity:
            return lora.velocity_of(self.net, part, adapter)
        return in_batches(walk_of, self.vae, contexts, noise, grid_of(self.net, steps))


def adapters(entries: list[str], net: torch.nn.Module, taken: tuple[str, ...] = TAKEN) -> dict[str, lora.Adapter]:
    """What `--lora NAME=FILE ...` asks for. taken: names of other columns. Raises InputError."""
    found: dict[str, str] = {}
    for entry in entries:
        name, _, file = entry.rpartition("=")
        if not name:
            raise InputError(f"--lora {entry}: no name; write NAME=FILE")
        if name in (*taken, *found):
            raise InputError(f"--lora {entry}: another column has the name {name}; choose a different one")
        found[name] = file
    return {name: lora_files.load(Path(file), net) for name, file in found.items()}


def of_concept(reading: Reading, prompts: Prompts) -> dict[str, float]:
    """How far pictures of prompts with [V] show the concept, and what else the prompts say."""
    return {"concept": fidelity(reading.rows, prompts.rows, prompts.kind),
            "concept, whole": whole(reading.rows, prompts.rows, prompts.kind),
            "concept, rest": accuracy(reading.rows, prompts.rows, REST[prompts.kind])["mean"],
            "concept, distance": float(reading.distance.mean())}


def of_ordinary(reading: Reading, prompts: Prompts) -> dict[str, float]:
    """How far pictures of ordinary prompts show what was said, and how clearly."""
    return {"ordinary": told_accuracy(reading.rows, prompts.rows, prompts.told),
            "ordinary, distance": float(reading.distance.mean()),
            "ordinary, decided": float(reading.decided.mean())}


def each_of_concept(reading: Reading, prompts: Prompts) -> dict[str, Tensor]:
    """The same for each picture (n,)."""
    right = (reading.rows == prompts.rows).float()
    own = right[:, [COLUMN[name] for name in CONCEPT_ATTRIBUTES[prompts.kind]]]
    rest = right[:, [COLUMN[name] for name in REST[prompts.kind]]]
    return {"concept": own.mean(1), "concept, whole": own.amin(1), "concept, rest": rest.mean(1),
            "concept, distance": reading.distance}


def each_of_ordinary(reading: Reading, prompts: Prompts) -> dict[str, Tensor]:
    """The same for each picture (n,); prompts that say more count more."""
    said = told_attributes(prompts.told)
    right = (said & (reading.rows == prompts.rows)).sum(1)
    return {"ordinary": right / said.sum(1).float().mean(), "ordinary, distance": reading.distance,
            "ordinary, decided": reading.decided}


class Exam:
    """What all adapters for some data are asked, and the noises that they draw from."""

    def __init__(self, judge: Judge, folder: str, concept: int, ordinary: int, seed: int, caption: str = ""
                 ) -> None:
        """folder: of the data. concept, ordinary: numbers of new prompts with [V] and without. Raises InputError."""
        kind, scene, pictures = concept_of(folder, judge.reader, caption)
        g = generator(seed + 50, 0)
        self.judge, self.new = judge, concept_prompts(kind, scene, concept, g)
        self.ordinary = ordinary_prompts(ordinary, g)
        self.noises = [judge.noise(len(prompts.rows), g) for prompts in (self.new, self.ordinary)]
        self.contexts = [judge.features.contexts(prompts.captions) for prompts in (self.new, self.ordinary)]
        self.shown = pictures[torch.arange(concept) % len(pictures)]

    def pictures(self, adapter: lora.Adapter | None, steps: int = 4) -> tuple[Tensor, Tensor]:
        """Of the new prompts, and of the ordinary ones."""
        new, ordinary = (self.judge.draw(contexts, noise, adapter, steps)
                         for contexts, noise in zip(self.contexts, self.noises))
        return new, ordinary

    @cached_property
    def seen(self) -> list[Tensor]:
        """The contexts of the new prompts for a model that is shown a picture of the concept."""
        return self.judge.features.contexts(self.new.captions, self.shown)

    def teacher_pictures(self, steps: int = 4) -> Tensor:
        """Of the new prompts, by the base model that is shown a picture of the concept."""
        return self.judge.draw(self.seen, self.noises[0], steps=steps)


def options_of(description: str, model: Path, out: str) -> argparse.ArgumentParser:
    """What every program that scores adapters can be told. model, out: defaults."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", type=Path, default=model,
                        help=f"checkpoint folder of the embedded kind; default tiny/{model.name}")
    parser.add_argument("--data", required=True, help="data folder that the adapters were trained on")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FILE",
                        help="adapter to score, under a name for the report; repeatable")
    parser.add_argument("--out", type=Path, default=Path(out),
                        help=f"folder for scores.json and panel.png; default {out}")
    parser.add_argument("--seed", type=int, default=0,
                        help="random seed for what is asked for and its noise; default 0")
    return parser


def main() -> None:
    parser = options_of(__doc__, EMBEDDED, "out/score")
    parser.add_argument("--concept-prompts", type=int, default=80, help="number of new prompts with [V]; default 80")
    parser.add_argument("--ordinary-prompts", type=int, default=200, help="number of prompts without [V]; default 200")
    parser.add_argument("--quantize", default=FLOAT, choices=(FLOAT, INT8), help="as in train.py; default none")
    options = parser.parse_args()

    check(options)
    judge = Judge(options.model, options.quantize)
    tuned = adapters(options.lora, judge.net)
    exam = Exam(judge, options.data, options.concept_prompts, options.ordinary_prompts, options.seed)
    names = ["base", *tuned, "teacher's view"]
    scores, images, table = {}, {}, Table(COLUMNS, names)
    print(table.head(), flush=True)
    for name in names:
        if name == "teacher's view":
            new, ordinary = exam.teacher_pictures(), None
        else:
            new, ordinary = exam.pictures(tuned.get(name))
        scores[name] = of_concept(judge.reader(new), exam.new)
        images[name] = [to_image(p) for p in new[:4]]
        if ordinary is not None:
            scores[name] |= of_ordinary(judge.reader(ordinary), exam.ordinary)
        images[name] += [None] * len(exam.ordinary.captions[:3]) if ordinary is None else map(to_image, ordinary[:3])
        print(table.line(name, scores[name]), flush=True)
    rows = exam.new.captions[:4] + exam.ordinary.captions[:3]
    save_png(panel(images, rows), options.out / "panel.png",
             {"prompt": "\n".join(rows), "seed": options.seed, "steps": 4})
    write_json(options.out / "scores.json", scores)
    print(f"done     {options.out / 'scores.json'}, panel.png beside it")


if __name__ == "__main__":
    run(main)
