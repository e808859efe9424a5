"""Spread and paired comparisons: how sure one can be that one method is better than another.

The test asks: if both methods were the same, the sign of each pair's difference would be a fair coin; how often is the
mean difference then as large as the one seen, in either direction? experiments/README.md says more, under Statistics.
"""
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

FLIPS, RESAMPLES, SEED = 20_000, 10_000, 2605
NOT_RUN = "not run"     # a cell that nobody measured


@dataclass(frozen=True)
class Paired:
    """Mean difference (ours minus theirs) over `count` pairs, its 95 % interval, and p over pairs and over concepts."""
    count: int
    mean: float
    low: float
    high: float
    p: float
    p_concepts: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] p {self.p:.4f} ({self.p_concepts:.4f})"


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def sign_flip(differences: Sequence[float], exact: int = 16) -> float:
    """Two-sided p of differences being symmetric around 0: over all 2^n signs up to `exact` pairs, else random ones."""
    d = torch.tensor(differences, dtype=torch.float64)
    n, sampled = len(d), len(d) > exact
    bits = (torch.randint(2, (FLIPS, n), generator=torch.Generator().manual_seed(SEED)) if sampled else
            (torch.arange(2 ** n)[:, None] >> torch.arange(n)) & 1)
    means = (bits * 2.0 - 1).double() @ d / n
    as_large = int((means.abs() >= d.mean().abs() - 1e-12).sum())   # rounding shall not break ties
    return (as_large + sampled) / (len(means) + sampled)            # beside random ones, the signs seen count too


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """The interval in which 95 % of the means of resampled differences lie."""
    d = torch.tensor(differences, dtype=torch.float64)
    pick = torch.randint(len(d), (RESAMPLES, len(d)), generator=torch.Generator().manual_seed(SEED))
    low, high = d[pick].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def minus(ours: Sequence[dict], theirs: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Differences of measures, where both have the same concept and seed."""
    other = {(line["concept"], line["seed"]): line["measures"] for line in theirs}
    return [{**line, "measures": {name: line["measures"][name] - other[where][name] for name in names
                                  if name in line["measures"]}}
            for line in ours if (where := (line["concept"], line["seed"])) in other]


def paired(ours: Sequence[dict], theirs: Sequence[dict], measure: str) -> Paired | None:
    """Lines of two methods, compared where both have the same concept and seed; None without such pairs."""
    by_concept: dict[str, list[float]] = defaultdict(list)
    for line in minus(ours, theirs, [measure]):
        by_concept[line["concept"]].append(line["measures"][measure])
    differences = [d for ds in by_concept.values() for d in ds]
    if not differences:
        return None
    return Paired(len(differences), statistics.fmean(differences), *bootstrap(differences), sign_flip(differences),
                  sign_flip([statistics.fmean(ds) for ds in by_concept.values()]))


def crossing(curve: dict[int, list[float]], goal: float) -> list[float] | None:
    """[step, *values] where the first value of a curve reaches `goal` for the first time; None if it never does."""
    rows = [[step, *values] for step, values in sorted(curve.items())]
    if rows[0][1] >= goal:
        return rows[0]
    for before, after in pairwise(rows):
        if after[1] >= goal:
            share = (goal - before[1]) / (after[1] - before[1])
            return [a + share * (b - a) for a, b in zip(before, after)]
    return None


# ----------------------------------------------------------------------------------------------------- tables
def with_spread(values: list[float], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation; a single value has none."""
    if not values:
        return NOT_RUN
    mean, spread = mean_and_spread(values)
    return form.format(mean) + (f" ± {form.replace('+', '').format(spread)}" if len(values) > 1 else "")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
