"""Curves as a picture. Needs matplotlib, which is imported here and nowhere else."""
import sys
from pathlib import Path

from plumbing.files import check_writable

TEACHER = "teacher's view"
Curve = dict[int, dict[str, float]]     # optimizer steps -> measure -> mean; perhaps without what nobody measured


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


def plot(path: Path, figures: dict[str, dict[str, Curve]], labels: dict[str, str], goals: dict[str, dict[str, float]]
         ) -> list[Path]:
    """A column of axes for each of `figures`, title -> label -> curve, and a row for each measure in `labels`; the
    teacher's view, `goals` by title, is a dashed line. Returns what was written: nothing if nothing was measured after
    step 0. Raises InputError."""
    plt = pyplot(path)
    if plt is None:
        return []
    drawn = False
    figure, axes = plt.subplots(len(labels), len(figures), figsize=(5 * len(figures), 2.6 * len(labels)), sharex=True,
                                sharey="row", squeeze=False, layout="constrained")
    for column, (title, curves) in enumerate(figures.items()):
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel("optimizer steps")
        for axis, measure in zip(axes[:, column], labels):
            axis.grid(alpha=0.3)
            axis.set_ylabel(labels[measure] if column == 0 else "")
            for number, (label, curve) in enumerate(curves.items()):
                means = {step: found[measure] for step, found in curve.items() if measure in found}
                if len(means) > 1:                                  # step 0 is the base: alone it is no curve
                    drawn = True
                    axis.plot(*zip(*means.items()), marker="o", markersize=3, color=f"C{number}", label=label)
            if measure in goals[title]:
                axis.axhline(goals[title][measure], linestyle="--", color="gray", label=TEACHER)
        if axes[0, column].get_legend_handles_labels()[1]:
            axes[0, column].legend(fontsize=8)
    if drawn:
        check_writable(path.parent, str(path.parent))
        figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path] if drawn else []
