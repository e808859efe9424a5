"""curves.png and panel.png. Needs matplotlib, which is imported here and nowhere else."""
import json
import sys
from pathlib import Path

from PIL import Image

from tiny.concepts import firsts
from experiments.measure import picture_file
from experiments.protocol import BASE, TEACHER, TITLES
from experiments.report import DRAWN, Report
from plumbing.files import InputError, check_writable
from plumbing.pictures import panel, save_png
from tiny.world import SIDE

LABELS = {"concept": "concept fidelity", "ordinary": "ordinary accuracy", "ordinary, decided": "marks decided"}


def pyplot(path: Path):
    """matplotlib.pyplot, without windows; or None and a warning that there will be no figure `path`."""
    try:
        import matplotlib
    except ImportError:
        print(f"warning: no {path.name}, matplotlib is missing; pip install -r requirements-dev.txt", file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_curves(report: Report, path: Path) -> list[Path]:
    """Ablations: a column of axes for each, a row for each measure; means over the concepts of the curves.
    Returns what was written: nothing if no curve was measured. Raises InputError."""
    plt = pyplot(path)
    if plt is None:
        return []
    figures, drawn = report.plan.ablations(), False
    figure, axes = plt.subplots(len(DRAWN), len(figures), figsize=(5 * len(figures), 2.6 * len(DRAWN)), sharex=True,
                                sharey="row", squeeze=False, layout="constrained")
    for column, (title, curves) in enumerate(figures.items()):
        axes[0, column].set_title(f"{'ab'[column]}) {title}")
        axes[-1, column].set_xlabel("optimizer steps")
        for axis, measure in zip(axes[:, column], DRAWN):
            axis.grid(alpha=0.3)
            axis.set_ylabel(LABELS[measure] if column == 0 else "")
            for number, (label, curve) in enumerate(curves.items()):
                means = {step: mean for step, asked in curve.items()
                         if (mean := report.mean(asked, measure)) is not None}
                if len(means) > 1:                                  # step 0 is the base: alone it is no curve
                    drawn = True
                    axis.plot(*zip(*means.items()), marker="o", markersize=3, color=f"C{number}", label=label)
            goal = report.mean(report.plan.reference(TEACHER, report.plan.curve_concepts), measure)
            if goal is not None:
                axis.axhline(goal, linestyle="--", color="gray", label=TEACHER)
        if axes[0, column].get_legend_handles_labels()[1]:
            axes[0, column].legend(fontsize=8)
    if drawn:
        check_writable(path.parent, str(path.parent))
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path] if drawn else []


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
    The pictures were kept when they were measured (pictures/, seed 0, table 1); without them the panel stays as it is.
    """
    rows, columns = [], {row: [] for row in (BASE, *TITLES, TEACHER)}
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
    shown = {TITLES.get(row, row): images for row, images in columns.items() if any(images)}
    save_png(panel(shown, rows), path, {"prompt": "\n".join(rows), "settings": report.results.key})
    return [path]
