"""A line of scores.json: a measure of base and student, and how sure their difference is."""
import torch
from torch import Tensor

from data import generator

NEW, TRAINING, ORDINARY = "new prompts with [V]", "captions of training", "ordinary prompts"    # groups of prompts
BASE, STUDENT = "base", "student"
RESAMPLES = 10_000


def compared(student: Tensor, base: Tensor) -> dict[str, float | int] | None:
    """Mean difference of (prompts, noises) values, and the interval of 95 % of what resampling both gives.

    A bootstrap in two levels: prompts are drawn, then noises of each. A prompt with a value that is missing (nan) does
    not count; None if there is no other.
    """
    differences = (student - base).double()
    differences = differences[differences.isfinite().all(1)]
    if not len(differences):
        return None
    g, (P, S) = generator(0, "bootstrap"), differences.shape
    prompts, noises = (torch.randint(most, (RESAMPLES, P, n), generator=g) for most, n in ((P, 1), (S, S)))
    means = differences[prompts, noises].mean((1, 2))
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": float(differences.mean()), "low": low, "high": high, "count": differences.numel()}


def row_of(steps: int, group: str, measure: str, better: str, base: Tensor | None, student: Tensor,
           teacher: float | None = None) -> dict:
    """A line of scores.json. base, student: (prompts, noises); without a base there is no difference."""
    return {"steps": steps, "group": group, "measure": measure, "better": better,
            "base": None if base is None else float(base.nanmean()), "student": float(student.nanmean()),
            "teacher": teacher, "difference": None if base is None else compared(student, base)}


def told(rows: list[dict]) -> str:
    """Tables for people, one for each number of solver steps."""
    lines = list[str]()
    for steps in dict.fromkeys(row["steps"] for row in rows):
        lines.append(f"{f'{steps} solver steps':24}{'':20}{'base':>8}{'student':>9}  difference, 95 % interval")
        for row in (row for row in rows if row["steps"] == steps):
            difference = row["difference"] and "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["difference"])
            base, student = "" if row["base"] is None else f"{row['base']:.3f}", f"{row['student']:.3f}"
            lines.append(f"{row['group']:24}{row['measure']:20}{base:>8}{student:>9}  {difference or ''}".rstrip())
    return "\n".join(lines)
