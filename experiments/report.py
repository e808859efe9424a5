"""tables.md from results.jsonl: means and standard deviations over concepts and seeds, paired tests, curves as numbers.

A cell that nobody measured says "not run".
"""
from collections.abc import Sequence
from itertools import pairwise

from experiments.compare import Paired, mean_and_spread, paired
from experiments.measure import MEASURES
from experiments.protocol import (
    BASE,
    GENTLE,
    LONGER,
    METHODS,
    TEACHER,
    VALIDATION,
    Measurement,
    Plan,
    Training,
    from_facts,
)
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
        self.results, self.concepts = results, facts["concepts"]
        self.plan = Plan(from_facts(facts["protocol"]), facts["concepts"], facts["recipe"])
        self.settings = self.plan.settings
        self.rates = choose_rates(self.plan, results)

    def mean(self, points: Sequence[Measurement], measure: str) -> float | None:
        """Mean over those points that were measured and have this measure."""
        values = [m[measure] for m in self.results.measures(points) if measure in m]
        return sum(values) / len(values) if values else None

    def spread(self, points: Sequence[Measurement], measure: str) -> str:
        """Mean and standard deviation as a cell."""
        values = [m[measure] for m in self.results.measures(points) if measure in m]
        return with_spread(values, "{:.3f}")

    # ---------------------------------------------------------------------------------------------- tables 1 and 2
    def rows(self, equal: str) -> dict[str, list[Measurement]]:
        """Label -> points of a row."""
        return {BASE: self.plan.reference(BASE, self.plan.test),
                **{NAMES[method]: self.plan.table(method, self.rates, equal) for method in METHODS},
                TEACHER: self.plan.reference(TEACHER, self.plan.test)}

    def comparison(self, equal: str) -> list[str]:
        """Table 1 or 2."""
        base = self.plan.reference(BASE, self.plan.test)
        table = []
        for label, points in self.rows(equal).items():
            lines = self.results.of(points)
            kept = {m: self.retention(points, base, m) for m in ("ordinary", "ordinary, distance")}
            cells = [self.spread(points, measure) for measure in MEASURES]
            if label == TEACHER:                                                # it is shown a picture at every prompt
                cells = [cell if not measure.startswith("ordinary") else "" for measure, cell in zip(MEASURES, cells)]
                kept = dict.fromkeys(kept, "")
            trained = lines[0] if lines and lines[0]["lr"] is not None else None
            if trained:
                seconds = sum(line["seconds"] for line in lines) / len(lines)
                cost = [f"{trained['step']}", f"{trained['passes']}", f"{seconds:.0f}"]
            else:
                cost = ["", "", ""] if label in (BASE, TEACHER) else [NOT_RUN] * 3
            measured = f"{len(lines)} of {len(points)}" if points else NOT_RUN
            table.append([label, *cells, *kept.values(), *cost, measured])
        return markdown(["", *MEASURES, "retention: ordinary", "retention: distance", "steps", "passes", "seconds",
                         "measured"], table)

    def retention(self, points: list[Measurement], base: list[Measurement], measure: str) -> str:
        """Mean and spread of a measure minus the base's own, over the same prompts and noises."""
        before = {line["concept"]: line["measures"][measure] for line in self.results.of(base)}
        values = [line["measures"][measure] - before[line["concept"]] for line in self.results.of(points)
                  if measure in line["measures"] and line["concept"] in before]
        return with_spread(values, "{:+.3f}")

    def tests(self, equal: str) -> list[str]:
        """D-OPSD against each other method."""
        return compared({method: self.results.of(self.plan.table(method, self.rates, equal)) for method in METHODS},
                        COMPARED)

    def by_concept(self) -> list[str]:
        """Concept fidelity in table 1, mean over seeds."""
        rows = self.rows("steps")
        table = [[facts["words"],
                  *(number(self.mean([p for p in points if p.training.concept == name], "concept"))
                    for points in rows.values())]
                 for name, facts in self.concepts.items() if not facts["tuning"]]
        return markdown(["", *rows], table)

    # ---------------------------------------------------------------------------------------------- table 3
    def crossings(self, method: str) -> tuple[list[dict], int]:
        """Where runs reach `part` of the teacher's fidelity of their concept: lines for `compared`, one per concept
        that is reached in table 1's steps; and of how many concepts. Between measured steps a straight line."""
        lines, measured = [], 0
        for concept in self.plan.test:
            curve = {step: self.results.measures([point])
                     for step, point in self.plan.early(method, self.rates, concept).items()}
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

    def at_equal_concept(self) -> tuple[list[str], list[str]]:
        """Table 3 and its tests."""
        base = self.results.measures(self.plan.reference(BASE, self.plan.test))
        table = [[BASE, "0", *(with_spread([m[name] for m in base], "{:.3f}") for name in BESIDE), ""]]
        found = {}
        for method in METHODS:
            found[method], measured = self.crossings(method)
            cells = [with_spread([line["step"] for line in found[method]], "{:.0f}", "{:.0f}"),
                     *(with_spread([line["measures"][name] for line in found[method]], "{:.3f}") for name in BESIDE)]
            if measured and not found[method]:
                cells = ["not reached"] * len(cells)
            table.append([NAMES[method], *cells, f"{len(found[method])} of {measured}"])
        return markdown(["", "step", *BESIDE, "concepts that reach it"], table), compared(found, BESIDE)

    # ---------------------------------------------------------------------------------------------- other tables
    def learning_rates(self) -> list[str]:
        """What was tried, and what was chosen."""
        fixed, table = dict(self.settings.fixed), []
        for method in METHODS:
            if method in fixed:
                table.append([NAMES[method], *["not tried"] * len(self.settings.rates), f"{fixed[method]:g} (given)"])
                continue
            scores = [score_of_rate(self.plan, self.results, method, rate) for rate in self.settings.rates]
            table.append([NAMES[method], *map(number, scores),
                          f"{self.rates[method]:g}" if method in self.rates else NOT_RUN])
        return markdown(["", *(f"{rate:g}" for rate in self.settings.rates), "chosen"], table)

    def curve_table(self, curves: dict[str, dict[int, list[Measurement]]], longer: tuple[int, ...] = ()) -> list[str]:
        """concept / ordinary / decided of each curve at each step."""
        steps = [0, *self.settings.curve_steps, *longer]
        table = [[NAMES.get(label, label), *(self.triple(curve.get(step, [])) if step in curve or not curve else ""
                                             for step in steps)]
                 for label, curve in curves.items()]
        return markdown(["step", *map(str, steps)], table)

    def triple(self, points: list[Measurement]) -> str:
        cells = [number(self.mean(points, measure)) for measure in DRAWN]
        return NOT_RUN if NOT_RUN in cells else " / ".join(cells)

    def learned_at(self, curve: dict[int, list[Measurement]]) -> str:
        """The first measured step with `part` of the teacher's concept fidelity, of means over concepts."""
        goal = self.mean(self.plan.reference(TEACHER, self.plan.curve_concepts), "concept")
        means = {step: self.mean(points, "concept") for step, points in curve.items()}
        if goal is None or not means or None in means.values():
            return NOT_RUN
        found = [step for step, mean in sorted(means.items()) if mean >= self.settings.part * goal]
        return str(found[0]) if found else f"later than {max(means)}"

    def lessons(self) -> list[str]:
        """What each number of the recipe does."""
        table = []
        for title, curves in self.plan.lessons(self.rates).items():
            for value, curve in curves.items():
                points = curve.get(self.settings.curve_steps[-1], [])
                lines = self.results.of(points)
                cost = [str(lines[0]["passes"]), f"{sum(line['seconds'] for line in lines) / len(lines):.0f}"] \
                    if lines else [NOT_RUN] * 2
                table.append([f"{title} {value}", self.learned_at(curve),
                              *(number(self.mean(points, m)) for m in DRAWN), *cost])
        return markdown(["", f"step with {self.settings.part:g} of the teacher's concept", *DRAWN, "passes", "seconds"],
                        table)

    def samplers(self) -> list[str]:
        """Rollouts of K steps, sampled with other numbers of steps."""
        samplers, table = self.settings.lesson_samplers, []
        ends = {f"K = {k}": [(p.training, p.step) for p in curve.get(self.settings.curve_steps[-1], [])]
                for k, curve in self.plan.lessons(self.rates)["rollout steps K"].items()}
        for label, runs in {**ends, **{name: [(Training(name, concept), 0) for concept in self.plan.curve_concepts]
                                       for name in (BASE, TEACHER)}}.items():
            cells = []
            for sampler in samplers:
                points = [Measurement(run, step, sampler) for run, step in runs]
                cells.append(number(self.mean(points, "concept")) if label == TEACHER else self.triple(points))
            table.append([label, *cells])
        return markdown(["sampled with", *(f"{n} steps" for n in samplers)], table)

    def gentle(self) -> tuple[list[str], list[str]]:
        """Table 1's first seed at the learning rates that were chosen and at a smaller one, and the latter's test."""
        seed, table = self.settings.seeds[0], []
        for method in ("sft", "dopsd"):
            chosen = [p for p in self.plan.table(method, self.rates, "steps") if p.training.seed == seed]
            for points in (chosen, self.plan.gentle(method)):
                rate = f", {points[0].training.lr:g}" if points else ""
                table.append([NAMES[method] + rate, *(self.spread(points, name) for name in COMPARED)])
        lines = {m: self.results.of(self.plan.gentle(m)) for m in ("sft", "dopsd")}
        (test,) = compared(lines, COMPARED, ("sft",))
        return markdown(["", *COMPARED], table), [test]

    def validation(self) -> list[str]:
        """The measures on renderings and on damaged ones."""
        (found,) = self.results.measures([Measurement(Training(VALIDATION))]) or [{}]
        if not found:
            return [NOT_RUN]
        columns = list(next(iter(found.values())))
        return markdown(["", *columns], [[name, *(number(row[c]) for c in columns)] for name, row in found.items()])

    # ---------------------------------------------------------------------------------------------- the document
    def text(self) -> str:
        s, plan, equal = self.settings, self.plan, self.at_equal_concept()
        parts = [
            "# Results", f"Settings {self.results.key}: {len(plan.test)} test concepts, {len(s.seeds)} seeds, "
            f"{s.concept_prompts} prompts with [V] and {s.ordinary_prompts} ordinary ones per measurement, "
            f"{plan.sampler} solver steps. The protocol in words: experiments/README.md. ± is the standard deviation "
            "over concepts and seeds (base and teacher's view: over concepts).",
            "## Table 1: equal optimizer steps", *self.comparison("steps"),
            "Paired differences: mean, [95 % bootstrap interval], p of the sign-flip test over pairs of (concept, "
            "seed); in brackets p over concept means.", *self.tests("steps"),
            "Concept fidelity by concept, mean over seeds:", *self.by_concept(),
            "## Table 2: equal forward passes", *self.comparison("passes"), "Paired differences:",
            *self.tests("passes"),
            "## Table 3: equal concept fidelity",
            f"Where each run reaches {s.part:g} of the teacher's fidelity of its concept: straight lines between steps "
            f"{', '.join(map(str, plan.early_steps))}; seed {s.seeds[0]}.", *equal[0],
            "Paired differences, over concepts:", *equal[1],
            "## Learning rates", "Concept fidelity minus the loss of ordinary accuracy, on the tuning concepts.",
            *self.learning_rates(), "## Curves", "Each cell: " + " / ".join(DRAWN) + "; mean over "
            + ", ".join(plan.curve_concepts) + "; one seed."]
        for title, curves in plan.curves(self.rates).items():
            parts += [f"By {title}:", *self.curve_table(curves)]
        if s.lessons:
            gentle = self.gentle()
            parts += ["## What the numbers teach", "D-OPSD, same concepts, one seed.", *self.lessons(),
                      "Each cell: " + " / ".join(DRAWN) + " (teacher's view: concept).", *self.samplers(),
                      "## A smaller learning rate", f"Table 1 with seed {s.seeds[0]}, at the chosen rates and at "
                      f"{GENTLE:g}.", *gentle[0], f"Paired differences at {GENTLE:g}, over concepts:", *gentle[1],
                      "## Causes", "Longer runs, a faster EMA, a finer grid. Cells, concepts and seed as for the "
                      "curves.", *self.curve_table(plan.causes(self.rates), (LONGER,))]
        parts += ["## The measures themselves", "On true renderings and on damaged ones:", *self.validation()]
        return "\n\n".join(parts) + "\n"


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


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table as one block of text."""
    lines = [head, ["---"] * len(head), *rows]
    return ["\n".join("| " + " | ".join(cells) + " |" for cells in lines)]


def compared(lines: dict[str, list[dict]], measures: Sequence[str], others: Sequence[str] = METHODS[:-1]) -> list[str]:
    """D-OPSD against other methods, where both have the same concept and seed. lines: of each method."""
    table = []
    for method in others:
        found = {measure: paired(lines["dopsd"], lines[method], measure) for measure in measures}
        count = next((p.count for p in found.values() if p), 0)
        table.append([f"D-OPSD - {NAMES[method]}", *map(test_cell, found.values()), str(count)])
    return markdown(["", *measures, "pairs"], table)


def with_spread(values: list[float], form: str, spread_form: str = "{:.3f}") -> str:
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
