"""tables.md from results.jsonl: means and standard deviations over concepts and seeds, paired tests, curves as numbers.

A cell that nobody measured says "not run".
"""
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean

from plumbing.comparison import mean_and_spread, paired
from experiments.measure import MEASURES
from experiments.protocol import (BASE, CAUSES, GENTLE, LESSONS, LONGER, TEACHER, VALIDATION, Curve, Measurement, Plan,
                                  Settings, Training)
from experiments.results import Results, choose_rates, score_of_rate

NOT_RUN = "not run"
NAMES = {"sft": "SFT", "sft-teacher": "SFT on teacher samples", "off-policy": "off-policy", "pso": "PSO",
         "dopsd": "D-OPSD"}                                         # in the order of the rows
COMPARED = ("concept", "ordinary", "ordinary, decided", "diversity")            # what is tested
BESIDE = COMPARED[1:]                                               # what table 3 compares, at equal concept fidelity
DRAWN = COMPARED[:3]                                                # what curves show
RETAINED = ("ordinary", "ordinary, distance")
COST = ("step", "passes", "seconds")
CELL = "Each cell: " + " / ".join(DRAWN)


class Report:
    """The tables of one results file; sections that need more than a table are lists of paragraphs."""

    def __init__(self, results: Results) -> None:
        facts = results.facts
        self.results, self.settings = results, Settings(**facts["protocol"])
        self.plan = Plan(self.settings, facts["concepts"], facts["recipe"])
        self.plan.rates = choose_rates(self.plan, results)
        self.base = self.plan.reference(BASE, self.plan.test)

    def text(self) -> str:
        s, plan = self.settings, self.plan
        (one, one_tests, by_concept), (two, two_tests, _) = (self.comparison(equal) for equal in ("steps", "passes"))
        parts = [
            "# Results", f"Settings {self.results.key}: {len(plan.test)} test concepts, {len(s.seeds)} seeds, "
            f"{s.concept_prompts} prompts with [V] and {s.ordinary_prompts} ordinary ones per measurement, "
            f"{plan.sampler} solver steps. The protocol in words: experiments/README.md. ± is the standard deviation "
            "over concepts and seeds (base and teacher's view: over concepts).",
            "## Table 1: equal optimizer steps", one, "Paired differences: mean, [95 % bootstrap interval], p of the "
            "sign-flip test over pairs of (concept, seed); in brackets p over concept means.", one_tests,
            "Concept fidelity by concept, mean over seeds:", by_concept,
            "## Table 2: equal forward passes", two, "Paired differences:", two_tests,
            "## Table 3: equal concept fidelity",
            f"Where each run reaches {s.part:g} of the teacher's fidelity of its concept: straight lines between steps "
            f"{', '.join(map(str, plan.early_steps))}; seed {s.seeds[0]}.", *self.at_equal_concept(),
            "## Learning rates", "Concept fidelity minus the loss of ordinary accuracy, on the tuning concepts.",
            self.learning_rates(), "## Curves", f"{CELL}; mean over {', '.join(plan.curve_concepts)}; one seed."]
        for title, curves in plan.ablations().items():
            parts += [f"By {title}:", self.curve_table(curves)]
        if s.lessons:
            parts += ["## What the numbers teach", "D-OPSD, same concepts, one seed.", *self.lessons(),
                      "## A smaller learning rate", *self.gentle(),
                      "## Causes", "Longer runs, a faster EMA, a finer grid. Cells, concepts and seed as for the "
                      "curves.", self.curve_table(plan.curves(CAUSES), [LONGER])]
        parts += ["## The measures themselves", "On true renderings and on damaged ones:", self.validation()]
        return "\n\n".join(parts) + "\n"

    def mean(self, asked: Iterable[Measurement], measure: str = "concept") -> float | None:
        """Of those that were made."""
        values = values_of(self.results.of(asked), measure)
        return fmean(values) if values else None

    def triple(self, asked: Iterable[Measurement]) -> str:
        """Means of what curves show; the teacher's view has the concept alone, as it has no ordinary prompts."""
        lines = self.results.of(asked)
        return " / ".join(filter(None, cells(lines, DRAWN, spread=False))) if lines else NOT_RUN

    def comparison(self, equal: str) -> tuple[str, str, str]:
        """Table 1 or 2, D-OPSD against each other method, and concept fidelity by concept."""
        methods = {name: self.plan.table(method, equal) for method, name in NAMES.items()}
        rows = {BASE: self.base, **methods, TEACHER: self.plan.reference(TEACHER, self.plan.test)}
        lines = {label: self.results.of(asked) for label, asked in rows.items()}
        before, table = {line["concept"]: line["measures"] for line in lines[BASE]}, []
        for label, made in lines.items():
            retained = [{"measures": {name: value - before[line["concept"]][name] for name, value in
                                      line["measures"].items()}} for line in made if line["concept"] in before]
            table.append([label, *cells(made, MEASURES), *cells(retained, RETAINED, "{:+.3f}"),
                          *(cells(made, COST, "{:.0f}", spread=False) if label in methods else [""] * len(COST)),
                          f"{len(made)} of {len(rows[label])}" if rows[label] else NOT_RUN])
        head = ["", *MEASURES, "retention: ordinary", "retention: distance", "steps", "passes", "seconds", "measured"]
        by_concept = [[self.plan.concepts[concept]["words"], *(
            cells([line for line in made if line["concept"] == concept], ["concept"], spread=False)[0]
            for made in lines.values())] for concept in self.plan.test]
        return (markdown(head, table), compared({label: lines[label] for label in methods}, COMPARED),
                markdown(["", *rows], by_concept))

    def crossings(self, method: str) -> tuple[list[dict], int]:
        """Where runs reach `part` of the teacher's fidelity of their concept: lines for `compared`, one per concept
        that is reached in table 1's steps; and of how many concepts. Between measured steps a straight line."""
        lines, measured = [], 0
        for concept in self.plan.test:
            curve = {step: self.results.measures(made) for step, made in self.plan.early(method, concept).items()}
            teacher = self.mean(self.plan.reference(TEACHER, [concept]))
            if not curve or teacher is None or not all(curve.values()):
                continue
            measured += 1
            found = crossing({step: [m[name] for name in COMPARED] for step, (m,) in curve.items()},
                             self.settings.part * teacher)
            if found:
                lines.append({"concept": concept, "seed": self.settings.seeds[0], "step": found[0],
                              "measures": dict(zip(COMPARED, found[1:]))})
        return lines, measured

    def at_equal_concept(self) -> list[str]:
        """Table 3 and its tests."""
        table, found = [[BASE, "0", *cells(self.results.of(self.base), BESIDE), ""]], {}
        for method, name in NAMES.items():
            found[name], measured = self.crossings(method)
            row = [*cells(found[name], ["step"], "{:.0f}"), *cells(found[name], BESIDE)]
            if measured and not found[name]:
                row = ["not reached"] * len(row)
            table.append([name, *row, f"{len(found[name])} of {measured}"])
        return [markdown(["", "step", *BESIDE, "concepts that reach it"], table),
                "Paired differences, over concepts:", compared(found, BESIDE)]

    def learning_rates(self) -> str:
        """What was tried, and what was chosen."""
        rates, table = self.settings.rates, []
        for method, name in NAMES.items():
            given, chosen = method in dict(self.settings.fixed), self.plan.rates.get(method)
            scores = [score_of_rate(self.plan, self.results, method, rate) for rate in rates]
            tried = ["not tried" if given else NOT_RUN if score is None else f"{score:.3f}" for score in scores]
            table.append([name, *tried, f"{chosen:g}{' (given)' * given}" if chosen else NOT_RUN])
        return markdown(["", *(f"{rate:g}" for rate in rates), "chosen"], table)

    def curve_table(self, curves: dict[str, Curve], longer: Sequence[int] = ()) -> str:
        """The means of each curve at each of its steps."""
        steps = [0, *self.settings.curve_steps, *longer]
        return markdown(["step", *map(str, steps)], [
            [NAMES.get(label, label), *("" if curve and step not in curve else self.triple(curve.get(step, []))
                                        for step in steps)] for label, curve in curves.items()])

    def learned_at(self, curve: Curve) -> str:
        """The first measured step with `part` of the teacher's concept fidelity, of means over concepts."""
        goal = self.mean(self.plan.reference(TEACHER, self.plan.curve_concepts))
        means = {step: self.mean(asked) for step, asked in curve.items()}
        if goal is None or not means or None in means.values():
            return NOT_RUN
        found = [step for step, mean in sorted(means.items()) if mean >= self.settings.part * goal]
        return str(found[0]) if found else f"later than {max(means)}"

    def lessons(self) -> list[str]:
        """What each number of the recipe does; then rollouts of K steps, sampled with other numbers of steps."""
        s, table = self.settings, []
        for label, curve in self.plan.curves(LESSONS).items():
            last = self.results.of(curve.get(s.curve_steps[-1], []))
            table.append([label, self.learned_at(curve), *cells(last, DRAWN, spread=False),
                          *cells(last, COST[1:], "{:.0f}", spread=False)])
        samplers = [[label, *map(self.triple, row.values())] for label, row in self.plan.samplers().items()]
        return [markdown(["", f"step with {s.part:g} of the teacher's concept", *DRAWN, *COST[1:]], table),
                f"{CELL} (teacher's view: concept).",
                markdown(["sampled with", *(f"{n} steps" for n in s.lesson_samplers)], samplers)]

    def gentle(self) -> list[str]:
        """Table 1's first seed at the learning rates that were chosen and at a smaller one, and the latter's test."""
        table, tested = [], {}
        for method in ("sft", "dopsd"):
            for rate in (self.plan.rates.get(method), GENTLE):
                lines = self.results.of(self.plan.trained(method, self.plan.test, self.settings.steps, rate=rate))
                table.append([NAMES[method] + (f", {rate:g}" if rate else ""), *cells(lines, COMPARED)])
            tested[NAMES[method]] = lines
        return [f"Table 1 with seed {self.settings.seeds[0]}, at the chosen rates and at {GENTLE:g}.",
                markdown(["", *COMPARED], table), f"Paired differences at {GENTLE:g}, over concepts:",
                compared(tested, COMPARED)]

    def validation(self) -> str:
        """The measures on renderings and on damaged ones."""
        for found in self.results.measures([Measurement(Training(VALIDATION))]):
            return markdown(["", *next(iter(found.values()))],
                            [[name, *(f"{value:.3f}" for value in row.values())] for name, row in found.items()])
        return NOT_RUN


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


