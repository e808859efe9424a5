"""Are the measures right? All of them on true renderings of the world, and on pictures with known damage."""
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from tiny.metrics import Reader, diversity, fidelity, told_accuracy, whole
from tiny.world import ATTRIBUTES, COLOURS, COLUMN, Renderer, draw_marks, draw_scenes


def damaged(render: Renderer, rows: Tensor, marks: Tensor, group: int) -> dict[str, Tensor]:
    """Renderings of scenes (n, 9) with marks (n, 8, 8), and what can be wrong with pictures: name -> (n, 3, 64, 64).

    group: so many neighbours show the same scene.
    """
    pictures = render(rows, marks)
    recoloured = rows.clone()
    for old in ("main", "second"):                                  # both are replaced; a plain object stays plain
        recoloured[:, COLUMN[old]] = (rows[:, COLUMN[old]] + 1) % len(COLOURS)
    return {"true renderings": pictures,
            "the same marks every time": render(rows, marks[:1].expand_as(marks)),
            "blurred over 5 pixels": F.avg_pool2d(F.pad(pictures, (2,) * 4, mode="replicate"), 5, 1),
            "wrong colours": render(recoloured, marks),
            "shifted by 4 pixels": pictures.roll(4, -1),
            "half marks": render(rows, torch.full_like(marks, 0.5)),
            "mixed with another scene": (pictures + pictures.roll(group, 0)) / 2}


def validate(reader: Reader, seed: int, scenes: int, group: int) -> dict[str, dict[str, float]]:
    """Every measure on true renderings of held-out objects, some of them in a style, and on damaged ones.

    scenes: how many; group: how often each is drawn, with other marks on its backdrop.
    """
    g = data.generator(seed, "validation")
    rows = draw_scenes(scenes, g, styled=0.5, held_out="object").repeat_interleave(group, 0)
    pictures = damaged(reader.render, rows, draw_marks(len(rows), g), group)
    tell = tuple(name for name in ATTRIBUTES if name not in ("shape", "second", "line", "texture")) + ("style",)
    table = {}
    for name, drawn in pictures.items():
        reading = reader(drawn)
        table[name] = {"concept (object)": fidelity(reading.rows, rows, "object"),
                       "concept (style)": fidelity(reading.rows, rows, "style"),
                       "concept, whole (object)": whole(reading.rows, rows, "object"),
                       "ordinary": told_accuracy(reading.rows, rows, [tell] * len(rows)),
                       "distance": float(reading.distance.mean()), "decided": float(reading.decided.mean()),
                       "diversity": diversity(reading, group, reader.render)}
    return table
