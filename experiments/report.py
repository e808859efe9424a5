"""tables.md from results.jsonl: means and standard deviations over concepts and seeds, paired tests, curves as numbers.

A cell that nobody measured says "not run".
"""
from collections.abc import Iterable, Sequence
from itertools import pairwise

from experiments.compare import Paired, mean_and_spread, paired
from experiments.measure import MEASURES
from experiments.protocol import (BASE, CAUSES, GENTLE, LESSONS, LONGER, METHODS, TEACHER, VALIDATION, Curve,
                                  Measurement, Plan, Settings, Training)
from experiments.results import Results, choose_rates, score_of_rate

NOT_RUN = "not run"
NAMES = {"dopsd": "D-OPSD", "sft": "SFT", "sft-teacher": "SFT on teacher samples", "off-policy": "off-policy",
         "pso": "PSO"}
COMPARED = ("concept", "ordinary", "ordinary, decided", "diversity")            # what is tested
BESIDE = COMPARED[1:]                                               # what table 3 compares, at equal concept fidelity
DRAWN = ("concept", "ordinary", "ordinary, decided")                            # what curves show


class Report:
    """The tables of one results file."""

    def __init__(self, results: Results) -> None:
        facts = results.facts
        self.results, self.concepts, self.settings = results, facts["concepts"], Settings(**facts["protocol"])
        self.plan = Plan(self.settings, self.concepts, facts["recipe"])
        self.plan.rates = choose_rates(self.plan, results)
        self.base, self.teacher = (self.plan.reference(name, self.plan.test) for name in (BASE, TEACHER))

    def values(self, asked: Iterable[Measurement], measure: str) -> list[float]:
        """Of those that were made and have this measure."""
        return [measures[measure] for measures in self.results.measures(asked) if measure in measures]

    def mean(self, asked: Iterable[Measurement], measure: str) -> float | None:
        values = self.values(asked, measure)
        return sum(values) / len(values) if values else None

    def means(self, asked: Iterable[Measurement], measures: Sequence[str] = DRAWN) -> list[str]:
        """A cell for each measure."""
        return [number(self.mean(asked, measure)) for measure in measures]

    def spreads(self, asked: Iterable[Measurement], measures: Sequence[str]) -> list[str]:
        """A cell for each measure: mean and standard deviation."""
        return [with_spread(self.values(asked, measure)) for measure in measures]

    def triple(self, asked: Iterable[Measurement]) -> str:
        cells = self.means(asked)
        return NOT_RUN if NOT_RUN in cells else " / ".join(cells)

    def cost(self, asked: Iterable[Measurement]) -> list[str]:
        """Steps and forward passes of each, mean seconds."""
        lines = self.results.of(asked)
        if not lines:
            return [NOT_RUN] * 3
        return [*(str(lines[0][name]) for name in ("step", "passes")),
                f"{sum(line['seconds'] for line in lines) / len(lines):.0f}"]

    # ---------------------------------------------------------------------------------------------- tables 1 and 2
    def rows(self, equal: str) -> dict[str, list[Measurement]]:
        """Label -> measurements of a row."""
        return {BASE: self.base, **{NAMES[method]: self.plan.table(method, equal) for method in METHODS},
                TEACHER: self.teacher}

    def comparison(self, equal: str) -> tuple[str, str]:
        """Table 1 or 2, and D-OPSD against each other method."""
        table = []
        for label, asked in self.rows(equal).items():
            cells = self.spreads(asked, MEASURES) + [self.retention(asked, name) for name in ("ordinary",
                                                                                             "ordinary, distance")]
            if label == TEACHER:                                                # it is shown a picture at every prompt
                first = MEASURES.index("ordinary")
                cells[first:] = [""] * len(cells[first:])
            cost = ["", "", ""] if label in (BASE, TEACHER) else self.cost(asked)
            made = f"{len(self.results.of(asked))} of {len(asked)}" if asked else NOT_RUN
            table.append([label, *cells, *cost, made])
        head = ["", *MEASURES, "retention: ordinary", "retention: distance", "steps", "passes", "seconds", "measured"]
        lines = {method: self.results.of(self.plan.table(method, equal)) for method in METHODS}
        return markdown(head, table), compared(lines, COMPARED)

    def retention(self, asked: list[Measurement], measure: str) -> str:
        """Mean and spread of a measure minus the base's own, over the same prompts and noises."""
        before = {line["concept"]: line["measures"][measure] for line in self.results.of(self.base)}
        return with_spread([line["measures"][measure] - before[line["concept"]] for line in self.results.of(asked)
                            if measure in line["measures"] and line["concept"] in before], "{:+.3f}")

    def by_concept(self) -> str:
        """Concept fidelity in table 1, mean over seeds."""
        rows = self.rows("steps")
        table = [[self.concepts[name]["words"],
                  *(number(self.mean([m for m in asked if m.training.concept == name], "concept"))
                    for asked in rows.values())] for name in self.plan.test]
        return markdown(["", *rows], table)

    # ---------------------------------------------------------------------------------------------- table 3
    def crossings(self, method: str) -> tuple[list[dict], int]:
        """Where runs reach `part` of the teacher's fidelity of their concept: lines for `compared`, one per concept
        that is reached in table 1's steps; and of how many concepts. Between measured steps a straight line."""
        lines, measured = [], 0
        for concept in self.plan.test:
            curve = {step: self.results.measures(made) for step, made in self.plan.early(method, concept).items()}
            teacher = self.mean(self.plan.reference(TEACHER, [concept]), "concept")
            if not curve or teacher is None or not all(curve.values()):
                continue
            measured += 1
            found = crossing({step: [m["concept"], *(m[name] for name in BESIDE)] for step, (m,) in curve.items()},
                             self.settings.part * teacher)
            if found:
                step, _, *values = found
                lines.append({"concept": concept, "seed": self.settings.seeds[0], "step": step,
                              "measures": dict(zip(BESIDE, values))})
        return lines, measured

    def at_equal_concept(self) -> tuple[str, str]:
        """Table 3 and its tests."""
        table, found = [[BASE, "0", *self.spreads(self.base, BESIDE), ""]], {}
        for method in METHODS:
            found[method], measured = self.crossings(method)
            cells = [with_spread([line["step"] for line in found[method]], "{:.0f}", "{:.0f}"),
                     *(with_spread([line["measures"][name] for line in found[method]]) for name in BESIDE)]
            if measured and not found[method]:
                cells = ["not reached"] * len(cells)
            table.append([NAMES[method], *cells, f"{len(found[method])} of {measured}"])
        return markdown(["", "step", *BESIDE, "concepts that reach it"], table), compared(found, BESIDE)

    # ---------------------------------------------------------------------------------------------- other tables
    def learning_rates(self) -> str:
        """What was tried, and what was chosen."""
        rates, fixed, table = self.settings.rates, dict(self.settings.fixed), []
        for method in METHODS:
            if method in fixed:
                cells = ["not tried"] * len(rates) + [f"{fixed[method]:g} (given)"]
            else:
                chosen = self.plan.rates.get(method)
                cells = [number(score_of_rate(self.plan, self.results, method, rate)) for rate in rates]
                cells.append(f"{chosen:g}" if chosen else NOT_RUN)
            table.append([NAMES[method], *cells])
        return markdown(["", *(f"{rate:g}" for rate in rates), "chosen"], table)

    def curve_table(self, curves: dict[str, Curve], longer: Sequence[int] = ()) -> str:
        """concept / ordinary / decided of each curve at each step."""
        steps = [0, *self.settings.curve_steps, *longer]
        table = [[NAMES.get(label, label), *(self.triple(curve.get(step, [])) if step in curve or not curve else ""
                                             for step in steps)]
                 for label, curve in curves.items()]
        return markdown(["step", *map(str, steps)], table)

    def learned_at(self, curve: Curve) -> str:
        """The first measured step with `part` of the teacher's concept fidelity, of means over concepts."""
        goal = self.mean(self.plan.reference(TEACHER, self.plan.curve_concepts), "concept")
        means = {step: self.mean(asked, "concept") for step, asked in curve.items()}
        if goal is None or not means or None in means.values():
            return NOT_RUN
        found = [step for step, mean in sorted(means.items()) if mean >= self.settings.part * goal]
        return str(found[0]) if found else f"later than {max(means)}"

    def lessons(self) -> str:
        """What each number of the recipe does."""
        table = []
        for label, curve in self.plan.curves(LESSONS).items():
            last = curve.get(self.settings.curve_steps[-1], [])
            table.append([label, self.learned_at(curve), *self.means(last), *self.cost(last)[1:]])
        return markdown(["", f"step with {self.settings.part:g} of the teacher's concept", *DRAWN, "passes", "seconds"],
                        table)

    def samplers(self) -> str:
        """Rollouts of K steps, sampled with other numbers of steps."""
        table = [[label, *(self.means(asked)[0] if label == TEACHER else self.triple(asked) for asked in row.values())]
                 for label, row in self.plan.samplers().items()]
        return markdown(["sampled with", *(f"{n} steps" for n in self.settings.lesson_samplers)], table)

    def gentle(self) -> tuple[str, str]:
        """Table 1's first seed at the learning rates that were chosen and at a smaller one, and the latter's test."""
        table, lines = [], {}
        for method in ("sft", "dopsd"):
            chosen = self.plan.trained(method, self.plan.test, self.settings.steps)
            for asked in (chosen, self.plan.gentle(method)):
                rate = f", {asked[0].training.lr:g}" if asked else ""
                table.append([NAMES[method] + rate, *self.spreads(asked, COMPARED)])
            lines[method] = self.results.of(self.plan.gentle(method))
        return markdown(["", *COMPARED], table), compared(lines, COMPARED, ("sft",))

    def validation(self) -> str:
        """The measures on renderings and on damaged ones."""
        (found,) = self.results.measures([Measurement(Training(VALIDATION))]) or [{}]
        if not found:
            return NOT_RUN
        columns = list(next(iter(found.values())))
        return markdown(["", *columns], [[name, *(number(row[c]) for c in columns)] for name, row in found.items()])

    # ---------------------------------------------------------------------------------------------- the document
    def text(self) -> str:
        s, plan = self.settings, self.plan
        one, two, three, gentle = (self.comparison("steps"), self.comparison("passes"), self.at_equal_concept(),
                                   self.gentle())                   # each a table and its tests
        parts = [
            "# Results", f"Settings {self.results.key}: {len(plan.test)} test concepts, {len(s.seeds)} seeds, "
            f"{s.concept_prompts} prompts with [V] and {s.ordinary_prompts} ordinary ones per measurement, "
            f"{plan.sampler} solver steps. The protocol in words: experiments/README.md. ± is the standard deviation "
            "over concepts and seeds (base and teacher's view: over concepts).",
            "## Table 1: equal optimizer steps", one[0],
            "Paired differences: mean, [95 % bootstrap interval], p of the sign-flip test over pairs of (concept, "
            "seed); in brackets p over concept means.", one[1],
            "Concept fidelity by concept, mean over seeds:", self.by_concept(),
            "## Table 2: equal forward passes", two[0], "Paired differences:", two[1],
            "## Table 3: equal concept fidelity",
            f"Where each run reaches {s.part:g} of the teacher's fidelity of its concept: straight lines between steps "
            f"{', '.join(map(str, plan.early_steps))}; seed {s.seeds[0]}.", three[0],
            "Paired differences, over concepts:", three[1],
            "## Learning rates", "Concept fidelity minus the loss of ordinary accuracy, on the tuning concepts.",
            self.learning_rates(), "## Curves", "Each cell: " + " / ".join(DRAWN) + "; mean over "
            + ", ".join(plan.curve_concepts) + "; one seed."]
        for title, curves in plan.ablations().items():
            parts += [f"By {title}:", self.curve_table(curves)]
        if s.lessons:
            parts += ["## What the numbers teach", "D-OPSD, same concepts, one seed.", self.lessons(),
                      "Each cell: " + " / ".join(DRAWN) + " (teacher's view: concept).", self.samplers(),
                      "## A smaller learning rate", f"Table 1 with seed {s.seeds[0]}, at the chosen rates and at "
                      f"{GENTLE:g}.", gentle[0], f"Paired differences at {GENTLE:g}, over concepts:", gentle[1],
                      "## Causes", "Longer runs, a faster EMA, a finer grid. Cells, concepts and seed as for the "
                      "curves.", self.curve_table(plan.curves(CAUSES), [LONGER])]
        return "\n\n".join([*parts, "## The measures themselves", "On true renderings and on damaged ones:",
                            self.validation()]) + "\n"


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


def compared(lines: dict[str, list[dict]], measures: Sequence[str], others: Sequence[str] = METHODS[:-1]) -> str:
    """D-OPSD against other methods, where both have the same concept and seed. lines: of each method."""
    table = []
    for method in others:
        found = [paired(lines["dopsd"], lines[method], measure) for measure in measures]
        count = next((p.count for p in found if p), 0)
        table.append([f"D-OPSD - {NAMES[method]}", *map(test_cell, found), str(count)])
    return markdown(["", *measures, "pairs"], table)


# -------------------------------------------------------------------------------------------------- cells and tables
def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def with_spread(values: list[float], form: str = "{:.3f}", spread_form: str = "{:.3f}") -> str:
    """Mean ± standard deviation; a single value has none."""
    if not values:
        return NOT_RUN
    mean, spread = mean_and_spread(values)
    return form.format(mean) + (f" ± {spread_form.format(spread)}" if len(values) > 1 else "")


def number(value: float | None) -> str:
    return NOT_RUN if value is None else f"{value:.3f}"


def test_cell(found: Paired | None) -> str:
    if found is None:
        return NOT_RUN
    return (f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}] p {found.p:.4f} ({found.p_concepts:.4f})")
