"""curves.png and panel.png. Needs matplotlib, which is imported here and nowhere else."""
import json
import sys
from pathlib import Path

from PIL import Image

from experiments.measure import SHOWN
from experiments.protocol import BASE, METHODS, TEACHER, Training
from experiments.report import DRAWN, NAMES, Report
from experiments.work import picture_file
from plumbing.files import InputError, check_writable
from plumbing.pictures import panel, save_png
from tiny.world import SIDE

LABELS = {"concept": "concept fidelity", "ordinary": "ordinary accuracy", "ordinary, decided": "marks decided"}


def draw(report: Report, out: Path) -> list[Path]:
    """Both figures, as far as there is something to show; the files written. Raises InputError."""
    return draw_curves(report, out / "curves.png") + draw_panel(report, out / "panel.png")


def draw_curves(report: Report, path: Path) -> list[Path]:
    """Ablations: a column of axes for each, a row for each measure; means over the concepts of the curves."""
    try:
        import matplotlib
        matplotlib.use("Agg")                                       # no window
        import matplotlib.pyplot as plt
    except ImportError:
        print("warning: no curves.png, matplotlib is missing; pip install -r requirements-dev.txt", file=sys.stderr)
        return []
    figures = report.plan.curves(report.rates)
    drawn = False
    figure, axes = plt.subplots(len(DRAWN), len(figures), figsize=(5 * len(figures), 2.6 * len(DRAWN)), sharex=True,
                                sharey="row", squeeze=False, layout="constrained")
    for column, (title, curves) in enumerate(figures.items()):
        axes[0, column].set_title(f"{'ab'[column]}) {title}")
        axes[-1, column].set_xlabel("optimizer steps")
        for row, measure in enumerate(DRAWN):
            axis = axes[row, column]
            axis.grid(alpha=0.3)
            axis.set_ylabel(LABELS[measure] if column == 0 else "")
            for number, (label, curve) in enumerate(curves.items()):
                means = {step: report.mean(points, measure) for step, points in sorted(curve.items())}
                steps = [step for step, mean in means.items() if mean is not None]
                if len(steps) > 1:                                  # step 0 is the base: alone it is no curve
                    drawn = True
                    axis.plot(steps, [means[step] for step in steps], marker="o", markersize=3, color=f"C{number}",
                              label=NAMES.get(label, label))
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


def tiles(path: Path) -> tuple[list[Image.Image | None], list[str]]:
    """The pictures of a strip (None where it has none) and their prompts. Raises InputError."""
    try:
        with Image.open(path) as image:
            strip, prompts = image.convert("RGB"), json.loads(image.text["prompts"])
    except (OSError, KeyError, AttributeError, ValueError):
        raise InputError(f"{path}: not a strip of pictures that this program wrote; remove it") from None
    count = sum(SHOWN)
    boxes = [(i * (SIDE + 4) + 2, 2, i * (SIDE + 4) + 2 + SIDE, 2 + SIDE) for i in range(count)]
    shown = [strip.crop(box) for box in boxes]
    blank = [image.getextrema() == ((255, 255),) * 3 for image in shown]
    return [None if empty else image for image, empty in zip(shown, blank)], prompts


def draw_panel(report: Report, path: Path) -> list[Path]:
    """Rows: prompts of one object and one style, and an ordinary one for each; columns: base, methods, teacher's view.

    The pictures were kept when they were measured (pictures/, seed 0, table 1); without them the panel stays as it is.
    """
    kinds: dict[str, str] = {}                                      # the first concept of each kind
    for name in report.plan.curve_concepts:
        kinds.setdefault(report.concepts[name]["kind"], name)
    names = {BASE: BASE, **{method: NAMES[method] for method in METHODS}, TEACHER: TEACHER}
    columns: dict[str, list] = {label: [] for label in names.values()}
    rows: list[str] = []
    for concept in kinds.values():
        found = {label: picture_file(path.parent, Training(method, concept)) for method, label in names.items()}
        strips = {label: tiles(file) for label, file in found.items() if file.is_file()}
        if not strips:
            continue
        prompts = next(iter(strips.values()))[1]
        rows += [f"{prompt} ([V]: {report.concepts[concept]['words']})" if "[V]" in prompt else prompt
                 for prompt in prompts]
        for label, images in columns.items():
            images += strips[label][0] if label in strips else [None] * len(prompts)
    if not rows:
        print(f"warning: no pictures for {path} in {path.parent / 'pictures'}; it stays as it is", file=sys.stderr)
        return []
    save_png(panel({label: images for label, images in columns.items() if any(images)}, rows), path,
             {"prompt": "\n".join(rows), "settings": report.results.key})
    return [path]
