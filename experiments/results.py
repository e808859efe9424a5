"""results.jsonl: one line per measurement, and the settings that all of them share.

The first line holds the settings in full with their fingerprint, every other line the fingerprint. Lines of other
settings are refused, so that no table mixes two protocols, models or versions of the measures.
"""
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from experiments.protocol import BASE, Measurement, Plan, Training
from plumbing.files import InputError, append_json_line, write_bytes


def fingerprint(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def flat(facts, name: str = "") -> dict[str, object]:
    """Nested dictionaries -> {"protocol.steps": 150, ...}."""
    if not isinstance(facts, dict):
        return {name: facts}
    return {key: value for part, inner in facts.items()
            for key, value in flat(inner, f"{name}.{part}" if name else part).items()}


def difference(theirs: dict, ours: dict) -> str:
    """The first setting that differs, in words."""
    a, b = flat(theirs), flat(ours)
    name = next(name for name in [*b, *a] if a.get(name) != b.get(name))
    return f"{name} was {a.get(name, 'absent')} and is now {b.get(name, 'absent')}"


def parsed(text: str | bytes) -> dict | None:
    """The object in a line; None if it is not a whole one."""
    try:
        content = json.loads(text)
    except ValueError:                                                  # also of bytes that are no UTF-8
        return None
    return content if isinstance(content, dict) else None


def read_lines(path: Path) -> list[dict]:
    """All whole lines; a broken one is skipped with a warning that names its number."""
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n"), 1):
        content = parsed(text)
        if content is not None:
            lines.append(content)
        elif text.strip():
            print(f"warning: {path}, line {number}: not a whole line; skipped", file=sys.stderr)
    return lines


class Results:
    """The measurements of one results file, by point."""

    def __init__(self, path: Path, facts: dict | None = None) -> None:
        """facts: the settings now; None takes those of the file, to look only. Raises InputError; writes nothing."""
        self.path, self.measured = Path(path), {}
        lines = read_lines(self.path) if self.path.is_file() else []
        known = {line["settings"]: line["facts"] for line in lines if "facts" in line}
        if facts is None:
            if not known:
                raise InputError(f"{self.path}: no results here; run without --report first, or give their --out")
            facts = list(known.values())[-1]
        self.facts = json.loads(json.dumps(facts))                      # as the file has them: lists, no tuples
        self.key = fingerprint(self.facts)
        self.has_header = self.key in known
        for line in lines:
            if line.get("settings") != self.key:
                theirs = known.get(line.get("settings"))
                what = difference(theirs, self.facts) if theirs else f"fingerprint {line.get('settings')}"
                raise InputError(f"{self.path}: measured with other settings ({what}); give another --out, or remove "
                                 "this file")
            if "run" in line:
                self.measured[point_of(line)] = line

    def open(self) -> None:
        """Make the file ready for new lines: no half line at its end, the settings in it."""
        if self.path.is_file():
            content = self.path.read_bytes()
            before, end, last = content.rpartition(b"\n")
            if last:
                write_bytes(self.path, content + b"\n" if parsed(last) is not None else before + end)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.has_header:
            append_json_line(self.path, {"settings": self.key, "facts": self.facts})
            self.has_header = True

    def add(self, line: dict) -> None:
        """One more measurement."""
        line = {"settings": self.key, **line}
        append_json_line(self.path, line)
        self.measured[point_of(line)] = line

    def of(self, points: Iterable[Measurement]) -> list[dict]:
        """The lines of those points that are measured."""
        return [self.measured[point] for point in points if point in self.measured]

    def measures(self, points: Iterable[Measurement]) -> list[dict]:
        return [line["measures"] for line in self.of(points)]


def line_of(point: Measurement, groups: tuple[str, ...], kind: str, passes: int, seconds: float, measures: dict) -> dict:
    """What the file keeps of a measurement. seconds: of training, all steps until this one."""
    run = point.training
    return {"run": run.name, "groups": list(groups), "method": run.method, "options": dict(run.options),
            "concept": run.concept, "kind": kind, "seed": run.seed, "lr": run.lr, "step": point.step,
            "sampler": point.sampler, "passes": passes, "seconds": round(seconds, 2), "measures": measures}


def point_of(line: dict) -> Measurement:
    run = Training(line["method"], line["concept"], line["seed"], line["lr"], tuple(line["options"].items()))
    return Measurement(run, line["step"], line["sampler"])


# ---------------------------------------------------------------------------------------------------- learning rates
def score_of_rate(plan: Plan, results: Results, method: str, rate: float) -> float | None:
    """Mean over the tuning concepts of concept fidelity minus what ordinary accuracy loses; None until all are there.

    What is lost against the base counts, what is gained does not.
    """
    points = plan.tuning(method, rate)
    tuned = results.measures(points)
    base = results.measures(plan.reference(BASE, (point.training.concept for point in points)))
    if not points or len(tuned) < len(points) or len(base) < len(points):
        return None
    return sum(m["concept"] - max(0.0, b["ordinary"] - m["ordinary"]) for m, b in zip(tuned, base)) / len(points)


def choose_rates(plan: Plan, results: Results) -> dict[str, float]:
    """Method -> its learning rate: given, or the best of those that were tried (the smaller of equal ones)."""
    rates = dict(plan.settings.fixed)
    for method in plan.settings.methods:
        if method not in rates:
            scores = {rate: score_of_rate(plan, results, method, rate) for rate in sorted(plan.settings.rates)}
            tried = {rate: score for rate, score in scores.items() if score is not None}
            if tried:
                rates[method] = max(tried, key=tried.get)
    return rates
