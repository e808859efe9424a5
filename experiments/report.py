"""tables.md from results.jsonl: means and standard deviations over concepts and seeds, paired tests, curves as numbers.

A cell that nobody measured says "not run".
"""
from collections.abc import Iterable, Sequence
from statistics import fmean

from experiments.measure import MEASURES
from experiments.protocol import (BASE, GRADIENT_PASS, ROWS, TEACHER, VALIDATION, Curve, Measurement, Plan,
                                  Settings, Training)
from experiments.results import Results, choose_rates, score_of_rate
from tiny.comparison import NOT_RUN, crossing, markdown, minus, paired, with_spread

COMPARED = ("concept", "ordinary", "ordinary, decided", "diversity")            # what is tested
DRAWN = COMPARED[:3]                                                # what curves show
LOST = COMPARED[1:3]                                                # what shall stay as the untuned model has it
RETAINED = ("ordinary", "ordinary, distance", "ordinary, decided")
COST = ("step", "cost", "seconds")
CELL = "Each cell: " + " / ".join(DRAWN)
TESTED = ("Paired differences: mean, [95 % bootstrap interval], p of the sign-flip test over pairs of (concept, seed); "
          "in brackets p over concept means.")


class Report:
    """The tables of one results file; sections that need more than a table are lists of paragraphs."""

    def __init__(self, results: Results) -> None:
        facts = results.facts
        self.results, self.settings = results, Settings(**facts["protocol"], rows=(*ROWS, *facts.get("code", {})))
        self.plan = Plan(self.settings, facts["concepts"], facts["recipe"])
        self.plan.rates, self.titles = choose_rates(self.plan, results), self.plan.titles
        self.base = self.plan.reference(BASE, self.plan.test)
        self.before = {line["concept"]: line["measures"] for line in results.of(self.base)}

    def text(self) -> str:
        s, plan = self.settings, self.plan
        parts = [
            "# Results", f"Settings {self.results.key}: {len(plan.test)} test concepts, {len(s.seeds)} seeds, "
            f"{s.concept_prompts} prompts with [V] and {s.ordinary_prompts} ordinary ones per measurement, "
            f"{plan.sampler} solver steps. The protocol in words: experiments/README.md. ± is the standard deviation "
            "over concepts and seeds (base and teacher's view: over concepts). Cost: forward passes of one picture, "
            f"with a gradient one counts {GRADIENT_PASS:g}.",
            "## Table 1: equal optimizer steps", *self.comparison("steps"),
            "## Table 2: equal cost", *self.comparison("cost"),
            "## Table 3: the cost of a concept", *self.costs(),
            "## Learning rates", "Concept fidelity minus the loss of ordinary accuracy and of decided marks, on the "
            "tuning concepts.", self.learning_rates()]
        if s.ablations:
            parts += ["## What is kept", f"Table 1's D-OPSD with other --keep; seed {s.seeds[0]}, all test concepts.",
                      *self.varied(plan.kept()), "## Learned states",
                      f"Mean over {', '.join(plan.curve_concepts)}; all seeds.", *self.varied(plan.states())]
        parts += ["## Curves", f"{CELL}; mean over {', '.join(plan.curve_concepts)}; one seed."]
        for title, curves in plan.ablations().items():
            parts += [f"By {title}:", self.curve_table(curves)]
        if s.lessons:
            parts += ["## What the numbers of the recipe do", "Same concepts, one seed.", *self.varied(plan.lessons())]
        parts += ["## The measures themselves", "On true renderings and on damaged ones:", self.validation()]
        return "\n\n".join(parts) + "\n"

    def triple(self, asked: Iterable[Measurement]) -> str:
        """Means of what curves show; the teacher's view has the concept alone, as it has no ordinary prompts."""
        lines = self.results.of(asked)
        return " / ".join(filter(None, cells(lines, DRAWN, spread=False))) if lines else NOT_RUN

    def untuned(self, lines: list[dict]) -> list[dict]:
        """For each line the untuned model's at the same concept."""
        return [{**line, "measures": self.before[line["concept"]]} for line in lines if line["concept"] in self.before]

    def comparison(self, equal: str) -> list[str]:
        """Table 1 or 2, its tests, and (table 1) concept fidelity by concept."""
        asked = {row: self.plan.table(row, equal) for row in self.titles}
        asked = {BASE: self.base, **asked, TEACHER: self.plan.reference(TEACHER, self.plan.test)}
        lines, table, titles = {row: self.results.of(points) for row, points in asked.items()}, [], self.titles
        for row, made in lines.items():
            retained = minus(made, self.untuned(made), RETAINED)
            table.append([titles.get(row, row), *cells(made, MEASURES), *cells(retained, RETAINED, "{:+.3f}"),
                          *(cells(made, COST, "{:.0f}", spread=False) if row in titles else [""] * len(COST)),
                          f"{len(made)} of {len(asked[row])}" if asked[row] else NOT_RUN])
        head = ["", *MEASURES, *(f"retention: {name.removeprefix('ordinary, ')}" for name in RETAINED), "steps", "cost",
                "seconds", "measured"]
        tests = [[f"{titles[row]} - {BASE}", *compared(lines[row], self.untuned(lines[row]))] for row in titles]
        tests += [[f"{titles[ours]} - {titles[row]}", *compared(lines[ours], lines[row])]
                  for ours, row in [*(("dopsd", row) for row in titles if row != "dopsd"), ("published", "dreambooth")]]
        gains = [minus(lines[kept], lines[row], COMPARED)
                 for kept, row in (("dopsd", "published"), ("sft-keep", "sft"))]
        tests += [["what keep gives D-OPSD - what it gives SFT", *compared(*gains)]]
        by_concept = [[self.plan.concepts[concept]["words"], *(
            cells([line for line in made if line["concept"] == concept], ["concept"], spread=False)[0]
            for made in lines.values())] for concept in self.plan.test]
        return [markdown(head, table), TESTED, markdown(["", *COMPARED, "pairs"], tests), *(
            ["Concept fidelity by concept, mean over seeds:", markdown(
                ["", *(titles.get(row, row) for row in lines)], by_concept)] if equal == "steps" else [])]

    def crossings(self, row: str) -> tuple[list[dict], int]:
        """Where runs reach `part` of the teacher's fidelity of their concept: lines with what it costs, one per concept
        that is reached in the measured steps; and of how many concepts. Between measured steps a straight line."""
        method, options = self.plan.method_of(row)
        lines, measured, cost = [], 0, self.plan.cost(method, dict(options))
        for concept in self.plan.test:
            curve = {step: self.results.of(made) for step, made in self.plan.early(row, concept).items()}
            teacher = means_of(self.results, self.plan.reference(TEACHER, [concept]), ["concept"]).get("concept")
            if not curve or teacher is None or not all(curve.values()):
                continue
            measured += 1
            names = [*DRAWN, "seconds"]
            found = crossing({step: [values_of(made, name)[0] for name in names] for step, made in curve.items()},
                             self.settings.part * teacher)
            if found:
                step, *values = found
                lines.append({"concept": concept, "seed": self.settings.seeds[0], "step": step,
                              "cost": cost[0] + step * cost[1], "seconds": values.pop(),
                              "measures": dict(zip(DRAWN, values))})
        return lines, measured

    def within(self, lines: list[dict]) -> int:
        """How many lose no more than `most_lost`."""
        lost = minus(self.untuned(lines), lines, LOST)
        return sum(all(line["measures"][name] <= most for name, most in zip(LOST, self.settings.most_lost))
                   for line in lost)

    def costs(self) -> list[str]:
        """Table 3 and its tests."""
        s, titles, table, found = self.settings, self.titles, [], {}
        for row, title in titles.items():
            found[row], measured = self.crossings(row)
            made = [*cells(found[row], COST, "{:.0f}"),
                    *cells(minus(found[row], self.untuned(found[row]), LOST), LOST, "{:+.3f}")]
            if measured and not found[row]:
                made = ["not reached"] * len(made)
            table.append([title, f"{len(found[row])} of {measured}", str(self.within(found[row])), *made])
        tests = [[f"{titles['dopsd']} - {titles[row]}", *compared(found["dopsd"], found[row], (*LOST, "cost"))]
                 for row in titles if row != "dopsd"]
        steps = sorted({step for row in self.plan.rates for step in self.plan.early(row, "")})
        return [f"Where each run reaches {s.part:g} of the teacher's fidelity of its concept, seed {s.seeds[0]}, and "
                f"what it has lost there against the untuned model; within bounds: no more than {s.most_lost[0]:g} of "
                f"ordinary accuracy and {s.most_lost[1]:g} of decided marks. Straight lines between measured steps "
                f"({', '.join(map(str, steps))}, for each row those that it has).",
                markdown(["", "concepts that reach it", "within bounds", *COST, *LOST], table),
                "Paired differences, over concepts:", markdown(["", *LOST, "cost", "pairs"], tests)]

    def varied(self, variants: dict[str, list[Measurement]]) -> list[str]:
        """A table of variants, and the first one's test against each other one."""
        lines = {label: self.results.of(asked) for label, asked in variants.items()}
        first, *others = variants
        return [markdown(["", *DRAWN, *COST[1:], "measured"], [
            [label, *cells(made, DRAWN), *cells(made, COST[1:], "{:.0f}", spread=False),
             f"{len(made)} of {len(variants[label])}"] for label, made in lines.items()]),
                f"{first}, minus each other one. {TESTED}", markdown(["", *DRAWN, "pairs"], [
                    [label, *compared(lines[first], lines[label], DRAWN)] for label in others])]

    def learning_rates(self) -> str:
        """What was tried, and what was chosen."""
        rates, table = self.settings.rates, []
        for row, title in self.titles.items():
            given, chosen = self.plan.given.get(row), self.plan.rates.get(row)
            scores = [score_of_rate(self.plan, self.results, row, rate) for rate in rates]
            tried = ["not tried" if given else NOT_RUN if score is None else f"{score:.3f}" for score in scores]
            table.append([title, *tried, f"{chosen:g}{' (given)' if given else ''}" if chosen else NOT_RUN])
        return markdown(["", *(f"{rate:g}" for rate in rates), "chosen"], table)

    def curve_table(self, curves: dict[str, Curve]) -> str:
        """The means of each curve at each of its steps."""
        steps = [0, *self.settings.curve_steps]
        return markdown(["step", *map(str, steps)], [
            [label, *(self.triple(curve.get(step, [])) for step in steps)] for label, curve in curves.items()])

    def validation(self) -> str:
        """The measures on renderings and on damaged ones."""
        for line in self.results.of([Measurement(Training(VALIDATION))]):
            rows = line["measures"]
            return markdown(["", *next(iter(rows.values()))],
                            [[name, *(f"{value:.3f}" for value in row.values())] for name, row in rows.items()])
        return NOT_RUN


