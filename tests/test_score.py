"""tiny.score, tiny.score_edits and tiny.evaluate refuse what they cannot measure, before they draw anything, and print
what they measure in words."""
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from plumbing.files import InputError
from plumbing.pictures import to_tensor
from plumbing.program import run
from tiny import evaluate, score, score_edits
from tiny.world import SIDE

ROOT = Path(__file__).parents[1]
EXAMPLES, TINY = ROOT / "examples", ROOT / "tiny"


@pytest.mark.parametrize("module, arguments, says", [
    (score, ["--data", EXAMPLES / "paint"], "examples/paint: data for editing; use tiny.score_edits"),
    (score, ["--data", EXAMPLES / "ordinary"], "the field 'file_name' is missing"),
    (score, ["--data", EXAMPLES / "nothing"], "examples/nothing"),
    (score, ["--data", EXAMPLES / "star", "--lora", "file"], "--lora file: no name; write NAME=FILE"),
    (score, ["--data", EXAMPLES / "star", "--model", EXAMPLES], str(EXAMPLES)),
    (score, ["--data", EXAMPLES / "star", "--lora", "base=FILE"], "--lora base=FILE: another column has the name base"),
    (score, ["--data", EXAMPLES / "star", "--lora", "=FILE"], "--lora =FILE: no name"),
    (score, ["--data", EXAMPLES / "star", "--lora", "a=FILE"], "FILE: no such file"),
    (score, ["--data", EXAMPLES / "star", "--concept-prompts", 0], "--concept-prompts 0: not a usable number"),
    (score, ["--data", EXAMPLES / "star", "--ordinary-prompts", -1], "--ordinary-prompts -1: not a usable number"),
    (score, ["--data", EXAMPLES / "star", "--ordinary-prompts", 10 ** 9], "give 1 to 10000"),
    (score, ["--data", EXAMPLES / "star", "--seed", -1], "--seed -1: out of range"),
    (score_edits, ["--data", EXAMPLES / "paint", "--lora", "source=FILE"], "another column has the name source"),
    (score_edits, ["--data", EXAMPLES / "paint", "--prompts", 0], "--prompts 0: not a usable number of prompts"),
    (evaluate, ["--prompts", 0], "--prompts 0: not a usable number of prompts; give 1 to 10000"),
    (evaluate, ["--seed", 2 ** 32], "--seed 4294967296: out of range"),
    (score_edits, ["--data", EXAMPLES / "star"], "examples/star: no data for editing; use tiny.score"),
    (score_edits, ["--data", EXAMPLES / "paint", "--model", TINY / "model"], "Z-Image takes no reference images"),
    (score_edits, ["--data", EXAMPLES / "paint", "--model", EXAMPLES], str(EXAMPLES)),
])
def test_one_line_and_status_2(monkeypatch, capsys, tmp_path, module, arguments, says):
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run(module.main)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and says in error and "\n" not in error and not (tmp_path / "out").exists()


@pytest.mark.quick
def test_a_folder_that_has_both_kinds_of_rows(tmp_path):
    for name in ("1.png", "1_before.png", "2.png"):
        shutil.copy(EXAMPLES / "paint" / name, tmp_path)
    lines = [{"file_name": "1.png", "text": "paint it [V]", "source": "1_before.png"},
             {"file_name": "2.png", "text": "a [V]"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for editing in (True, False):
        with pytest.raises(InputError, match="data for editing"):
            score.read_pictures(str(tmp_path), editing)


@pytest.mark.quick
@pytest.mark.parametrize("module, arguments", [(score, ["--data", EXAMPLES / "star"]), (evaluate, []),
                                               (score_edits, ["--data", EXAMPLES / "paint"])])
def test_an_out_that_is_a_file_is_refused_first(monkeypatch, capsys, tmp_path, module, arguments):
    (tmp_path / "out").touch()
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments), "--out", str(tmp_path / "out" / "there")])
    with pytest.raises(SystemExit) as stopped:
        run(module.main)
    assert stopped.value.code == 2 and f"--out {tmp_path / 'out' / 'there'}: not writable" in capsys.readouterr().err


