"""What the tables of attacks share: a place that an attack damages, the programs, and how an attack may end.

A row is a name, the damage, flags, and the end: a new attack is one row. `Campaign` runs it inside this process, as
`python PROGRAM.py` would, and looks at what a user gets to see: status, the two streams, files.
"""
import contextlib
import functools
import io
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from plumbing.files import ROOT as REPO
from plumbing.program import run
from tiny import evaluate, score, score_edits

SECONDS = 60                       # an attack that takes longer is an endless run
LONG = 300 * "x"                    # no file system has such names
RAW = os.fsdecode(b"a\xff")         # what Python makes of a name that is not UTF-8
HUGE = "1" + 400 * "0"              # a whole number beyond all floats
WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMER, VAE, ENCODER = f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"


@dataclass
class Place:
    """Folders that a case may damage: data/, model/ and adapter.safetensors below `root`."""
    root: Path
    features: Path | None = None    # a cache of features that are nobody's

    @classmethod
    def at(cls, root: Path, data: Path, model: Path, adapter: Path, features: Path | None = None
           ) -> "Place":
        """model is a link: who damages it takes `own_model` first."""
        shutil.copytree(data, root / "data"), shutil.copy(adapter, root / "adapter.safetensors")
        (root / "model").symlink_to(model)
        return cls(root, features)

    @classmethod
    def copies(cls, root: Path, data: Path, model: Path, adapter: Path) -> "Place":
        """With a model of its own."""
        place = cls.at(root, data, model, adapter)
        place.own_model()
        return place

    def own_model(self) -> Path:
        """The checkpoint, a copy of its own now."""
        original = self.model.resolve()
        self.model.unlink()
        return Path(shutil.copytree(original, self.model))

    def __getattr__(self, name: str) -> Path:
        return self.root / name

    def snapshot(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in self.root.rglob("*")}


# ---------------------------------------------------------------------------------------------------- programs
def filled(place: Place, *words) -> list[str]:
    """Words of a command line, in which ROOT (of the place), REPO, LONG, RAW and HUGE stand for what they say."""
    spelled = {"LONG": LONG, "RAW": RAW, "HUGE": HUGE, "REPO": str(REPO), "ROOT": str(place.root)}
    return [functools.reduce(lambda text, name: text.replace(name, spelled[name]), spelled, str(word))
            for word in words]


def train_words(place: Place, *flags) -> list[str]:
    data = [] if "--data" in flags else ["--data", str(place.data)]
    return [*data, "--model", str(place.model), "--out", str(place.run), "--size", "32", "--steps", "1",
            "--sample-every", "0", "--device", "cpu", "--keep", "none",
            *filled(place, *flags)]


def sample_words(place: Place, *flags) -> list[str]:
    return ["--model", str(place.model), "--height", "32", "--width", "32", "--steps", "1", "--device", "cpu",
            "--out", str(place.root / "picture.png"), *filled(place, *flags)]


def training_words(place: Place, *flags) -> list[str]:
    return train_words(place, "--cache", place.features, "--rollout-steps", 2, *flags)


def drawing_words(place: Place, *flags) -> list[str]:
    return sample_words(place, *(() if {"--prompt", "--prompts"} & set(flags) else ("--prompt", "a red star")), *flags)


def scoring_words(place: Place, *flags) -> list[str]:
    return ["--data", str(place.data), "--out", str(place.report), *filled(place, *flags)]


@dataclass(frozen=True)
class Program:
    main: Callable[[], int | None]
    words: Callable[..., list[str]]     # (place, *flags) -> a small task with these flags
    result: str                         # the file below ROOT that shows that it worked


TRAIN = Program(train.main, training_words, "run/student.safetensors")
SAMPLE = Program(sample.main, drawing_words, "picture.png")
SCORE = Program(score.main, scoring_words, "report/scores.json")
EDITS = Program(score_edits.main, scoring_words, "report/scores.json")
EVALUATE = Program(evaluate.main, lambda place, *flags: ["--out", str(place.report), *filled(place, *flags)],
                   "report/report.json")


# ---------------------------------------------------------------------------------------------------- ends
@dataclass(frozen=True)
class End:
    """How an attack may end. words: all occur in what is said; ROOT stands for the folder of the place."""
    words: tuple[str, ...]
    may_refuse: bool = False    # one line "error: ...", status 2
    may_write: bool = False     # before it refuses, below run/
    may_work: bool = False      # status 0 and the program's result
    result: str = ""            # instead of the program's


