"""curves.png and panel.png."""
import json
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from tiny.concepts import firsts
from experiments.measure import picture_file
from experiments.protocol import BASE, TEACHER
from experiments.report import Report, means_of
from plumbing.files import InputError
from plumbing.pictures import panel, save_png
from experiments.plots import plot
from tiny.world import SIDE

LABELS = {"concept": "concept fidelity", "ordinary": "ordinary accuracy", "ordinary, decided": "marks decided"}


def draw_curves(report: Report, path: Path) -> list[Path]:
    """Ablations; means over the concepts of the curves. Returns what was written. Raises InputError."""
    means = partial(means_of, report.results, names=LABELS)
    figures = {f"{letter}) {title}": {label: {step: means(asked) for step, asked in curve.items()}
                                      for label, curve in curves.items()}
               for letter, (title, curves) in zip("ab", report.plan.ablations().items())}
    goal = means(report.plan.reference(TEACHER, report.plan.curve_concepts))
    return plot(path, figures, LABELS, dict.fromkeys(figures, goal))


def tiles(path: Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures of a strip (white where it has none) and their prompts. Raises InputError."""
    try:
        with Image.open(path) as image:
            strip, prompts = image.convert("RGB"), json.loads(image.text["prompts"])
    except (OSError, KeyError, AttributeError, ValueError):
        raise InputError(f"{path}: not a strip of pictures that this program wrote; remove it") from None
    pitch = SIDE + 4                                                # 2 pixels on each side of a picture
    return [strip.crop((x, 2, x + SIDE, 2 + SIDE)) for x in range(2, pitch * len(prompts), pitch)], prompts


def draw_panel(report: Report, path: Path) -> list[Path]:
    """Prompts of one object and one style, and an ordinary one for each; columns: base, table 1, teacher's view.
    The pictures were kept when they were measured (pictures/, seed 0, table 1); without them the panel stays."""
    rows, columns = [], {row: [] for row in (BASE, *report.titles, TEACHER)}
    for concept in firsts(report.plan.curve_concepts, lambda name: report.plan.concepts[name]["kind"]):
        files = {row: picture_file(path.parent, row, concept) for row in columns}
        strips = {row: tiles(file) for row, file in files.items() if file.is_file()}
        prompts = next((prompts for _, prompts in strips.values()), [])
        rows += [f"{prompt} ([V]: {report.plan.concepts[concept]['words']})" if "[V]" in prompt else prompt
                 for prompt in prompts]
        for row, images in columns.items():
            images += strips[row][0] if row in strips else [None] * len(prompts)
    if not rows:
        print(f"warning: no pictures for {path} in {path.parent / 'pictures'}; it stays as it is", file=sys.stderr)
        return []
    shown = {report.titles.get(row, row): images for row, images in columns.items() if any(images)}
    save_png(panel(shown, rows), path, {"prompt": "\n".join(rows), "settings": report.results.key})
    return [path]
