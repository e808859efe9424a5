"""results.jsonl: one line per measurement, and the settings that all of them share.

The first line holds the settings in full with their fingerprint, every other line the fingerprint. Lines of other
settings are refused, so that no table mixes two protocols, models or versions of the measures.
"""
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

import data
import train
from tiny.concepts import ORDINARY, Concept, write_json_lines
from experiments.measure import METRICS
from experiments.protocol import BASE, Job, Measurement, Plan, Training
from plumbing.recipes import Recipe
from plumbing.files import InputError, append_json_line, model_key

RECIPE = ("rollout_steps", "inference_steps", "batch_size", "accumulate", "rank", "alpha", "ema", "loss", "size",
          "beta")
KEEP = ("grad_states", "keep_weight")


def facts_of(protocol: dict, concepts: Iterable[Concept], model: Path, recipe: Recipe, names: Iterable[str] = RECIPE
             ) -> dict:
    """All that decides the numbers, as JSON: two results files with the same facts may be joined. names: of what the
    rows take from the recipe; with those of KEEP also the captions that are kept."""
    values = {**dataclasses.asdict(recipe), "beta": train.Options.beta}
    kept = {"kept": fingerprint_of_captions(ORDINARY)} if "keep_weight" in names else {}
    about = {c.name: {"kind": c.kind, "words": c.words, "key": c.key, "tuning": c.tuning} for c in concepts}
    key = model_key(model, "transformer", "scheduler", "vae", "text_encoder", "tokenizer", "vlm")
    return {"protocol": protocol, "recipe": {name: values[name] for name in names}, "concepts": about, "model": key,
            "metrics": METRICS, **kept}


def fingerprint_of_captions(path: Path | str) -> str:
    return fingerprint({"texts": [row.captions for row in data.read_folder(path, captions_suffice=True)]})


def fingerprint(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def difference(theirs, ours, name: str = "") -> str:
    """The first setting that differs, in words; "" if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        parts = (difference(theirs.get(key, "absent"), ours.get(key, "absent"), f"{name}.{key}".strip("."))
                 for key in [*ours, *theirs])
        return next(filter(None, parts), "")
    return f"{name} was {theirs} and is now {ours}" if theirs != ours else ""


def read(path: Path) -> list[dict]:
    """The whole lines of a file; half a line, as a crash leaves it, is skipped with a warning."""
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            lines.append(dict(json.loads(text)))
        except (TypeError, ValueError):                             # no object; no JSON or no UTF-8
            print(f"warning: {path}, line {number}: not a whole line; skipped", file=sys.stderr)
    return lines


class Results:
    """The measurements of one results file."""

    def __init__(self, path: Path, facts: dict | None = None) -> None:
        """facts: the settings now; None takes those of the file, to look only. Raises InputError; writes nothing."""
        self.path, lines = Path(path), read(Path(path))
        known = {line["settings"]: line["facts"] for line in lines if "facts" in line}
        if facts is None and not known:
            raise InputError(f"{path}: no results here; run without --report first, or give their --out")
        facts = list(known.values())[-1] if facts is None else facts
        self.facts = json.loads(json.dumps(facts))                      # as the file has them: lists, no tuples
        self.key = fingerprint(self.facts)
        for key in (line.get("settings") for line in lines):
            if key != self.key:
                what = difference(known[key], self.facts) if key in known else f"fingerprint {key}"
                raise InputError(f"{path}: measured with other settings ({what}); give another --out, or remove this "
                                 "file")
        self.measured = {measurement_of(line): line for line in lines if "run" in line}

    def open(self) -> None:
        """Make the file ready for new lines: whole ones only, the settings in it."""
        write_json_lines(self.path, [{"settings": self.key, "facts": self.facts}, *self.measured.values()])

    def take_over(self, other: "Results", wanted: Callable[[Training], bool]) -> None:
        """The other's measurements of these trainings beside our own."""
        self.measured = {m: {**line, "settings": self.key} for m, line in other.measured.items()
                         if wanted(m.training)} | self.measured

    def add(self, line: dict) -> None:
        """One more measurement."""
        line = {"settings": self.key, **line}
        append_json_line(self.path, line)
        self.measured[measurement_of(line)] = line

    def of(self, measurements: Iterable[Measurement]) -> list[dict]:
        """The lines of those that are made."""
        return [self.measured[m] for m in measurements if m in self.measured]


def line_of(m: Measurement, job: Job, seconds: float, measures: dict) -> dict:
    """What the file keeps of a measurement. seconds: of training, all steps until this one."""
    t = m.training
    return {"run": t.name, "groups": list(m.groups), "method": t.method, "options": dict(t.options),
            "concept": t.concept, "kind": job.kind, "seed": t.seed, "lr": t.lr, "step": m.step,
            "cost": job.first_cost + m.step * job.cost, "seconds": round(seconds, 2), "measures": measures}


def measurement_of(line: dict) -> Measurement:
    training = Training(line["method"], line["concept"], line["seed"], line["lr"], tuple(line["options"].items()))
    return Measurement(training, line["step"])


def score_of_rate(plan: Plan, results: Results, row: str, rate: float) -> float | None:
    """Mean over the tuning concepts of concept fidelity minus what ordinary accuracy and decided marks lose; None until
    all are there. What is lost against the base counts, what is gained does not."""
    tuned, base = ([line["measures"] for line in results.of(asked)] for asked in (
        plan.tuning(row, rate), plan.reference(BASE, plan.tuning_concepts)))
    if not len(tuned) == len(base) == len(plan.tuning_concepts) > 0:
        return None
    return fmean(m["concept"] - sum(max(0.0, b[name] - m[name]) for name in ("ordinary", "ordinary, decided"))
                 for m, b in zip(tuned, base))


def choose_rates(plan: Plan, results: Results) -> dict[str, float]:
    """Row -> its learning rate: given, or the best of those that were tried (the smaller of equal ones)."""
    rates = {}
    for row in plan.settings.rows:
        given = plan.given.get(row)
        scores = {rate: score_of_rate(plan, results, row, rate) for rate in sorted(plan.settings.rates)}
        tried = [rate for rate in scores if scores[rate] is not None]
        if given or tried:
            rates[row] = given or max(tried, key=scores.get)
    return rates
