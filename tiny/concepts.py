"""The concepts that the methods learn: held out of all pre-training, four pictures with captions each.

Objects are drawn by a seed from world.HELD_OUT_OBJECTS, styles are what world.HELD_OUT_STYLES has besides the one of
examples/chalk. Test concepts, tuning concepts (on which only learning rates are chosen) and examples/ share nothing but
the style chalk checked, which is a tuning concept. `read` takes folders of the user instead.
"""
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from plumbing.files import ROOT, InputError, write_bytes
from plumbing.pictures import open_image, save_png, to_tensor
from tiny import world
from tiny.metrics import Reader
from tiny.world import (ATTRIBUTES, COLUMN, CONCEPT_ATTRIBUTES, OBJECT_ATTRIBUTES, SIDE, Renderer, caption,
                        draw_scenes, random_tell, to_pil, words)

STAR = dict(shape="star", pattern="striped", main="orange", second="blue")     # of examples/star
CHALK = dict(line="chalk", texture="checked")                                   # and of examples/chalk
PICTURES = 4                # of each concept
ORDINARY = ROOT / "examples" / "ordinary"       # captions to keep
COLUMNS = {kind: [COLUMN[name] for name in names] for kind, names in CONCEPT_ATTRIBUTES.items()}


@dataclass(frozen=True)
class Concept:
    """One concept and its data folder."""
    name: str               # also of its folder
    kind: str               # "object" or "style"
    row: tuple[int, ...]    # a scene (9 attribute indices) that has it
    folder: Path
    key: str                # hash of its pictures and captions
    tuning: bool = False    # used to choose learning rates, and for nothing else

    @property
    def words(self) -> str:
        """What [V] stands for, e.g. "striped orange and blue star"."""
        return described(self.kind, torch.tensor(self.row))


def described(kind: str, row: Tensor) -> str:
    """The words of a concept, as captions spell them."""
    if kind == "style":
        word = words(row)
        return f"{word['line']} {word['texture']} style"
    return caption(row, ("main", "pattern")).split(" ", 1)[1]