# -------------------------------------------------------------------------------------------------- cells and tables
def values_of(lines: list[dict], name: str) -> list[float]:
    """Of a measure, or of what a line costs, where lines have it."""
    return [found[name] for found in ({**line, **line["measures"]} for line in lines) if name in found]


def cells(lines: list[dict], names: Sequence[str], form: str = "{:.3f}", spread: bool = True) -> list[str]:
    """Mean ± standard deviation, or the mean alone, of each of `names`; empty where lines do not have it."""
    columns = [values_of(lines, name) for name in names]
    if not spread:
        columns = [[fmean(values)] if values else [] for values in columns]
    return [with_spread(values, form) if values or not lines else "" for values in columns]


def with_spread(values: list[float], form: str = "{:.3f}") -> str:
    """Mean ± standard deviation; a single value has none."""
    if not values:
        return NOT_RUN
    mean, spread = mean_and_spread(values)
    return form.format(mean) + (f" ± {form.replace('+', '').format(spread)}" if len(values) > 1 else "")


def compared(lines: dict[str, list[dict]], names: Sequence[str]) -> str:
    """The last method, D-OPSD, against the others, where both have the same concept and seed."""
    (*others, ours), table = lines, []
    for other in others:
        found = [paired(lines[ours], lines[other], name) for name in names]
        table.append([f"{ours} - {other}", *(str(test or NOT_RUN) for test in found),
                      str(found[0].count if found[0] else 0)])
    return markdown(["", *names, "pairs"], table)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