@pytest.mark.quick
def test_names_of_adapters_are_different(monkeypatch):
    monkeypatch.setattr(score.lora_files, "load", lambda path, net: path)
    assert score.adapters(["a=x", "b=c=y"], None) == {"a": Path("x"), "b=c": Path("y")}
    for entries in (["a=x", "a=y"], ["teacher's view=x"]):
        with pytest.raises(InputError, match=f"^--lora {entries[-1]}: another column has the name "):
            score.adapters(entries, None)


# ------------------------------------------------------------------------------------------- data of another world
def folder_of(tmp_path: Path, pixels: np.ndarray, caption: str) -> Path:
    """A data folder with the first picture of examples/star, and then with these pixels (H, W, 3) in [0, 1]."""
    for suffix in (".png", ".txt"):
        shutil.copy(EXAMPLES / "star" / f"1{suffix}", tmp_path)
    Image.fromarray((pixels.clip(0, 1) * 255).round().astype("uint8")).save(tmp_path / "2.png")
    (tmp_path / "2.txt").write_text(caption)
    return tmp_path


def photographs() -> dict[str, np.ndarray]:
    """What a camera might see, (H, W, 3) in [0, 1]: smooth light, a lit ball, fog, blotches, noise."""
    y, x = np.mgrid[0:96, 0:128] / 127
    draw = np.random.default_rng(0)

    def blotches(cells: int) -> np.ndarray:
        small = Image.fromarray((draw.random((cells, cells, 3)) * 255).astype("uint8"))
        return np.asarray(small.resize((128, 96), Image.Resampling.BICUBIC)) / 255

    ball = np.exp(-((x - .5) ** 2 + (y - .4) ** 2) * 10)[..., None]
    return {"gradient": np.stack([x, y, 1 - x], -1), "gray gradient": np.stack([x] * 3, -1),
            "evening sky": np.stack([.4 + .3 * y, .6 + .2 * y, .9 - .05 * y], -1),
            "weak gradient": np.stack([.5 + .2 * x, .6 + .1 * y, .7 - .1 * x], -1),
            "ball": ball * np.array([.8, .5, .3]) + .1, "large blotches": blotches(4), "blotches": blotches(8),
            "noise": draw.random((96, 128, 3)), "white": np.ones((96, 128, 3))}


PHOTOGRAPHS = photographs()


@pytest.mark.quick
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_cannot_be_scored(tmp_path, reader, name):
    folder = folder_of(tmp_path, PHOTOGRAPHS[name], "a [V] dog")
    with pytest.raises(InputError, match=r"2\.png: not a picture of the embedded models' world .*; score data such as "
                                         "examples/star, and judge other data by the panels"):
        score.concept_of(str(folder), reader)


@pytest.mark.quick
def test_the_limit_is_far_from_both_sides(reader):
    """Pictures of the world are 20 times nearer than the limit, and a resized one 2 times. The smoothest photograph is
    1.4 times as far, most are at least 3 times."""
    pictures = sorted(path for path in EXAMPLES.glob("*/*.png"))
    assert len(pictures) == 16
    images = [Image.open(path).convert("RGB") for path in pictures]
    enlarged = images[0].resize((256, 256), Image.Resampling.BICUBIC).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    distance = reader(torch.cat([to_tensor(image) for image in (*images, enlarged)])).distance
    assert distance[:-1].max() < score.FOREIGN / 20 and distance[-1] < score.FOREIGN / 2
    away = reader(torch.cat([to_tensor(Image.fromarray((pixels * 255).astype("uint8")).resize((SIDE, SIDE)))
                             for pixels in PHOTOGRAPHS.values()])).distance
    assert away.min() > 1.4 * score.FOREIGN and away.median() > 3 * score.FOREIGN


