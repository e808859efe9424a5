"""report.html: a run on one page, to open, to send, and to put beside others. No network, no dependency.

`write` reads nothing but the run's folder: config.json, metrics.jsonl, samples/step_N.png and scores.json. What is
damaged or missing there becomes a sentence: a page to look at should end no run. The template is report.html beside
this file; tables are made here and need no JavaScript, curves and sliders there.
"""
import base64
import functools
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html import escape
from pathlib import Path
from shlex import quote
from statistics import median

from plumbing import recipes
from plumbing.files import ROOT, InputError, real, write_bytes
from plumbing.machine import in_words
from plumbing.pictures import open_image
from plumbing.train_options import FULL, Options, what_is_kept

NAME, TEMPLATE, FLOATS = "report.html", Path(__file__).with_suffix(".html"), ("seconds", "peak_memory_gb")
MOST, LARGE = 24, 400_000           # panels of a run on a page; bytes from which a PNG becomes a JPEG
ELSEWHERE = ("data", "model", "out", "resume", "dtype", "checkpointing")    # options that stand above, or the machine's
RECIPES = {recipe.name: recipe for recipe in vars(recipes).values() if isinstance(recipe, recipes.Recipe)}
PART, SLOT = re.compile(r"\{\{#(\w+)\}\}(.*?)\{\{/\1\}\}", re.DOTALL), re.compile(r"\{\{(\w+)\}\}")


class Run:
    """What a run's folder says; its notes are sentences on what it does not say."""

    def __init__(self, out: Path, name: str) -> None:
        self.out, self.name, self.notes = out, name, list[str]()
        self.config, self.scores = ((self.objects(file) or [{}])[0] for file in ("config.json", "scores.json"))
        self.options = self.attempt("the options in config.json", lambda: {**self.config["options"]}) or {}
        self.recipe = RECIPES.get(str(self.config.get("recipe")))
        self.lines = [line for line in self.objects("metrics.jsonl") if isinstance(line.get("step"), int)]
        self.panels = sorted((int(path.stem[5:]), path) for path in (out / "samples").glob("step_*.png")
                             if re.fullmatch("step_[0-9]{1,9}", path.stem))             # the others are of one row

    def attempt(self, what: str, make: Callable, *given):
        """What make(*given) returns, or "" and a note: whatever is damaged in whatever way, there is a page."""
        try:
            return make(*given)
        except Exception as error:
            self.notes.append(f"Not shown, as it is missing or damaged: {what} ({error!s:.200}).")
            return ""

    def objects(self, name: str) -> list[dict]:
        """The JSON objects in a file, one, or (.jsonl) one a line; NaN is text. A pipe has none: it might never end."""
        text = self.attempt(name, (self.out / name).read_bytes) if os.path.isfile(self.out / name) else b""
        parts = text.splitlines() if name.endswith("l") else [text] * bool(text)
        return [one for part in parts if (one := self.attempt(name, lambda: {**json.loads(part, parse_constant=str)}))]


@functools.lru_cache(maxsize=4 * MOST)
def image(path: Path, what: str, _changed: int) -> str:
    """<img> of a picture. _changed: when; a file that has is read again."""
    picture, content, kind = open_image(path), path.read_bytes(), "png"
    if len(content) > LARGE:
        picture.save(buffer := io.BytesIO(), "JPEG", quality=88, subsampling=0)         # or letters get coloured rims
        content, kind = buffer.getvalue(), "jpeg"
    return f'<img src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{escape(what)}">'


def table(rows: list[list]) -> str:
    """Values in a box that scrolls; the first row is the head, and one that ends with bad news stands out."""
    def cell(value, tag: str = "td") -> str:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value).removeprefix(f"{ROOT}/")
        return f"<{tag}>{escape({'None': 'none', 'True': 'yes', 'False': 'no'}.get(text, text))}</{tag}>"

    html = "".join(cell(value, "th") for value in rows[0])
    for row in rows[1:]:
        html += "</tr><tr" + " class=marked" * (row[-1] in ("worse", "changed")) + ">" + "".join(map(cell, row))
    return f"<div class=wide><table><tr>{html}</tr></table></div>"