def refused(*words: str) -> End:
    """One line and status 2, no file changed."""
    return End(words, may_refuse=True)


def stopped(*words: str) -> End:
    """The same for what only shows when it runs: the folder of the run may have been begun."""
    return End(words, may_refuse=True, may_write=True)


def said(*words: str) -> End:
    """It works, and a line says so."""
    return End(words, may_work=True)


def works(result: str = "") -> End:
    """It works: it must not be refused. result: the file below ROOT that shows it, instead of the program's."""
    return End((), may_work=True, result=result)


def either(*words: str, result: str = "") -> End:
    """It works, or it is refused with these words: both are sensible."""
    return End(words, may_refuse=True, may_write=True, may_work=True, result=result)


class Campaign:
    """campaign(program, damage, flags, end): one attack on a place."""

    def __init__(self, place: Place, monkeypatch) -> None:
        self.place, self.monkeypatch = place, monkeypatch

    def __call__(self, program: Program, damage: Callable | None, flags: str | tuple, end: End) -> None:
        if damage:
            damage(self.place)
        before = self.place.snapshot()
        words = program.words(self.place, *(flags.split(" ") if isinstance(flags, str) and flags else flags))
        status, errors = self.start(program, words)
        lines = errors.splitlines()
        assert status in [2] * end.may_refuse + [0] * end.may_work, f"status {status}: {lines[-3:]}"
        if status == 2:
            assert "error: " in lines[-1] and len(lines[-1]) > 20, lines
            assert all(line.startswith(("note: ", "warning: ", "usage: ", " ")) for line in lines[:-1]), lines
        if status == 2 or not end.may_refuse:
            found = (lines[-1] if status == 2 else errors).replace(str(self.place.root), "ROOT")
            assert not [word for word in end.words if word not in found], f"said: {found}"
        self.check_files(before, status, end, program)

    def start(self, program: Program, words: list[str]) -> tuple[int | None, str]:
        """Status, and stderr with Python's warnings. As at a terminal, stderr takes everything, stdout only text."""
        streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
        self.monkeypatch.setattr(sys, "argv", ["program", *words])
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), \
                warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as ended:
            warnings.simplefilter("always")
            run(program.main)
        streams[1].seek(0)
        return ended.value.code or 0, "".join(f"warning: {w.message}\n" for w in caught) + streams[1].read()

    def check_files(self, before: dict[Path, bytes], status: int | None, end: End, program: Program) -> None:
        """What was there is as it was; nothing new after a refusal, a usable result otherwise."""
        after = self.place.snapshot()
        run = {path for path in after | before if path == self.place.run or self.place.run in path.parents}
        allowed = run if end.may_write else set()
        if status == 2:
            changed = [path for path in after | before if before.get(path) != after.get(path) and path not in allowed]
            assert not changed, f"changed: {changed[:3]}"
            return
        changed = [path for path in before if before[path] != after.get(path) and path not in run]
        assert not changed, f"changed: {changed[:3]}"
        path = self.place.root / filled(self.place, end.result or program.result)[0]
        assert path.is_file() and before.get(path) != after[path], f"no new {path.name}"
        if path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
        elif path.suffix == ".png":
            colours = Image.open(path).getextrema()
            assert max(high - low for low, high in colours) > 10, "a picture of one colour"


@contextlib.contextmanager
def no_endless_run():
    """Fails the test under way after a minute."""
    def ring(*_) -> None:
        pytest.fail(f"an endless run: more than {SECONDS} s")
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------- damages
def edit_json(path: Path, **changes) -> None:
    """Set keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None], **metadata: str) -> None:
    """change(tensors by name) of a safetensors file, in place; metadata: what changes there, "" removes one."""
    with safe_open(path, "pt") as file:
        facts = {key: value for key, value in ((file.metadata() or {}) | metadata).items() if value}
    weights = load_file(path)
    change(weights)
    save_file(weights, path, facts)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def folder_instead(path: Path) -> None:
    """A folder where a file was."""
    path.unlink(missing_ok=True)
    path.mkdir()


def table(place: Place, *lines: str) -> None:
    for path in place.data.glob("*.txt"):
        path.unlink()
    (place.data / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def lines(count: int) -> list[str]:
    return [json.dumps({"file_name": f"{i}.png", "text": "a star"}) for i in range(count)]