# ---------------------------------------------------------------------------------------------------- drawing them
def draw_concepts(objects: int, styles: int, tuning_objects: int, seed: int
                  ) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Test and tuning concepts as (kind, scene (9,)) that has it; fewer are the first of more.

    Raises InputError when the world has not that many.
    """
    star = [ATTRIBUTES[name].index(STAR[name]) for name in OBJECT_ATTRIBUTES]
    found = [index for index in world.HELD_OUT_OBJECTS.nonzero().tolist()       # (shape, pattern, main, second)
             if (index[1] == 0) == (index[2] == index[3]) and index != star]    # only plain objects have one colour
    kept = sorted(world.HELD_OUT_STYLES - {(CHALK["line"], CHALK["texture"])})
    for kind, asked, there in (("objects", objects + tuning_objects, len(found)), ("styles", styles, len(kept))):
        if asked > there:
            raise InputError(f"{asked} {kind} as concepts: the world holds out {there}; ask for fewer")
    order = torch.randperm(len(found), generator=data.generator(seed, "objects")).tolist()
    order = order[:objects] + order[len(found) - tuning_objects:]               # from both ends: never the same ones
    scenes = torch.zeros(len(order), len(ATTRIBUTES), dtype=torch.long)
    scenes[:, COLUMNS["object"]] = torch.tensor([found[number] for number in order])
    rows = [("object", row) for row in scenes]
    style_order = torch.randperm(len(kept), generator=data.generator(seed, "styles")).tolist()[:styles]
    test = rows[:objects] + [("style", world.scene(line=line, texture=texture))
                             for line, texture in (kept[number] for number in style_order)]
    return test, rows[objects:] + [("style", world.scene(**CHALK))]


def firsts(items: Iterable, key: Callable) -> list:
    """The first item of each key, in order."""
    found = {}
    for item in items:
        found.setdefault(key(item), item)
    return list(found.values())


def draw_training_scenes(kind: str, concept: Tensor, g: torch.Generator) -> Tensor:
    """Four scenes (4, 9) with the concept: different places and backdrops, both sizes; for a style different shapes."""
    rows = draw_scenes(256, g, styled=0.0)
    if kind == "style":                                                         # the first scene of each shape
        rows = torch.stack(firsts(rows, lambda row: int(row[COLUMN["shape"]])))
    rows = rows[:PICTURES].clone()
    rows[:, COLUMNS[kind]] = concept[COLUMNS[kind]]
    for name in ("place", "backdrop"):
        rows[:, COLUMN[name]] = torch.randperm(len(ATTRIBUTES[name]), generator=g)[:PICTURES]
    rows[:, COLUMN["size"]] = torch.tensor([1, 0, 1, 0])
    return rows


def other_captions(count: int, seed: int, concept: Concept | None = None, near: bool = False) -> list[str]:
    """Different captions of objects and styles that pre-training knows, for --keep; fewer are the first of more.

    Without a concept they are about anything; with one they share at least half of its attributes (near) or none (far).
    """
    g = data.generator(seed, "other captions", *([concept.name, str(near)] if concept else []))
    rows = draw_scenes(16384, g, styled=0.5)
    if concept:
        columns = COLUMNS[concept.kind]
        shared = (rows[:, columns] == torch.tensor(concept.row)[columns]).sum(1)
        rows = rows[2 * shared >= len(columns) if near else shared == 0]
    texts = dict.fromkeys(caption(row) if concept else caption(row, random_tell(g)) for row in rows)
    return list(texts)[:count]


def captions_file(folder: Path, seed: int, concepts: dict[str, Concept], name: str, concept: str) -> Path:
    """Captions for --keep by name: ordinary is examples/ordinary; ordinary-8, near-64, far-64 are `other_captions`, in
    a file below `folder` that is written when it is asked for first."""
    if name == "ordinary":
        return ORDINARY
    which, _, count = name.partition("-")
    about = None if which == "ordinary" else concepts[concept]
    path = folder / f"{name}{f'-{concept}' * bool(about)}.jsonl"
    if not path.exists():
        texts = other_captions(int(count), seed, about, which == "near")
        write_json_lines(path, ({"text": text} for text in texts))
    return path


def write(kind: str, concept: Tensor, parent: Path, seed: int, render: Renderer, tuning: bool = False,
          named: bool = False) -> Concept:
    """Draw the data folder of a concept below `parent`. named: captions say the shape of an object beside [V]."""
    name = described(kind, concept).replace(" and ", " ").removesuffix(" style").replace(" ", "-")
    g = data.generator(seed, "pictures", name)
    rows = draw_training_scenes(kind, concept, g)
    for number, (row, picture) in enumerate(zip(rows, render.draw(rows, g)), 1):
        save_png(to_pil(picture), parent / name / f"{number}.png", {})
        write_bytes(parent / name / f"{number}.txt", (caption(row, concept=kind, named=named) + "\n").encode())
    return Concept(name, kind, tuple(concept.tolist()), parent / name, key_of(data.read_folder(parent / name)), tuning)


# ---------------------------------------------------------------------------------------------------- reading them
def key_of(rows: list[data.Row]) -> str:
    """Hash of pixels and captions: the same for a file that was only compressed anew."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray(open_image(row.image)).tobytes() + json.dumps(row.captions).encode())
    return digest.hexdigest()[:16]


def read(folder: Path, reader: Reader) -> Concept:
    """A folder of the user's as a test concept. Raises InputError."""
    folder = Path(folder)
    rows = data.read_folder(folder)
    if len(rows) != PICTURES:
        raise InputError(f"{folder}: {len(rows)} images; a concept has {PICTURES} of {SIDE}x{SIDE} pixels")
    for row in rows:
        if row.size != (SIDE, SIDE):
            raise InputError(f"{folder}: {row.image.name} has {row.size[0]}x{row.size[1]} pixels; a concept has "
                             f"{PICTURES} images of {SIDE}x{SIDE}")
        if not all("[V]" in text for text in row.captions):
            raise InputError(f"{folder}: the caption of {row.image.name} does not say [V]; name the concept "
                             '"a [V]" or "in [V] style"')
    styles = ["[V] style" in text for row in rows for text in row.captions]
    if len(set(styles)) > 1:
        raise InputError(f"{folder}: some captions say \"in [V] style\", others not; a concept is an object or a style")
    kind = "style" if styles[0] else "object"
    pictures = torch.cat([to_tensor(open_image(row.image)) for row in rows])
    found = reader(pictures).rows
    seen = list(dict.fromkeys(described(kind, row) for row in found))
    if len(seen) > 1:
        raise InputError(f"{folder}: its images show {' and '.join(seen[:2])}; give {PICTURES} images of one {kind} of "
                         "the world (tiny/world.py), or the measures cannot be exact")
    return Concept(folder.resolve().name, kind, tuple(found[0].tolist()), folder.resolve(), key_of(rows))


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """A .jsonl file, whole or not at all."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
