"""Edits of scenes: what can change, how an instruction says it, and random edits. For the embedded FLUX.2-klein.

An edit keeps all that it does not name, the marks of the backdrop too, which only the source picture tells.
"""
import torch
from torch import Tensor

from tiny.world import COLUMN, article, draw_scenes, held_out_object, words

CHANGES = {"place": ("place",), "size": ("size",), "backdrop": ("backdrop",), "shape": ("shape",),
           "paint": ("pattern", "main", "second"), "object": ("shape", "pattern", "main", "second")}
GOAL = {"in the middle": "middle", "on the left": "left", "on the right": "right", "at the top": "top",
        "at the bottom": "bottom"}


def changed(rows: Tensor, fresh: Tensor, change: str) -> Tensor:
    """Scenes (n, 9) with the attributes of `change`, a key of CHANGES, taken from `fresh` (n, 9)."""
    result, columns = rows.clone(), [COLUMN[name] for name in CHANGES[change]]
    result[:, columns] = fresh[:, columns]
    return result


def paint_words(row: Tensor) -> str:
    """ "striped red and blue" or "plain red"."""
    word = words(row)
    return f"plain {word['main']}" if word["pattern"] == "plain" else \
        f"{word['pattern']} {word['main']} and {word['second']}"


def instruction(row: Tensor, change: str, concept: bool = False) -> str:
    """What to do so that the object becomes that of row (9,); concept: [V] stands for what a picture shows."""
    word = words(row)
    return {"place": f"move it to the {GOAL[word['place']]}", "size": f"make it {word['size']}",
            "backdrop": f"put it on {word['backdrop']}", "shape": f"make it {article(word['shape'])}",
            "paint": "paint it [V]" if concept else f"paint it {paint_words(row)}",
            "object": "make it [V]" if concept else f"make it {article(paint_words(row) + ' ' + word['shape'])}",
            }[change]


class Edits:
    """Random edits. sources, targets: scenes (n, 9); changes: n keys of CHANGES; shown (n, 9): other scenes with the
    object of the target or, where the change is "paint", its colours; a quarter of them are the targets themselves."""

    def __init__(self, count: int, names: tuple[str, ...], g: torch.Generator, held_out: str = "") -> None:
        """held_out "object": the targets' objects are ones that no stage of training draws."""
        sources, targets, changes = [], [], []
        while sum(map(len, sources)) < count:
            source, fresh = draw_scenes(1024, g), draw_scenes(1024, g, held_out=held_out)
            if held_out:                                  # an object that is only moved is the same before
                source[::2] = draw_scenes(512, g, held_out=held_out)
            which, target = torch.randint(len(names), (1024,), generator=g), source.clone()
            for number, name in enumerate(names):
                target[which == number] = changed(source, fresh, name)[which == number]
            kept = (held_out_object(target) == (held_out == "object")) & (target != source).any(1)
            sources.append(source[kept]), targets.append(target[kept]), changes.append(which[kept])
        self.sources, self.targets = torch.cat(sources)[:count], torch.cat(targets)[:count]
        self.changes = [names[i] for i in torch.cat(changes)[:count].tolist()]
        other = draw_scenes(count, g)
        paint = torch.tensor([name == "paint" for name in self.changes])[:, None]
        other = torch.where(paint, changed(other, self.targets, "paint"), changed(other, self.targets, "object"))
        same = (torch.rand(count, generator=g) < 0.25) | (held_out_object(other) & (not held_out))
        self.shown = torch.where(same[:, None], self.targets, other)