@pytest.mark.quick
def test_a_picture_of_the_world_is_read_and_one_without_v_refused(tmp_path, reader):
    star = np.asarray(Image.open(EXAMPLES / "star" / "2.png").convert("RGB")) / 255
    folder = folder_of(tmp_path, star, "a [V]")
    kind, concept, pictures = score.concept_of(str(folder), reader)
    assert kind == "object" and pictures.shape == (2, 3, SIDE, SIDE) and concept.shape == (9,)
    folder_of(tmp_path, star, "a striped star")
    with pytest.raises(InputError, match=r'2\.png: its caption "a striped star" does not say \[V\]'):
        score.concept_of(str(folder), reader)


@pytest.mark.quick
def test_only_the_paint_of_an_edit_is_scored(tmp_path):
    for name in ("1.png", "1_before.png"):
        shutil.copy(EXAMPLES / "paint" / name, tmp_path)
    for text, says in (("make it [V]", "is not about paint"), ("paint it red", r"does not say \[V\]")):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": text,
                                                             "source": "1_before.png"}))
        with pytest.raises(InputError, match=rf'1\.png: its caption "{re.escape(text)}" {says}'):
            score_edits.edit_of(str(tmp_path), None)


# ------------------------------------------------------------------------------------------- what they print
@pytest.mark.quick
def test_numbers_stand_below_their_headings():
    table = evaluate.Table({"group": {"a": "first", "b": "of two words"}, "other": {"c": "last"}},
                           ["short", "much longer"])
    assert table.head() + "\n" + table.line("short", {"a": .5, "c": 1.0, "unseen": 7}) == "\n".join((
        "             group                  other",
        "             first  of two words     last",
        "short        0.500                  1.000"))


@pytest.mark.parametrize("module, arguments, columns, lines", [
    (score, ["--data", EXAMPLES / "chalk", "--concept-prompts", 1, "--ordinary-prompts", 1], 7, 2),
    (score_edits, ["--data", EXAMPLES / "paint", "--prompts", 1], 8, 2)])
def test_the_smallest_score(monkeypatch, capsys, tmp_path, module, arguments, columns, lines):
    """One prompt of each kind: a table with all numbers of scores.json, and a panel with two rows."""
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments), "--out", str(tmp_path)])
    assert module.main() is None
    _, head, *printed, done = capsys.readouterr().out.splitlines()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [*scores] == ["base", "teacher's view"] and len(printed) == lines and done.startswith("done ")
    assert len(head.split()) == columns == len(scores["base"]) and {"{", '"'}.isdisjoint("".join(printed))
    keys = [key for group in module.COLUMNS.values() for key in group]
    for (name, numbers), line in zip(scores.items(), printed):
        assert line.startswith(name)
        assert line[len(name):].split() == [f"{numbers[key]:.3f}" for key in keys if key in numbers]
    assert Image.open(tmp_path / "panel.png").height == 26 + 2 * 166


def test_the_report_card(monkeypatch, capsys, tmp_path):
    """Four models and the VAE, each a line; report.json has more. No model walks here: each "draws" its noise."""
    monkeypatch.setattr(evaluate, "sample", lambda velocity, noise, sigmas: noise)
    monkeypatch.setattr(sys, "argv", ["evaluate", "--prompts", "1", "--out", str(tmp_path)])
    evaluate.main()
    _, _, *printed, done = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(printed) == 5 and set(report) == {"VAE alone", *(line[:27].strip() for line in printed)}
    assert done == f"done     {tmp_path / 'report.json'}, pictures beside it"
    shipped = report["shipped, 4 steps"]
    assert set(shipped) == {
        *(f"ordinary: {name}" for name in ("accuracy of what was said", "distance to the world", "marks decided")),
        *(f"teacher: {name}" for name in report["VAE alone"])}
    assert printed[0].split()[3:] == [f"{shipped[key]:.3f}" for group in evaluate.COLUMNS.values() for key in group]
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "few_steps.png", "teacher.png"}