# -------------------------------------------------------------------------------------------------- cells and tables
def values_of(lines: list[dict], name: str) -> list[float]:
    """Of a measure, or of what a line costs, where lines have it."""
    return [found[name] for found in ({**line, **line["measures"]} for line in lines) if name in found]


def means_of(results: Results, asked: Iterable[Measurement], names: Iterable[str]) -> dict[str, float]:
    """Of those that were made."""
    columns = {name: values_of(results.of(asked), name) for name in names}
    return {name: fmean(values) for name, values in columns.items() if values}


def cells(lines: list[dict], names: Sequence[str], form: str = "{:.3f}", spread: bool = True) -> list[str]:
    """Mean ± standard deviation, or the mean alone, of each of `names`; empty where lines do not have it."""
    columns = [values_of(lines, name) for name in names]
    if not spread:
        columns = [[fmean(values)] if values else [] for values in columns]
    return [with_spread(values, form) if values or not lines else "" for values in columns]


def compared(ours: list[dict], theirs: list[dict], names: Sequence[str] = COMPARED) -> list[str]:
    """Cells: the test of each measure (or cost), where both have the same concept and seed, and the number of pairs."""
    ours, theirs = ([{**line, "measures": {**line, **line["measures"]}} for line in side] for side in (ours, theirs))
    found = [paired(ours, theirs, name) for name in names]
    return [*(str(test or NOT_RUN) for test in found), str(found[0].count if found[0] else 0)]