def figure(run: Run, title: str, paths: dict[Path, str]) -> str:
    """Pictures in a box that scrolls. paths: with what each shows."""
    found = [run.attempt(path.name, lambda: image(path, paths[path], path.stat().st_mtime_ns)) for path in paths]
    return f"<figure><figcaption>{escape(title)}</figcaption><div class=wide><div>{''.join(found)}</div></div></figure>"


def facts(runs: list[Run]) -> str:
    """The first things to know, a column for each run."""
    columns: list[list] = [["run", "data", "model", "method", "steps", "time", "memory", "made with"]]
    for run in runs:
        given, done = run.options.get, max((line["step"] for line in run.lines), default=0)
        state = "finished" if done == given("steps") else "not finished" if done else "not started"
        seconds, memory = ([one[key] for one in run.lines if isinstance(one.get(key), float)] or [0] for key in FLOATS)
        made = {"commit": run.config.get("commit"), **run.config.get("versions", {})}
        columns.append([run.name, given("data"), given("model"), f"{given('method')}, {given('tune')}",
                        f"{done} of {given('steps')}, {state}", f"{median(seconds):.3g} s per step",
                        f"{in_words(max(memory))} at most", [f"{name} {version}" for name, version in made.items()]])
    return table([*map(list, zip(*columns))])


def panels(runs: list[Run]) -> str:
    """At most MOST of a run: the first, every second (or fourth, ...), the last; so the next page has few new ones."""
    figures = ""
    for run in runs:
        stride = 1
        while len(shown := sorted({*run.panels[::stride], *run.panels[-1:]})) > MOST:
            stride *= 2
        title = f"{run.name}: {len(shown)} of {len(run.panels)} panels"
        figures += figure(run, title, {path: f"step {step}" for step, path in shown})
    return figures


def options(runs: list[Run]) -> str:
    """Those that differ, between runs or from what a run without flags has; and all."""
    plain, first, recipe = Options([]), runs[0].options, runs[0].recipe
    if recipe:
        how = {name: first[name] for name in ("method", "tune", "teacher_lora") if name in first}
        plain = recipes.fill(plain, what_is_kept(replace(plain, **how), recipe, first.get("keep") == recipe.keep_edits))
    sides = {run.name: run.options for run in runs} if runs[1:] else {"this run": first, "if left out": asdict(plain)}
    rows = [[name, *(side.get(name) for side in sides.values())] for name in asdict(plain) | first]
    differ = [row for row in rows if any(value != row[1] for value in row[2:]) and row[0] not in ELSEWHERE]
    some, every = (table([["option", *sides], *part]) for part in (differ, rows))
    return f"{some if differ else '<p>None.</p>'}<details><summary>All options</summary>{every}</details>"


def scores(runs: list[Run]) -> str:
    """A line for each measure and run, and pictures; nothing where nothing was measured."""
    lines, order, figures = list[list](), dict[str, int](), ""
    for run in (run for run in runs if run.scores):
        for row in run.scores["rows"]:
            gap, word = row.get("difference"), ""
            if gap:
                word = {"same": "changed", ("lower", "higher")[gap["low"] > 0]: "better"}.get(row["better"], "worse")
                is_small = row["better"] == "same" and abs(gap["mean"]) < 0.02 * abs(row["base"])
                word = "no clear difference" if gap["low"] <= 0 <= gap["high"] or is_small else word
            sides = ["" if row.get(side) is None else f"{row[side]:.3g}" for side in ("base", "student", "teacher")]
            lines.append([row["steps"], row["group"], row["measure"], run.name, *sides,
                          "{mean:+.3g} [{low:+.3g}, {high:+.3g}]".format(**gap) if gap else "", word])
        about = {"networks": {}, **run.scores.get("about", {})}
        title = ", ".join(f"{name} {value}" for name, value in {**about.pop("networks"), **about}.items())
        title = f"{run.name}: {title}. Not measured: {', '.join(run.scores.get('missing', [])) or 'nothing'}."
        figures += figure(run, title, {run.out / name: name for name in run.scores.get("pictures", [])})
    lines.sort(key=lambda line: order.setdefault(str(line[:3]), len(order)))            # runs beside each other
    head = ["steps", "prompts", "measure", "run", "base", "student", "teacher", "student - base", ""]
    return table([head, *lines]) + figures if figures else ""


