"""Draws the data folders in examples/: `python -m tiny.make_examples`.

Both concepts are held out of all training stages.
examples/star: one object, a star striped in orange and blue, four times (captions "a big [V] on the left on mint").
examples/chalk: one style, chalk outline on a checked backdrop, on four different objects ("... in [V] style").
"""
from pathlib import Path

import torch

from tiny.stage import generator
from tiny.world import Renderer, caption, held_out_object, held_out_style, scene, to_pil

STAR = dict(shape="star", pattern="striped", main="orange", second="blue")
STARS = [dict(STAR, size="big", place="in the middle", backdrop="sky"),
         dict(STAR, size="small", place="on the left", backdrop="sand"),
         dict(STAR, size="big", place="at the bottom", backdrop="mint"),
         dict(STAR, size="small", place="on the right", backdrop="navy")]
CHALK = dict(line="chalk", texture="checked")
CHALKS = [dict(CHALK, shape="heart", pattern="plain", main="red", second="red", size="big",
               place="in the middle", backdrop="navy"),
          dict(CHALK, shape="circle", pattern="dotted", main="blue", second="white", size="small",
               place="at the top", backdrop="sand"),
          dict(CHALK, shape="triangle", pattern="plain", main="green", second="green", size="big",
               place="on the right", backdrop="wine"),
          dict(CHALK, shape="square", pattern="striped", main="orange", second="pink", size="small",
               place="on the left", backdrop="sky")]


def write(folder: Path, scenes: list[dict], concept: str) -> None:
    """Four pictures with captions of the same name."""
    render = Renderer()
    rows = torch.stack([scene(**words) for words in scenes])
    assert (held_out_object if concept == "object" else held_out_style)(rows).all()
    folder.mkdir(parents=True, exist_ok=True)
    for number, (row, picture) in enumerate(zip(rows, render.draw(rows, generator(2605, 0))), 1):
        to_pil(picture).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption(row, concept=concept) + "\n")


if __name__ == "__main__":
    write(Path("examples/star"), STARS, "object")
    write(Path("examples/chalk"), CHALKS, "style")
