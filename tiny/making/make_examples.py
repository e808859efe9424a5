"""Draws the data folders in examples/: `python -m tiny.making.make_examples`.

Both concepts are held out of all training stages.
examples/star: one object, a star striped in orange and blue, four times (captions "a big [V] on the left on mint").
examples/chalk: one style, chalk outline on a checked backdrop, on four different objects ("... in [V] style").
examples/paint: an edit, for FLUX.2: four objects before and after they are painted dotted in green and pink ("paint it
[V]"); all else stays.
examples/ordinary: 64 captions without pictures, of objects that pre-training knows, to be kept as they are.
examples/edits: 32 other edits of the four pictures before, to be kept likewise.
"""
from pathlib import Path

import torch

from plumbing.files import ROOT
from tiny.concepts import CHALK, STAR, write_json_lines
from tiny.edits import Edits, changed, instruction
from tiny.world import (Renderer, caption, draw_marks, draw_scenes, generator, held_out_object, held_out_style,
                        random_tell, scene, to_pil)

STARS = [dict(STAR, size="big", place="in the middle", backdrop="sky"),
         dict(STAR, size="small", place="on the left", backdrop="sand"),
         dict(STAR, size="big", place="at the bottom", backdrop="mint"),
         dict(STAR, size="small", place="on the right", backdrop="navy")]
CHALKS = [dict(CHALK, shape="heart", pattern="plain", main="red", second="red", size="big",
               place="in the middle", backdrop="navy"),
          dict(CHALK, shape="circle", pattern="dotted", main="blue", second="white", size="small",
               place="at the top", backdrop="sand"),
          dict(CHALK, shape="triangle", pattern="plain", main="green", second="green", size="big",
               place="on the right", backdrop="wine"),
          dict(CHALK, shape="square", pattern="striped", main="orange", second="pink", size="small",
               place="on the left", backdrop="sky")]

PAINT = dict(pattern="dotted", main="green", second="pink")
PAINTED = [dict(shape="circle", pattern="plain", main="blue", second="blue", size="big", place="in the middle",
                backdrop="sand"),
           dict(shape="heart", pattern="striped", main="red", second="white", size="small", place="on the left",
                backdrop="navy"),
           dict(shape="square", pattern="plain", main="yellow", second="yellow", size="small", place="on the right",
                backdrop="mint"),
           dict(shape="diamond", pattern="cored", main="purple", second="orange", size="big", place="at the bottom",
                backdrop="sky")]


def write(folder: Path, scenes: list[dict], concept: str) -> None:
    """Four pictures with captions of the same name."""
    render = Renderer()
    rows = torch.stack([scene(**words) for words in scenes])
    assert (held_out_object if concept == "object" else held_out_style)(rows).all()
    folder.mkdir(parents=True, exist_ok=True)
    for number, (row, picture) in enumerate(zip(rows, render.draw(rows, generator(2605, 0))), 1):
        to_pil(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(row, concept=concept) + "\n")


def write_captions(folder: Path, count: int) -> None:
    """Captions alone, half of which leave something open; all different."""
    g, texts = generator(2605, 1), {}
    while len(texts) < count:
        texts |= {caption(row, random_tell(g)): None for row in draw_scenes(count, g)}
    write_json_lines(folder / "metadata.jsonl", ({"text": text} for text in list(texts)[:count]))


def write_edits(folder: Path, scenes: list[dict], change: dict, prompt: str) -> None:
    """Pictures before and after a change, with the same marks on the backdrop, and a metadata.jsonl."""
    render, marks = Renderer(), draw_marks(len(scenes), generator(2605, 0))
    before, after = (render(torch.stack([scene(**{**words, **changed}) for words in scenes]), marks)
                     for changed in ({}, change))
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (source, target) in enumerate(zip(before, after), 1):
        to_pil(source).save(folder / f"{number}_before.png")
        to_pil(target).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": prompt, "source": f"{number}_before.png"})
    write_json_lines(folder / "metadata.jsonl", lines)


def write_kept_edits(folder: Path, scenes: list[dict], count: int) -> None:
    """Different instructions for each of the pictures in examples/paint, with which nothing happens to what they do
    not name; no picture of the result."""
    g, lines = generator(2605, 2), []
    for number, words in enumerate(scenes, 1):
        row, texts = scene(**words)[None], {}
        while len(texts) < count:
            edits = Edits(64, ("place", "size", "backdrop", "shape", "paint"), g)
            for fresh, change in zip(edits.targets, edits.changes):
                target = changed(row, fresh[None], change)
                if (target != row).any() and len(texts) < count:
                    texts[instruction(target[0], change)] = None
        lines += [{"text": text, "source": f"../paint/{number}_before.png"} for text in texts]
    write_json_lines(folder / "metadata.jsonl", lines)


if __name__ == "__main__":
    write(ROOT / "examples" / "star", STARS, "object")
    write(ROOT / "examples" / "chalk", CHALKS, "style")
    write_edits(ROOT / "examples" / "paint", PAINTED, PAINT, "paint it [V]")
    write_captions(ROOT / "examples" / "ordinary", 64)
    write_kept_edits(ROOT / "examples" / "edits", PAINTED, 8)