def page(runs: list[Run]) -> bytes:
    """The template: {{slots}} are filled, and what stands between {{#word}} and {{/word}} stays if the word is true."""
    first, given = runs[0], runs[0].options.get
    parts = {make.__name__: first.attempt(make.__name__, make, runs) for make in (facts, panels, scores, options)}
    lines = first.attempt("metrics.jsonl", lambda: json.dumps({run.name: run.lines for run in runs}, allow_nan=False))
    parts["lines"] = (lines or "{}").replace("<", "\\u003c")            # no text in it ends the page's script
    is_full, is_real = given("tune") == FULL, given("model", "embedded") != "embedded"
    model = str(given("model")) if is_real else "tiny/model"
    file = "student/transformer" if is_full else f"{given('name') or 'student'}.safetensors"
    flags = f"--model {quote(model)} " * is_real + "--quantize int8 " * (given("quantize") == "int8")
    flags += "--source PICTURE.png " * (first.config.get("edits") is True)
    flags += "--transformer" if is_full else "--compare --lora"
    said = [first.attempt(path.name, lambda: open_image(path).info["prompt"]) for _, path in first.panels[-1:]]
    prompts = "".join(said).splitlines() or ["..."]
    prompt = ([line for line in prompts if "[V]" in line] or prompts[:1])[-1]           # a new one, where there is one
    words = quote(prompt) if set(prompt) & set('"$`\\!') else f'"{prompt}"'             # as Windows knows it, too
    texts = {"name": " and ".join(run.name for run in runs), "file": file, "size": given("size"),
             "weights": json.dumps(file), "out": json.dumps(first.out.as_posix()), "prompt": json.dumps(prompt),
             "model": json.dumps(model), "sampling": first.recipe.inference_steps if first.recipe else 8,
             "sample": f"python sample.py --prompt {words} {flags} {quote((first.out / file).as_posix())}",
             "evaluate": "\n".join(f"python evaluate.py --run {quote(str(run.out))}" for run in runs
                                   if not run.scores and run.config.get("edits") is not True)}
    parts |= {name: escape(str(text)) for name, text in texts.items()}
    parts["notes"] = "".join(f"<p>{escape(note)}</p>" for note in dict.fromkeys(sum((run.notes for run in runs), [])))
    true = {name for name, part in parts.items() if part} | {
        "several" if runs[1:] else "one", "full" if is_full else "lora", "real" if is_real else "embedded",
        "edits" if first.config.get("edits") is True else "draws"}
    html = TEMPLATE.read_text("utf-8")
    while PART.search(html):                                                            # from the outside in
        html = PART.sub(lambda found: found[2] * (found[1] in true), html)
    return SLOT.sub(lambda found: parts[found[1]], html).encode("utf-8", "replace")


def write(out: Path) -> Path:
    """report.html of the run in `out`; returns its path. Raises InputError when it cannot be written."""
    write_bytes(out / NAME, page([Run(out, real(out).name)]))
    return out / NAME


def compare(runs: list[Path], path: Path) -> Path:
    """Several runs on one page, side by side and over each other; returns `path`. Raises InputError."""
    for out in runs:
        if not (out / "config.json").is_file():
            raise InputError(f"{out}: holds no run (config.json is missing); give folders that train.py wrote")
    write_bytes(path, page([Run(out, out.as_posix()) for out in runs]))
    return path
