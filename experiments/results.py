"""results.jsonl: one line per measurement, and the settings that all of them share.

The first line holds the settings in full with their fingerprint, every other line the fingerprint. Lines of other
settings are refused, so that no table mixes two protocols, models or versions of the measures.
"""
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import train
from tiny.concepts import Concept
from experiments.measure import METRICS
from experiments.protocol import BASE, Job, Measurement, Plan, Training
from plumbing.checkpoints import recipe_of
from plumbing.files import InputError, append_json_line, model_key, write_bytes

MODEL_PARTS = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer", "vlm")
RECIPE = ("rollout_steps", "inference_steps", "batch_size", "accumulate", "rank", "alpha", "ema", "loss", "size",
          "beta")


def facts_of(protocol: dict, concepts: Iterable[Concept], model: Path) -> dict:
    """All that decides the numbers, as JSON: two results files with the same facts may be joined."""
    recipe = {**dataclasses.asdict(recipe_of(model)), "beta": train.Options.beta}
    about = {c.name: {"kind": c.kind, "words": c.words, "key": c.key, "tuning": c.tuning} for c in concepts}
    return {"protocol": protocol, "recipe": {name: recipe[name] for name in RECIPE}, "concepts": about,
            "model": model_key(model, *MODEL_PARTS), "metrics": METRICS}


def fingerprint(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def difference(theirs, ours, name: str = "") -> str:
    """The first setting that differs, in words; "" if none does."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        parts = (difference(theirs.get(key, "absent"), ours.get(key, "absent"), f"{name}.{key}".strip("."))
                 for key in [*ours, *theirs])
        return next(filter(None, parts), "")
    return f"{name} was {theirs} and is now {ours}" if theirs != ours else ""


def parsed(text: bytes) -> dict | None:
    """The object in a line; None if it is not a whole one."""
    try:
        content = json.loads(text)
    except ValueError:                                                  # also of bytes that are no UTF-8
        return None
    return content if isinstance(content, dict) else None


class Results:
    """The measurements of one results file."""

    def __init__(self, path: Path, facts: dict | None = None) -> None:
        """facts: the settings now; None takes those of the file, to look only. Raises InputError; writes nothing."""
        self.path, self.measured = Path(path), {}
        texts = self.path.read_bytes().split(b"\n") if self.path.is_file() else []
        self.whole, lines = [], []
        for number, text in enumerate(texts, 1):
            content = parsed(text)
            if content is not None:
                self.whole.append(text)
                lines.append(content)
            elif text.strip():
                print(f"warning: {self.path}, line {number}: not a whole line; skipped", file=sys.stderr)
        known = {line["settings"]: line["facts"] for line in lines if "facts" in line}
        if facts is None and not known:
            raise InputError(f"{self.path}: no results here; run without --report first, or give their --out")
        facts = list(known.values())[-1] if facts is None else facts
        self.facts = json.loads(json.dumps(facts))                      # as the file has them: lists, no tuples
        self.key = fingerprint(self.facts)
        for line in lines:
            if line.get("settings") != self.key:
                theirs = known.get(line.get("settings"))
                what = difference(theirs, self.facts) if theirs else f"fingerprint {line.get('settings')}"
                raise InputError(f"{self.path}: measured with other settings ({what}); give another --out, or remove "
                                 "this file")
            if "run" in line:
                self.measured[measurement_of(line)] = line
        self.has_header = self.key in known

    def open(self) -> None:
        """Make the file ready for new lines: whole ones only, the settings in it."""
        write_bytes(self.path, b"".join(text + b"\n" for text in self.whole))
        if not self.has_header:
            append_json_line(self.path, {"settings": self.key, "facts": self.facts})

    def add(self, line: dict) -> None:
        """One more measurement."""
        line = {"settings": self.key, **line}
        append_json_line(self.path, line)
        self.measured[measurement_of(line)] = line

    def of(self, measurements: Iterable[Measurement]) -> list[dict]:
        """The lines of those that are made."""
        return [self.measured[m] for m in measurements if m in self.measured]

    def measures(self, measurements: Iterable[Measurement]) -> list[dict]:
        return [line["measures"] for line in self.of(measurements)]


def line_of(m: Measurement, job: Job, seconds: float, measures: dict) -> dict:
    """What the file keeps of a measurement. seconds: of training, all steps until this one."""
    t = m.training
    return {"run": t.name, "groups": list(m.groups), "method": t.method, "options": dict(t.options),
            "concept": t.concept, "kind": job.kind, "seed": t.seed, "lr": t.lr, "step": m.step, "sampler": m.sampler,
            "passes": m.step * job.passes, "seconds": round(seconds, 2), "measures": measures}


def measurement_of(line: dict) -> Measurement:
    training = Training(line["method"], line["concept"], line["seed"], line["lr"], tuple(line["options"].items()))
    return Measurement(training, line["step"], line["sampler"])


# ---------------------------------------------------------------------------------------------------- learning rates
def score_of_rate(plan: Plan, results: Results, method: str, rate: float) -> float | None:
    """Mean over the tuning concepts of concept fidelity minus what ordinary accuracy loses; None until all are there.

    What is lost against the base counts, what is gained does not.
    """
    tuned = results.measures(plan.tuning(method, rate))
    base = results.measures(plan.reference(BASE, plan.tuning_concepts))
    count = len(plan.tuning_concepts)
    if not count or len(tuned) < count or len(base) < count:
        return None
    return sum(m["concept"] - max(0.0, b["ordinary"] - m["ordinary"]) for m, b in zip(tuned, base)) / count


def choose_rates(plan: Plan, results: Results) -> dict[str, float]:
    """Method -> its learning rate: given, or the best of those that were tried (the smaller of equal ones)."""
    rates, given = {}, dict(plan.settings.fixed)
    for method in plan.settings.methods:
        scores = {rate: score_of_rate(plan, results, method, rate) for rate in sorted(plan.settings.rates)}
        tried = {rate: score for rate, score in scores.items() if score is not None}
        if method in given or tried:
            rates[method] = given[method] if method in given else max(tried, key=tried.get)
    return rates
